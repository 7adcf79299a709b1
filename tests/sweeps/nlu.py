"""Encoders with a head per task: losses, gradients, answers, files and exports against one text or pair alone."""

import copy
import inspect
from pathlib import Path

import peft
import torch
from sweeps.checks import NAMES, Checks, apart, largest
from sweeps.tiny import save_tokenizer
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from mtl_lora import AdapterConfig, route
from mtl_lora.base_model import choose_dtype
from mtl_lora.export.merge import export_merged
from mtl_lora.export.peft import export_peft
from mtl_lora.nlu import model as encoder
from mtl_lora.nlu.config import CLASSIFY, EvalConfig
from mtl_lora.nlu.data import Collator, target_of
from mtl_lora.nlu.evaluate import Evaluator
from mtl_lora.nlu.examples import Example
from mtl_lora.nlu.tasks import Task, TaskSet

# A range from 0, because the heads of decoders have no bias, which another range would need in a plain model. The last
# task has no rows.
TASKS = TaskSet(
    (
        Task(NAMES[0], 0, labels=("low", "high")),
        Task(NAMES[1], 1, regression=(0.0, 5.0)),
        Task(NAMES[2], 2, labels=("owl", "crow", "wren", "lark")),
        Task(NAMES[3], 3, labels=("short", "long")),
    )
)
ASKED = TASKS.names[:3]
# Of each example the task, the words of its text and of its second text, and its label. (Two of three words make rows
# of five tokens, which a convolution or a pooling may need.)
EXAMPLES = [(0, 3, 0, "high"), (2, 9, 6, "lark"), (1, 5, 2, 1.5), (2, 4, 14, "owl"), (0, 14, 0, "low"), (1, 1, 11, 4.0)]
EXAMPLES += [(0, 3, 0, "low"), (2, 4, 14, "lark"), (1, 5, 2, 3.0)]  # as long as others, with which they are answered


def example(index: int) -> Example:
    task, first, second, label = EXAMPLES[index]
    draws = torch.Generator().manual_seed(97 + index)
    words = [f"w{number}" for number in torch.randint(0, 100, (first + second,), generator=draws).tolist()]
    return Example(" ".join(words[:first]), " ".join(words[first:]) or None, label, task, index)


def outputs_of(model: torch.nn.Module, row: dict) -> torch.Tensor:
    """The outputs of a row alone, (C,)."""
    names = [name for name in ("input_ids", "token_type_ids") if row.get(name)]
    return model(**{name: torch.tensor([row[name]]) for name in names}).logits[0]


def loss_of(outputs: torch.Tensor, task: Task, target: float) -> torch.Tensor:
    return (outputs[0] - target) ** 2 if task.is_regression else -outputs.log_softmax(-1)[int(target)]


class EncoderChecks(Checks):
    """The reference is one text or pair alone: no padding, no other task."""

    system = "nlu"
    types = tuple(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    exports = "peft", "merged_export", "merge", "unload"

    def save_tokenizer(self, model: torch.nn.Module) -> None:
        known = inspect.signature(type(model).forward).parameters
        inputs = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in known]
        marks = {"cls_token": "<cls>", "sep_token": "<sep>"}
        rows = "<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1"
        save_tokenizer(self.base, marks=marks, rows=rows, model_input_names=inputs)

    def read_structure(self) -> torch.nn.Module:
        return encoder.structure(self.handle(), TASKS)

    def fresh(self) -> torch.nn.Module:
        torch.manual_seed(2)  # of the heads
        return encoder.load(self.handle(), TASKS, self.dtype).eval()

    def place(self, adapter: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
        return encoder.in_encoder(adapter, self.structure), []

    def may_adapt(self, name: str) -> bool:
        return name.startswith(f"{self.structure.base_model_prefix}.") and "pooler" not in name.split(".")

    def forward(self, model: torch.nn.Module) -> None:
        self.outputs(model, {"input_ids": [5, 6, 7, 8, 9, 10], "task_id": 0})

    def provenance(self) -> dict:
        return {"cutoff_len": 64, "task_set": TASKS.to_json()}

    def prepare(self) -> None:
        self.made = Evaluator(EvalConfig(checkpoint=str(self.checkpoint), dtype=self.dtype))
        self.examples = [example(index) for index in range(len(EXAMPLES))]
        encoded = zip(self.examples, self.made.encoder.encode(self.examples), strict=True)
        self.rows = [row | {"task_id": one.task_id, "target": target_of(one, TASKS)} for one, row in encoded]

    def outputs(self, model: torch.nn.Module, row: dict) -> torch.Tensor:
        """The outputs of a row's task, (C,)."""
        task = TASKS[row["task_id"]]
        with route.use(torch.tensor([task.id])):
            return outputs_of(model, row)[: task.outputs]

    def compare(self) -> None:
        self.attempt("losses", self.losses)
        self.model.eval()
        self.attempt("saved", self.saved)
        self.attempt("answers", self.answers)

    @torch.no_grad()
    def reference(self) -> dict:
        """How much outputs depend on the first word."""
        self.model.eval()
        row = self.rows[1]
        one = self.outputs(self.model, row)
        if not one.isfinite().all():
            raise ValueError("outputs are not finite")
        first, second, *others = row["input_ids"]
        return {"first_token": apart(self.outputs(self.model, row | {"input_ids": [first, second ^ 1, *others]}), one)}

    def losses(self) -> dict:
        """Losses and gradients of a padded batch of all tasks against those of rows alone."""
        model, collate, losses = self.model.train(), Collator(0), encoder.TaskLosses(TASKS)
        alone = [loss_of(self.outputs(model, row), TASKS[row["task_id"]], row["target"]) for row in self.rows]
        idle = [f"{name}.{len(ASKED)}." for name in encoder.task_heads(model)]  # the heads of the task without rows
        return self.compare_losses(torch.stack(alone), {"padded": lambda: losses(model, collate(self.rows))[0]}, idle)

    @torch.no_grad()
    def answers(self) -> float:
        """How far the scores and numbers of an evaluation in batches are from those of rows alone."""
        self.made.load()
        found = []
        for task in [TASKS[name] for name in ASKED]:
            asked = self.made.questions([one for one in self.examples if one.task_id == task.id], "here")
            for question, line in zip(asked, self.made.answer(asked, CLASSIFY), strict=True):
                own = self.outputs(self.model, question.row | {"task_id": task.id})
                found.append(apart(line.get("scores") or line["parsed"], own if task.labels else task.unscaled(own[0])))
        return largest(found)

    @torch.no_grad()
    def from_routed(self, model: torch.nn.Module, task: Task) -> float:
        """The difference of a plain model of a task, which gives numbers in its range, from the routed one."""
        found = []
        for row, one in zip(self.rows, self.routed, strict=True):
            if row["task_id"] == task.id:
                found.append(apart(outputs_of(model.eval(), row), one if task.labels else task.unscaled(one)))
        return largest(found)

    def plain(self, folder: Path, **options) -> torch.nn.Module:
        """transformers' own model."""
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=choose_dtype(self.dtype), **options)

    def peft(self) -> float:
        found, folders = [], export_peft(self.checkpoint, self.checkpoint.parent / "peft", ASKED)
        for task, folder in zip(TASKS, folders, strict=False):
            base = self.plain(self.base, num_labels=task.outputs, ignore_mismatched_sizes=True)
            found.append(self.from_routed(peft.PeftModel.from_pretrained(base, folder), task))
        return largest(found)

    def merged_export(self) -> float:
        output, found = self.checkpoint.parent / "merged", []
        for task in [TASKS[name] for name in ASKED]:
            folder = export_merged(self.checkpoint, output / task.name, task.name, dtype=self.dtype)
            found.append(self.from_routed(self.plain(folder), task))
        return largest(found)

    def merge(self) -> float:
        return self.from_routed(encoder.single_task(copy.deepcopy(self.model), NAMES[2]), TASKS[2])
