"""An encoder with a head per task: one forward takes rows of different tasks, each through the head of its task.

A head is what the model's own ``ForSequenceClassification`` class adds to the encoder, that is every module outside
its ``base_model_prefix`` (BERT: one linear layer after the encoder's frozen pooler; RoBERTa: a dense layer and a linear
layer). It has one output per label of the task, or a single output for a regression.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mtl_lora.adapter import routing
from mtl_lora.adapter.checkpoint import Provenance
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.inject import injection_of, merge
from mtl_lora.adapter.saved import unwrap
from mtl_lora.adapter.targets import find_targets, of_relative_positions, targets_for
from mtl_lora.base_model import BaseModel, at_least_float32
from mtl_lora.errors import UserError
from mtl_lora.nlu.tasks import Task, TaskSet

# Model type -> why its classifier cannot be trained here.
_UNUSABLE = {
    "mra": "attends to nothing without its own CUDA kernel",
    "reformer": "reads padding and hashes at random",
    "tapas": "needs the columns and rows of a table's cells",
}


class TaskHeads(nn.ModuleList):
    """Replaces one module of a head by one module per task; each row gets the output of its task's module.

    forward: inputs (B, ...) to outputs (B, ..., C), where C is the largest number of outputs of any task. The outputs
    that a task lacks are the dtype's lowest number, so softmax ignores them (minus infinity times a mask of zeros would
    be NaN). Every module runs on every row, because they are small: a task without rows gets a zero gradient, and the
    GPU need not be asked which rows belong to which task.
    """

    is_head = False  # read by ``routing``: this module sees every row of the batch
    merge_instead = "mtl_lora.nlu.model.single_task(model, task)"

    def __init__(self, heads: list[nn.Module], tasks: TaskSet):
        super().__init__(heads)
        self.tasks, self.task_set = tasks.names, tasks

    def base_provenance(self) -> dict:
        """Return what a checkpoint must record about a model with these heads, besides the model's name."""
        return {"system": "nlu", "task_set": self.task_set.to_json()}

    def forward(self, x: torch.Tensor, *arguments, **options) -> torch.Tensor:
        outputs = [head(x, *arguments, **options) for head in self]
        most = max(output.shape[-1] for output in outputs)
        lowest = torch.finfo(outputs[0].dtype).min
        outputs = [F.pad(output, (0, most - output.shape[-1]), value=lowest) for output in outputs]
        ids = routing.blocks_for(x, self).ids
        index = ids.view(1, -1, *[1] * (outputs[0].dim() - 1)).expand(1, *outputs[0].shape)
        return torch.stack(outputs).gather(0, index)[0]


def head_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the model's modules with weights that follow the encoder.

    Raises ``UserError`` if there are none, for an unusable model, for a head that reads the last position, and for an
    encoder-decoder, which classifies at the last end-of-sequence token and needs the same number of them in every row.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder; pass a --base_model that is an encoder only")
    if model.config.model_type in _UNUSABLE:
        raise UserError(f"{type(model).__name__} {_UNUSABLE[model.config.model_type]}; pass another --base_model")
    if getattr(model.config, "summary_type", None) == "last":  # XLNet: whatever is there, even padding
        about = f"the head of {type(model).__name__} reads the last position, where rows have padding"
        raise UserError(f"{about}; pass another --base_model")
    names = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    if not names or model.base_model is model:
        raise UserError(f"{type(model).__name__} has no separate head after an encoder; pass another --base_model")
    return names


def with_heads(model: PreTrainedModel, base: BaseModel, tasks: TaskSet) -> PreTrainedModel:
    """Replace the head of ``model`` by a freshly initialised head per task, in place, and return the model.

    Torch's global seed decides the initial weights. On the meta device the heads have shapes only.
    """
    device, dtype = model.device, model.dtype
    heads = {name: [] for name in head_names(model)}
    shapes: dict[int, PreTrainedModel] = {}  # a model on the meta device by number of outputs
    for outputs in {task.outputs for task in tasks}:
        config = copy.deepcopy(model.config)
        config.num_labels = outputs
        with torch.device("meta"):
            shapes[outputs] = type(model)(config)  # from_config would partition the model under ZeRO-3
    for task in tasks:
        for name, modules in heads.items():
            head = copy.deepcopy(getattr(shapes[task.outputs], name))
            if device.type != "meta":
                head = head.to_empty(device=device)
                for module in head.modules():
                    model._init_weights(module)
            modules.append(head.to(dtype))
    for name, modules in heads.items():
        setattr(model, name, TaskHeads(modules, tasks))
    model.config.num_labels = max(task.outputs for task in tasks)
    of_text = model.config.get_text_config()  # in a model of text and more, decoders read the id there
    try:  # decoders find a row's last token by the id that pads batches, which may differ from their configuration's
        model.config.pad_token_id = of_text.pad_token_id = base.tokenizer().pad_token_id
    except UserError:  # the folder has weights but no tokenizer
        if getattr(of_text, "pad_token_id", None) is None:
            raise
    return model


def load(base: BaseModel, tasks: TaskSet, dtype: str = "auto", load_in_4bit: bool = False, **options):
    """Return the encoder with its weights and a freshly initialised head per task."""
    return with_heads(base.load(dtype, load_in_4bit, num_labels=2, **options), base, tasks)


def base_of(base: BaseModel, provenance: Provenance, **options) -> PreTrainedModel:
    """Return the encoder with heads to which a checkpoint's adapter is added; options: as for ``load``."""
    tasks = TaskSet.from_json(provenance.task_set, "the checkpoint's task set")
    return load(base, tasks, **options)


def structure(base: BaseModel, tasks: TaskSet) -> PreTrainedModel:
    """Return what ``load`` returns, on the meta device: every module and shape, but no memory."""
    return with_heads(base.structure(num_labels=2), base, tasks)


def in_encoder(adapter: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
    """Return the adapter configured for layers of the encoder, with the heads among ``modules_to_save``.

    ``all-linear`` leaves out the pooler, which belongs to the head although it is part of the encoder, and so stays
    frozen, and ESM's head for contacts, which no classifier calls. For every method it also leaves out the layers that
    project DeBERTa's relative positions, which belong to no row and so to no task. Raises ``UserError`` as
    ``find_targets`` does.
    """
    saved = list(dict.fromkeys([*head_names(model), *adapter.modules_to_save]))
    adapter = dataclasses.replace(adapter, modules_to_save=saved)
    if adapter.target_modules != "all-linear":
        find_targets(model, adapter)
        return adapter
    named = model.base_model.named_modules()
    within = {module for name, module in named if {"pooler", "contact_head"}.isdisjoint(name.split("."))}
    targets = find_targets(model, adapter, within - of_relative_positions(model.base_model))
    return dataclasses.replace(adapter, target_modules=targets_for(targets, model))


# ---- a plain model for one task ----


def task_heads(model: nn.Module) -> dict[str, TaskHeads]:
    """Return the heads of a model by the name of the module that they replace."""
    return {name: module for name, module in unwrap(model).named_children() if isinstance(module, TaskHeads)}


def check_base(model: nn.Module, provenance: Provenance, folder: object) -> None:
    """Raise ``UserError`` for a model without heads for a checkpoint's tasks, before its adapter is added."""
    tasks = TaskSet.from_json(provenance.task_set, f"the task set of {folder}")
    heads = task_heads(model).values()
    if not heads or any(head.task_set.answers_sha256 != tasks.answers_sha256 for head in heads):
        raise UserError(
            f"{folder} has a head for each of its tasks ({', '.join(tasks.names):.200}), and this "
            f"{type(unwrap(model)).__name__} has no such heads; load both with mtl_lora.load(folder), or write a plain "
            "model for one task with `mtl-lora export merge`"
        )


@torch.no_grad()
def single_task(model: PreTrainedModel, task: str | int) -> PreTrainedModel:
    """Turn an encoder with a head per task into a plain classifier for one task, in place, and return the model.

    The adapter, if the model has one, is merged, the task's head replaces the heads of all tasks, and the configuration
    gets the task's labels. The logit of a regression is then in the task's range, not scaled to 0 to 1. Raises
    ``UserError`` as ``mtl_lora.merge`` and ``unscale`` do, and for a model without heads; the model is then unchanged.
    """
    root, heads = unwrap(model), task_heads(model)
    if not heads:
        raise UserError(f"{type(root).__name__} has no head per task to choose from; use mtl_lora.merge(model, task)")
    chosen = next(iter(heads.values())).task_set[task]
    own = {name: module[chosen.id] for name, module in heads.items()}
    before = {weight: dict(weight._parameters) for head in own.values() for weight in head.modules()}
    try:
        unscale(list(own.values()), chosen)  # before ``merge`` rounds to the base model's dtype
        for name, head in own.items():
            setattr(root, name, head)
        if injection_of(root):
            merge(root, chosen.name if root.mtl_lora_config.tasks else None)
    except UserError:
        for name, module in heads.items():
            setattr(root, name, module)
        for module, parameters in before.items():
            module._parameters.update(parameters)
        raise
    describe(root.config, chosen)
    if hasattr(root, "num_labels"):
        root.num_labels = chosen.outputs
    return model


def describe(config: PreTrainedConfig, task: Task) -> None:
    """Write a task's labels, or that it is a regression, into the transformers configuration."""
    config.num_labels = task.outputs
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}


def unscale(heads: list[nn.Module], task: Task) -> None:
    """Rescale the last linear layer of a regression head so that its output is in the task's range, not in 0 to 1.

    heads: the modules of the head in the model's order; the head of a classification task is left unchanged. Raises
    ``UserError`` if there is no such layer, or if it has no bias and the range does not begin at 0.
    """
    if not task.is_regression:
        return
    low, high = task.regression
    linear = [module for head in heads for module in head.modules() if isinstance(module, nn.Linear)][-1:]
    if not linear or linear[0].out_features != 1 or (low and linear[0].bias is None):
        lacks = "and a bias " if linear and linear[0].out_features == 1 else ""
        raise UserError(
            f"the head of {task.name} must end in a linear layer with one output {lacks}to be rescaled to its range "
            f"[{low:g}, {high:g}]; use the checkpoint itself"
        )
    for name, weight in linear[0].named_parameters():
        value = weight.detach() * (high - low) + (low if name == "bias" else 0)
        setattr(linear[0], name, nn.Parameter(value, requires_grad=weight.requires_grad))


# ---- losses ----


class TaskLosses:
    """Computes ``(model, batch) -> losses (N,), weights (N,), task ids (N,)`` for N rows, each of weight one.

    The loss is the cross-entropy over the task's own labels, or the squared error of a target scaled to 0 to 1.
    """

    def __init__(self, tasks: TaskSet):
        self.is_regression = torch.tensor([task.is_regression for task in tasks])

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        task_ids, targets = batch["task_ids"], batch["targets"]
        self.is_regression = self.is_regression.to(task_ids.device)
        names = ("input_ids", "attention_mask", "token_type_ids")
        logits = model(**{name: batch[name] for name in names if name in batch}, task_ids=task_ids).logits
        logits = at_least_float32(logits)
        numbers = self.is_regression[task_ids]
        # A regression has one output, whose cross-entropy with class 0 is zero, and so is the gradient.
        classes = torch.where(numbers, 0, targets).long()
        entropy = F.cross_entropy(logits, classes, reduction="none")
        squares = (logits[:, 0] - targets.to(logits.dtype)) ** 2
        losses = torch.where(numbers, squares, entropy)
        return losses, torch.ones_like(losses), task_ids
