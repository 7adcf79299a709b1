"""``mtl-lora evaluate`` and ``predict`` for encoders: a trained head answers, or the cosine of two embeddings."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from mtl_lora import evaluation, files
from mtl_lora.errors import UserError
from mtl_lora.evaluation import load_questions
from mtl_lora.nlu import model as heads
from mtl_lora.nlu.config import CLASSIFY, COSINE, NO_HEAD, AnswerConfig, EvalConfig, PredictConfig, TrainConfig
from mtl_lora.nlu.data import Collator, Encoder
from mtl_lora.nlu.examples import Example, load_examples, parse_example
from mtl_lora.nlu.tasks import Task
from mtl_lora.results import Comparability, Results, TaskResult, measure
from mtl_lora.tasks import grouped


class Question(evaluation.Question):
    """One example prepared for a model. prompt_ids: token ids of its text or pair. row: its ``Encoder.encode`` row."""

    def line(self, parsed: str | float, scores: list[float] | None) -> dict:
        """Return the question's prediction line: the label as ``answer`` and the model's answer as ``parsed``.

        scores: the logits of the labels; None for a regression.
        """
        line = {"task": self.task.name, "index": self.example.index, "answer": self.example.label, "parsed": parsed}
        if scores is not None:
            line |= {"correct": parsed == self.example.label, "scores": scores}
        line["prompt_sha256"] = self.prompt_sha256
        return line | ({"kind": self.example.extra["kind"]} if "kind" in self.example.extra else {})

    @property
    def target(self) -> dict:
        return {"answer": self.example.label}

    def extract_again(self, line: dict) -> dict:
        """Return the line anew: a head's answer needs no extraction, but the example's ``kind`` may have changed."""
        return self.line(line["parsed"], line.get("scores"))


def by_length(rows: Sequence[Sequence[int]], answer: Callable[[list[int]], Iterable]) -> list:
    """Return an answer for each row of token ids: ``answer`` gets the positions of all rows of one length, so that its
    batch needs no padding, which some encoders read."""
    found = {}
    for part in grouped(range(len(rows)), lambda index: len(rows[index])).values():
        found |= zip(part, answer(part), strict=True)
    return [found[index] for index in range(len(rows))]


class Evaluator(evaluation.Evaluator):
    """An encoder and its tasks; raises ``UserError`` for bad settings before loading the model."""

    system, version, default_cutoff_len = "nlu", 1, TrainConfig.cutoff_len
    token_budget, gpu_token_budget = 4096, 131072
    comparability = Comparability(["mode", "base_fingerprint", "cutoff_len"])

    def __init__(self, config: AnswerConfig):
        super().__init__(config)
        self.pairs = self.origin.pairs or {}
        tokenizer = self.base_model.tokenizer()
        self.encoder, self.collator = Encoder(tokenizer, self.cutoff_len), Collator(tokenizer.pad_token_id)

    def questions(self, examples: Sequence[Example], source: str | Path) -> list[Question]:
        """Return the examples as questions.

        Raises ``UserError`` naming ``source`` for a pair of a task that was trained on single texts alone, or the
        reverse: nothing in the score would reveal the mismatch.
        """
        for example in examples:
            task, is_pair = self.tasks[example.task_id].name, example.text_b is not None
            if self.pairs.get(task, is_pair) != is_pair:
                has, trained = ("a", "no") if is_pair else ("no", "every")
                found = f"{source}, example {example.index} has {has} 'text_b'"
                way_out = "leave it out" if is_pair else 'add it, as "text_b": "" in JSON if it is empty'
                raise UserError(f"{found}, but {trained} training example of {task} had one; {way_out}")
        rows = self.encoder.encode(examples)
        found = []
        for example, row in zip(examples, rows, strict=True):
            digest = files.sha256_of(str([row["input_ids"], row.get("token_type_ids")]).encode())
            found.append(Question(self.tasks[example.task_id], example, row["input_ids"], digest, row))
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        self.base_model.check_positions(longest, "a text; pass a smaller --cutoff_len")
        return found

    def structure(self) -> PreTrainedModel:
        return heads.structure(self.base_model, self.tasks)

    def build(self) -> PreTrainedModel:
        return heads.load(self.base_model, self.tasks, self.config.dtype, self.load_in_4bit)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], protocol: str) -> list[dict]:
        if protocol == COSINE:
            return self.in_halves(self._cosines, questions, protocol)

        def classified(part: list[int]) -> list[dict]:
            return self.in_halves(self._classified, [questions[index] for index in part], protocol)

        return by_length([question.prompt_ids for question in questions], classified)

    def _batch(self, rows: Sequence[dict], task_id: int) -> dict[str, torch.Tensor]:
        batch = self.collator([row | {"task_id": task_id} for row in rows])
        return {key: value.to(self.model.device) for key, value in batch.items() if key != "loss_weight"}

    def _classified(self, questions: list[Question]) -> list[dict]:
        task = questions[0].task
        logits = self.model(**self._batch([question.row for question in questions], task.id)).logits
        outputs = logits[:, : task.outputs].double().tolist()
        lines = []
        for question, scores in zip(questions, outputs, strict=True):
            best = evaluation.likeliest(question, scores)
            if task.is_regression:
                lines.append(question.line(task.unscaled(scores[0]), None))
            else:
                lines.append(question.line(task.labels[best], scores))
        return lines

    def _cosines(self, questions: list[Question]) -> list[dict]:
        """Answer with the cosine of the texts' mean-pooled embeddings (Reimers and Gurevych, arXiv 1908.10084)."""
        texts = [getattr(question.example, field) for field in ("text", "text_b") for question in questions]
        values = F.cosine_similarity(*self._embeddings(texts).chunk(2)).double().tolist()
        return [
            question.line(question.task.unscaled(value), None)
            for question, value in zip(questions, values, strict=True)
        ]

    def _embeddings(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the mean-pooled embeddings of texts, (B, d)."""
        rows = self.encoder.encode([Example(text, None, None, 0, 0) for text in texts])

        def embedded(part: list[int]) -> torch.Tensor:
            batch = self._batch([rows[index] for index in part], 0)
            batch.pop("task_ids")
            return self.model.base_model(**batch).last_hidden_state.mean(dim=1)

        return torch.stack(by_length([row["input_ids"] for row in rows], embedded))

    def to_predict(self, values: Sequence[object], source: str, task: str | None) -> dict[str, list[Question]]:
        if not self.adapter:
            raise UserError(NO_HEAD)
        return {CLASSIFY: self.questions(evaluation.inputs(parse_example, values, source, self.tasks, task), source)}

    def task_result(self, task: Task, lines: Sequence[dict]) -> TaskResult:
        return measure(task.metric_name, lines, task.labels)


def run(config: EvalConfig) -> dict[str, Results]:
    """Evaluate as ``config`` says, see ``evaluation.evaluate``."""
    evaluator = Evaluator(config)
    chosen = [task.name for task in evaluator.tasks if task.is_regression and not config.checkpoint]
    if not (chosen or config.checkpoint or config.tasks):
        way_out = "answers only regression tasks on pairs, and no task is one; pass --checkpoint"
        raise UserError(f"without a checkpoint, a base model {way_out}")
    asked = load_questions(evaluator, load_examples, chosen)
    for question in asked.questions if not config.checkpoint else ():
        if not question.task.is_regression or question.example.text_b is None:
            raise UserError(
                f"without a checkpoint, the base model {evaluator.base_model.name!r} answers only regression tasks on "
                f"pairs, and {question.task.name} is not one; leave it out of --tasks, or pass --checkpoint"
            )
    return evaluation.evaluate(evaluator, asked)


# ---- prediction ----


class Predictor(evaluation.Predictor):
    """Answers examples in Python; the model is loaded on the first call.

        predictor = Predictor("output/glue")
        predictor.predict([{"text": "A fine film."}], task="sst2")
        # [{"index": 0, "task": "sst2", "answer": "positive", "scores": {...}, "probabilities": {...}}]

    Its arguments are those of ``evaluation.Predictor``.
    """

    evaluator_class, config_class, field = Evaluator, AnswerConfig, "text"


def predict(config: PredictConfig) -> None:
    """Answer every example of the input file that has no answer yet, then write the complete output file."""
    evaluation.predict(Evaluator(config), CLASSIFY)
