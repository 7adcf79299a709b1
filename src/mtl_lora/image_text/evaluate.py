"""``mtl-lora evaluate`` and ``predict`` for images and texts: answers and captions are generated, labels are scored."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from transformers import GenerationConfig, PreTrainedModel

from mtl_lora import artifacts, evaluation, files
from mtl_lora.errors import UserError, within
from mtl_lora.evaluation import load_questions
from mtl_lora.image_text import model as visual
from mtl_lora.image_text import page
from mtl_lora.image_text.captions import caption_rows, tokenizer_here
from mtl_lora.image_text.config import ANSWER, OWN, SHUFFLED, AnswerConfig, EvalConfig, PredictConfig, TrainConfig
from mtl_lora.image_text.data import IGNORED, Collator, Encoder
from mtl_lora.image_text.examples import Example, load_examples, parse_example
from mtl_lora.image_text.features import FeatureStore
from mtl_lora.image_text.tasks import CAPTION, CHOICE, Task, TaskSet
from mtl_lora.image_text.train import answer_losses
from mtl_lora.images import find_images
from mtl_lora.metrics import METRICS, same_text, text_f1
from mtl_lora.results import Comparability, Results, TaskResult, measure
from mtl_lora.tasks import grouped

SHUFFLE_SEED = 0  # for --shuffle_images


class Question(evaluation.Question):
    """One example prepared for a model. row: its ``Encoder.encode`` row, with the images that are shown."""

    @property
    def target(self) -> dict:
        """The best answer, and all answers if the metric needs them."""
        example, target = self.example, {"answer": self.example.answer}
        if METRICS[self.task.metric_name].needs == "references":
            return target | {"answers": list(example.annotators or example.answers)}  # annotators may repeat a caption
        if METRICS[self.task.metric_name].target == "answers":
            return target | {"answers": list(example.annotators) or example.answers}
        return target

    def line(self, parsed: str, **said: object) -> dict:
        """Return the question's prediction line. said: the generated ``text``, or the ``scores`` of the labels."""
        name, target = self.task.metric_name, self.target
        line = {"task": self.task.name, "index": self.example.index, **target, "parsed": parsed}
        if METRICS[name].target == "answers":
            line["score"] = METRICS[name].score(parsed, target["answers"])
        elif self.task.answer != CAPTION:
            same = same_text if name in ("exact_match", "f1") and self.task.answer != CHOICE else str.__eq__
            line["correct"] = same(parsed, target["answer"])
            line |= {"f1": text_f1(parsed, target["answer"])} if same is same_text else {}
        extra = {key: self.example.extra[key] for key in ("kind", "group") if key in self.example.extra}
        return line | said | {"prompt_sha256": self.prompt_sha256} | extra

    def extract_again(self, line: dict) -> dict:
        """Return the line scored again by the current rules."""
        return self.line(line["parsed"], **{key: line[key] for key in ("text", "scores") if key in line})


class Evaluator(evaluation.Evaluator):
    """A language model with images and its tasks; raises ``UserError`` for bad settings before loading the model."""

    system, version, default_cutoff_len = "image_text", 1, TrainConfig.cutoff_len
    comparability = Comparability(["mode", "base_fingerprint", "cutoff_len", "images"])
    page: tuple[list[Question], dict]  # the questions that --page shows, and their pictures; set by ``run``
    tokenizer: str  # with which captions are scored; set by ``run``

    def __init__(self, config: AnswerConfig):
        super().__init__(config)
        name = self.base_model.name
        self.encoder = Encoder(self.base_model.tokenizer(), self.base_model.config(), self.cutoff_len, self.tasks)
        if not self.encoder.is_encoder_decoder and visual.reads_gaps(self.base_model.structure()):
            self.version = 2  # 1 had padding between images and text
        if config.official and not self.encoder.is_encoder_decoder:
            raise UserError(f"--official needs an encoder-decoder such as BART, which {name!r} is not; leave it out")
        if config.official:
            self._check_first_tokens()
        self.images = visual.visual_config(self.origin) if self.adapter else None
        self.store = self._store(self.origin.train_settings) if config.images else None
        tokens = self.images.tokens if self.images else 0
        self.collator = Collator(self.encoder, self.store, tokens)
        self.others: dict[int, dict[str, str]] = {}  # with --shuffle_images, the replacement of each image by task id
        self.variant = "" if config.images == OWN else f", {config.images or 'no'} images"

    def _store(self, trained: Mapping | None) -> FeatureStore:
        """Return the features, by default those of the training; raises ``UserError`` if the model takes others."""
        paths = self.config.features or (trained or {}).get("features") or []
        if not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
            raise UserError(f"{self.config.checkpoint}: the features of its training must be paths; pass --features")
        if not paths:
            raise UserError(f"{self.config.checkpoint} does not record the paths of its features; pass --features")
        store, wanted = FeatureStore(paths), self.images
        if (store.grid, store.dim) != (wanted.grid, wanted.dim):
            raise UserError(
                f"the features in {', '.join(paths)} are {store.grid} x {store.grid} cells of {store.dim} numbers, but "
                f"{self.config.checkpoint} takes {wanted.grid} x {wanted.grid} of {wanted.dim}; pass --features"
            )
        if store.source and wanted.source and store.source != wanted.source:
            raise UserError(
                f"the features in {', '.join(paths)} are from the vision model {store.source}, but "
                f"{self.config.checkpoint} was trained on those of {wanted.source}; pass --features"
            )
        return store

    def _check_first_tokens(self) -> None:
        """Raise ``UserError`` if two labels of a task have the same first token."""
        place = len(self.encoder.answer_start)
        for task in self.tasks:
            first = [ids[place] for ids in self.encoder.labels[task.id]]
            if len({*first}) < len(first):
                raise UserError(
                    f"--official compares first tokens, and two labels of {task.name} have the same one; leave it out"
                )

    def settings(self, protocol: str) -> dict:
        config = self.config
        return super().settings(protocol) | {
            "images": f"{SHUFFLED}, seed {SHUFFLE_SEED}" if config.images == SHUFFLED else config.images or "none",
            "features": self.store.fingerprint if self.store else None,
            "num_beams": config.num_beams,
            "official": config.official,
        }

    def shuffle(self, examples: Sequence[Example]) -> None:
        """Choose a replacement for each image among the images of a task. examples: all in the task's file."""
        ids = sorted({image for example in examples for image in example.images})
        if len(ids) < 2:
            raise UserError(
                f"--shuffle_images needs two images of a task, and the questions of "
                f"{self.tasks[examples[0].task_id].name} have one image; leave the task out of --tasks"
            )
        random.Random(SHUFFLE_SEED).shuffle(ids)
        self.others[examples[0].task_id] = dict(zip(ids, ids[1:] + ids[:1], strict=True))

    def questions(self, examples: Sequence[Example], source: str | Path) -> list[Question]:
        """Return the examples as questions; raises ``UserError`` naming the example, or the images without features."""
        with within(source, ", "):
            rows = self.encoder.encode(examples, answered=False)
        found = []
        for example, row in zip(examples, rows, strict=True):
            task, right = self.tasks[example.task_id], len(example.answers)
            if right > 1 and METRICS[task.metric_name].target == "answer" and task.answer != CAPTION:
                raise UserError(
                    f"{source}, example {example.index} has {right} right answers, but {task.metric_name} compares "
                    f'with one; declare "metric": "vqa_accuracy" for {task.name} in the tasks file'
                )
            if self.store and len(example.images) > self.images.images:
                more = f"{len(example.images)} images, but the model takes {self.images.images} at most"
                raise UserError(f"{source}, example {example.index} has {more}; train with --images")
            others = self.others.get(example.task_id)
            row["images"] = [others[image] for image in example.images] if others else row["images"]
            digest = files.sha256_of(str([row["prompt_ids"], row["images"]]).encode())
            found.append(Question(task, example, row["prompt_ids"], digest, row))
        if self.store:
            with within(source):
                self.store.check(image for row in rows for image in row["images"])
        longest = max(map(self._length, found), default=0)
        self.base_model.check_positions(longest, "a question with its images and answer; pass a smaller --cutoff_len")
        return found

    def _length(self, question: Question) -> int:
        """Return the number of tokens of a question, its images, and its longest answer, scored or generated."""
        task, images = question.task, len(question.row["images"]) * self.collator.visual_tokens
        answers = map(len, self.encoder.labels[task.id])
        return len(question.prompt_ids) + images + max(answers, default=task.generated_tokens)

    def structure(self) -> PreTrainedModel:
        return visual.with_images(super().structure(), self.images)

    def build(self) -> PreTrainedModel:
        model = self.base_model.load(self.config.dtype, self.load_in_4bit)
        model = visual.with_images(model, self.images) if self.adapter else model
        # ``generate`` takes every option that it is not given, such as a repetition penalty, from this configuration.
        model.generation_config = GenerationConfig()
        return model

    def tokens(self, question: Question, protocol: str) -> int:
        """Return the tokens of all rows of a question, one per label or beam, visual tokens included."""
        rows = self.config.num_beams if question.task.answer == CAPTION else len(self.encoder.labels[question.task.id])
        return self._length(question) * max(rows, 1)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], protocol: str) -> list[dict]:
        scored = questions[0].task.answer == CHOICE
        return self.in_halves(self._scored if scored else self._generated, questions, protocol)

    def _scored(self, questions: list[Question]) -> list[dict]:
        """Answer with the likeliest label, by the log-probability of its tokens with EOS, or with ``official`` of its
        first token only."""
        task, labels = questions[0].task, self.encoder.labels[questions[0].task.id]
        rows = [question.row | {"answers": [ids], "scores": [1.0]} for question in questions for ids in labels]
        batch = send_to_device(self.collator(rows), self.model.device)
        losses, _, _ = answer_losses(self.model, batch)
        carries = batch["labels"] != IGNORED
        row, column = carries.nonzero().unbind(dim=1)
        place = column - carries.int().argmax(dim=1)[row] - len(self.encoder.answer_start)  # all labels begin with BOS
        counted = place == 0 if self.config.official else place >= 0
        sums = torch.zeros(len(rows), dtype=torch.float64, device=losses.device)
        sums.index_add_(0, row, torch.where(counted, -losses, 0).double())
        lines = []
        for question, scores in zip(questions, sums.view(len(questions), -1).tolist(), strict=True):
            lines.append(question.line(task.labels[evaluation.likeliest(question, scores)], scores=scores))
        return lines

    def _generated(self, questions: list[Question]) -> list[dict]:
        """Answer with generated text, greedily or by beam search, never by sampling."""
        task, tokenizer, encoder = questions[0].task, self.encoder.tokenizer, self.encoder
        batch = send_to_device(self.collator([question.row for question in questions]), self.model.device)
        task_ids = batch.pop("task_ids")
        if encoder.is_encoder_decoder:
            start = [encoder.decoder_start, *encoder.answer_start]
            batch["decoder_input_ids"] = torch.tensor([start] * len(questions), device=self.model.device)
        output = evaluation.generate(
            self.model,
            task,
            batch,
            task_ids,
            max_new_tokens=max(task.generated_tokens - len(encoder.answer_start), 1),
            num_beams=self.config.num_beams if task.answer == CAPTION else 1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=encoder.decoder_start,
        )
        said = 0 if encoder.is_encoder_decoder or "features" in batch else batch["input_ids"].shape[1]
        texts = tokenizer.batch_decode(output[:, said:], skip_special_tokens=True)
        return [
            question.line(" ".join(text.split()), text=text) for question, text in zip(questions, texts, strict=True)
        ]

    def to_predict(self, values: Sequence[object], source: str, task: str | None) -> dict[str, list[Question]]:
        return {ANSWER: self.questions(evaluation.inputs(parse_example, values, source, self.tasks, task), source)}

    def result(self, question: Question, line: Mapping) -> dict:
        images = question.example.images
        image = images[0] if len(images) == 1 else list(images)
        return super().result(question, line, image=image)

    def complete(self, questions: Sequence[Question], lines: Mapping[tuple[str, int], dict]) -> dict:
        found = dict(lines)
        for part in grouped(questions, lambda question: question.task.name).values():
            if part[0].task.answer == CAPTION:
                own = [lines[question.key] for question in part]
                rows = caption_rows([each["parsed"] for each in own], [each["answers"] for each in own], self.tokenizer)
                found |= {question.key: line | row for question, line, row in zip(part, own, rows, strict=True)}
        return found

    def finish(self, asked: evaluation.QuestionSets, results: dict[str, Results]) -> None:
        shown, sources = self.page
        if shown:
            folder = Path(self.config.output_folder)
            lines = evaluation.Predictions(folder).read()
            page.write(folder / artifacts.PICTURES, results[ANSWER].name, shown, lines, sources)

    def task_result(self, task: Task, lines: Sequence[dict]) -> TaskResult:
        result, others = measure(task.metric_name, lines, task.labels), {}
        if task.answer == CAPTION:
            other = "bleu4" if task.metric_name == "cider" else "cider"
            others[other] = measure(other, lines)
            result.measured["tokenizer"] = self.tokenizer
        elif task.answer == CHOICE and all("group" in line for line in lines):
            groups = grouped(lines, lambda line: str(line["group"]))
            consistent = [float(all(line["correct"] for line in part)) for part in groups.values()]
            value, error = METRICS["accuracy"].estimate(consistent)
            others["consistency"] = TaskResult("accuracy", value, error, len(groups))
        return dataclasses.replace(result, others=result.others | others)


def run(config: EvalConfig) -> dict[str, Results]:
    """Evaluate as ``config`` says, see ``evaluation.evaluate``."""
    evaluator = Evaluator(config)

    def load(path: Path, tasks: TaskSet, task: str, closed: bool) -> list[Example]:
        examples = load_examples(path, tasks, task, closed)
        if config.images == SHUFFLED:
            evaluator.shuffle(examples)  # of the whole file, so that replacements do not depend on --limit
        return examples

    asked = load_questions(evaluator, load)
    if any(question.task.answer == CAPTION for question in asked.questions):
        evaluator.tokenizer = tokenizer_here(config.caption_tokenizer)
    shown = page.evenly(evaluator.tasks, asked.questions, config.page)
    ids = {image for question in shown for image in question.row["images"]}
    pictures = find_images(Path(config.pictures), "--pictures", only=ids) if shown else {}
    evaluator.page = shown, page.sources(pictures, shown, config.pictures)
    return evaluation.evaluate(evaluator, asked)


# ---- prediction ----


class Predictor(evaluation.Predictor):
    """Answers examples in Python; the model is loaded on the first call.

        predictor = Predictor("output/pictures", features=["features.h5"])
        predictor.predict([{"image": "17", "text": "Is there a circle?"}], task="easy_vqa")
        # [{"index": 0, "image": "17", "task": "easy_vqa", "answer": "yes", "text": "yes"}]

    Its arguments are those of ``evaluation.Predictor``.
    """

    evaluator_class, config_class, field = Evaluator, AnswerConfig, "image"


def predict(config: PredictConfig) -> None:
    """Answer every example of the input file that has no answer yet, then write the complete output file."""
    evaluation.predict(Evaluator(config), ANSWER)
