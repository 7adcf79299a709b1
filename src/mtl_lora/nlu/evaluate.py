"""``mtl-lora evaluate`` and ``predict`` of encoders: a trained head's answers, or the cosine of two texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from mtl_lora import evaluation, files
from mtl_lora.errors import UserError
from mtl_lora.evaluation import claimed_folders, load_questions
from mtl_lora.nlu import model as heads
from mtl_lora.nlu.config import CLASSIFY, COSINE, AnswerConfig, EvalConfig, PredictConfig, TrainConfig
from mtl_lora.nlu.data import Collator, Encoder
from mtl_lora.nlu.examples import Example, load_examples, parse_example
from mtl_lora.nlu.tasks import GLUE, Task, TaskSet
from mtl_lora.results import Comparability, Results, TaskResult, measure


class Question(evaluation.Question):
    """One example, ready for a model. prompt_ids: of its text or pair; row: of ``Encoder.encode``."""

    def line(self, parsed: str | float, scores: list[float] | None) -> dict:
        """The question's line in the predictions: its target as ``answer``, and what was answered."""
        line = {"task": self.task.name, "index": self.example.index, "answer": self.example.label, "parsed": parsed}
        if scores is not None:
            line |= {"correct": parsed == self.example.label, "scores": scores}
        line["prompt_sha256"] = self.prompt_sha256
        return line | ({"kind": self.example.extra["kind"]} if "kind" in self.example.extra else {})

    def answered_by(self, line: Mapping | None) -> bool:
        """Whether a line, perhaps of an earlier version of the test set, answers this very text and target."""
        expected = self.prompt_sha256, self.example.label
        known = line is not None and isinstance(line.get("parsed"), float if self.task.is_regression else str)
        return known and (line.get("prompt_sha256"), line.get("answer")) == expected

    def extract_again(self, line: dict) -> dict:
        """The line: a head's answer needs no rules, but the example may now be of another group."""
        return self.line(line["parsed"], line.get("scores"))


class Evaluator(evaluation.Evaluator):
    """Who answers: settled before a model is loaded; raises ``UserError`` for whatever cannot be."""

    system, version = "nlu", 1
    token_budget, gpu_token_budget = 4096, 131072
    comparability = Comparability(["mode", "base_fingerprint", "cutoff_len"])

    def __init__(self, config: AnswerConfig):
        self.config = config
        origin = self.read_checkpoint()
        self.refuse_flags({"tasks_file": origin.task_set, "cutoff_len": origin.cutoff_len})
        self.use_tasks(origin, GLUE)
        self.pairs = origin.pairs or {}
        self.cutoff_len = origin.cutoff_len or config.cutoff_len or TrainConfig.cutoff_len
        self.use_base(config.base_model or origin.base_model, origin)
        tokenizer = self.base_model.tokenizer()
        self.encoder, self.collator = Encoder(tokenizer, self.cutoff_len), Collator(tokenizer.pad_token_id)

    def questions(self, examples: Sequence[Example], source: str | Path) -> list[Question]:
        """Questions of examples; raises ``UserError`` naming ``source`` and a pair where the training had none, or the
        other way round: its score would look like any other."""
        for example in examples:
            task, is_pair = self.tasks[example.task_id].name, example.text_b is not None
            if self.pairs.get(task, is_pair) != is_pair:
                has, had = ("a", "none") if is_pair else ("no", "one")
                found = f"{source}, example {example.index} has {has} 'text_b'"
                way_out = "leave it out" if is_pair else 'add it, as "text_b": "" in JSON where it is empty'
                raise UserError(f"{found}, and in training every example of {task} had {had}; {way_out}")
        rows = self.encoder.encode(examples)
        found = []
        for example, row in zip(examples, rows, strict=True):
            digest = files.sha256_of(str([row["input_ids"], row.get("token_type_ids")]).encode())
            found.append(Question(self.tasks[example.task_id], example, row["input_ids"], digest, row))
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        self.base_model.check_positions(longest, "a text; take a shorter --cutoff_len")
        return found

    def structure(self) -> PreTrainedModel:
        return heads.structure(self.base_model, self.tasks)

    def build(self) -> PreTrainedModel:
        return heads.load(self.base_model, self.tasks, self.config.dtype, self.load_in_4bit)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], protocol: str) -> list[dict]:
        return self.in_halves(self._cosines if protocol == COSINE else self._classified, questions, protocol)

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
        """The cosine of the mean-pooled embeddings of the two texts (Reimers and Gurevych, arXiv 1908.10084)."""
        sides = []
        for field in ("text", "text_b"):
            texts = [Example(getattr(question.example, field), None, None, 0, 0) for question in questions]
            batch = self._batch(self.encoder.encode(texts), 0)
            mask = batch["attention_mask"][..., None]
            batch.pop("task_ids")
            hidden = self.model.base_model(**batch).last_hidden_state
            sides.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        values = F.cosine_similarity(*sides).double().tolist()
        return [
            question.line(question.task.unscaled(value), None)
            for question, value in zip(questions, values, strict=True)
        ]

    def to_predict(self, values: Sequence[object], source: str, task: str | None) -> dict[str, list[Question]]:
        if not self.adapter:
            raise UserError("a prediction needs a trained head; pass --checkpoint DIR")
        return {CLASSIFY: self.questions(evaluation.inputs(parse_example, values, source, self.tasks, task), source)}

    def task_result(self, task: Task, lines: Sequence[dict]) -> TaskResult:
        return measure(task.metric_name, lines, task.labels)


def run(config: EvalConfig) -> dict[str, Results]:
    """Answer every question that has no answer yet; writes and returns the results.

    Empty with ``check``, and on every process but the first.
    """
    evaluator = Evaluator(config)
    asked = load_questions(
        config.data_dir,
        evaluator.tasks,
        config.tasks or ([] if config.checkpoint else _with_cosine(evaluator.tasks)),
        load_examples,
        evaluator.questions,
        config.limit,
        config.made_by if evaluator.tasks.names == GLUE.names else "",
    )
    for question in asked.questions if not config.checkpoint else ():
        if not question.task.is_regression or question.example.text_b is None:
            raise UserError(
                f"the base model {evaluator.base_model.name!r} alone answers regressions of pairs, which "
                f"{question.task.name} is not; leave it out of --tasks, or pass --checkpoint"
            )
    questions = dict.fromkeys(config.protocols, asked.questions)
    with claimed_folders(config, config.protocols):
        return evaluation.evaluate(evaluator, asked, questions, config.protocols)


def _with_cosine(tasks: TaskSet) -> list[str]:
    names = [task.name for task in tasks if task.is_regression]
    if not names:
        raise UserError("a base model alone answers regressions of pairs, and there is no such task; pass --checkpoint")
    return names


# ---- prediction ----


class Predictor(evaluation.Predictor):
    """Answers examples in Python; the model is loaded with the first of them.

        predictor = Predictor("output/glue")
        predictor.predict([{"text": "A fine film."}], task="sst2")
        # [{"index": 0, "task": "sst2", "answer": "positive", "scores": {...}, "probabilities": {...}}]

    checkpoint: folder of a training, which names its base model and tasks. flags: any other flag of ``mtl-lora
    predict``, by name. Raises ``UserError`` as the command does.
    """

    evaluator_class, config_class, field = Evaluator, AnswerConfig, "text"


def predict(config: PredictConfig) -> None:
    """Answer every example of the input file that has no answer yet, then write the output file whole."""
    evaluation.predict(Evaluator(config), CLASSIFY)
