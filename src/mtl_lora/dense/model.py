"""The complete model of dense prediction: a backbone with streams and a decoder per task, and which parts train."""

import dataclasses
import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from mtl_lora.adapter.checkpoint import Provenance
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import layer_class
from mtl_lora.adapter.saved import unwrap
from mtl_lora.base_model import BaseModel, enable_checkpointing
from mtl_lora.dense.backbones import MERGING, TARGETS, TASK_TARGETS, TRAINED, resized, with_streams
from mtl_lora.dense.tasks import TaskSet
from mtl_lora.errors import UserError

WIDTHS = (18, 36, 72, 144)  # channels of a decoder's four maps after their projections
HIDDEN = 4 * sum(WIDTHS)


class Decoder(nn.Module):
    """A task's decoder (the head of HRNet, arXiv 1908.07919): the backbone's four maps become one of the image's size.

    Projects each map, resizes all to the size of the first, and applies a hidden layer with batch norm and outputs.

    It computes in its own dtype, float32 or float64, whatever the backbone's dtype.
    """

    def __init__(self, channels: list[int], outputs: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(k, d, 1, bias=False) for k, d in zip(channels, WIDTHS, strict=True))
        self.hidden, self.norm = nn.Conv2d(sum(WIDTHS), HIDDEN, 1), nn.BatchNorm2d(HIDDEN, momentum=0.1)
        self.output = nn.Conv2d(HIDDEN, outputs, 1)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Return the output (B, outputs, *size) of four maps (B, C, h, w)."""
        dtype = self.output.weight.dtype
        found = [project(each.to(dtype)) for project, each in zip(self.projections, maps, strict=True)]
        joined = torch.cat([found[0], *(resized(each, found[0].shape[-2:]) for each in found[1:])], dim=1)
        return resized(self.output(F.relu(self.norm(self.hidden(joined)))), size)


class Decoders(nn.ModuleList):
    """The tasks' decoders, in id order."""

    merge_instead = "the checkpoint itself"

    def __init__(self, channels: list[int], tasks: TaskSet):
        super().__init__(Decoder(channels, task.outputs) for task in tasks)
        self.task_set = tasks

    def base_provenance(self) -> dict:
        """Return what a checkpoint must record about a model with these decoders, besides the model's name."""
        return {"system": "dense", "task_set": self.task_set.to_json()}


class DenseModel(nn.Module):
    """Predicts a map (B, outputs, H, W) per task name from images (B, 3, H, W).

    A task's decoder reads the task's own stream if the backbone's adapter makes streams, otherwise the shared one.
    """

    main_input_name = "pixel_values"

    def __init__(self, backbone: PreTrainedModel, tasks: TaskSet):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        # The dtype of the activations, kept because trained weights become float32 later.
        self.backbone_dtype = backbone.dtype
        dtype = torch.float64 if backbone.dtype == torch.float64 else torch.float32
        with backbone.device:
            self.decoders = Decoders(backbone.channels, tasks).to(dtype)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        size, patch = pixel_values.shape[-2:], self.backbone.patch
        if any(side % patch for side in size):
            raise UserError(
                f"height and width of an image must be multiples of {patch} for this model, not {tuple(size)}"
            )
        stages = self.backbone(pixel_values.to(self.backbone_dtype))
        found = {}
        for task, decoder in zip(self.decoders.task_set, self.decoders, strict=True):
            maps = [stage.shared if stage.tasks is None else stage.tasks[task.id] for stage in stages]
            found[task.name] = decoder(maps, size)
        if self.training and stages[-1].tasks is not None:
            # No decoder reads the last shared stream, so weights that only produce it would get no gradient, and DDP
            # would wait for one. Empty sums give them a zero gradient without using the stream, which may overflow.
            last = self.backbone.get_submodule(f"{self.backbone.last_blocks[-1]}.{TASK_TARGETS[-1]}")
            found[task.name] = found[task.name] + sum(weight[:0].sum() for weight in last.adapter_parameters().values())
        return found

    def activation_checkpointing_enable(self, options: dict | None = None) -> None:
        """Make the backbone recompute its blocks in the backward pass."""
        enable_checkpointing(self.backbone)


def load(base: BaseModel, tasks: TaskSet, dtype: str = "auto", load_in_4bit: bool = False, **options) -> DenseModel:
    """Return the model with the backbone's weights and freshly initialised decoders."""
    if load_in_4bit:
        raise UserError("--load_in_4bit is for language models; leave it out")
    return DenseModel(with_streams(base.load(dtype, **options)), tasks)


def structure(base: BaseModel, tasks: TaskSet, image_size: int = 0) -> DenseModel:
    """Return what ``load`` returns, on the meta device: every module and shape, but no memory.

    Raises ``UserError`` for an ``image_size`` that the model cannot take.
    """
    found = DenseModel(with_streams(base.structure()), tasks)
    if image_size % found.backbone.patch:
        raise UserError(f"--image_size must be a multiple of {found.backbone.patch} for this model, not {image_size}")
    return found


def base_of(base: BaseModel, provenance: Provenance, **options) -> DenseModel:
    """Return the model to which a checkpoint's adapter is added; options: as for ``load``."""
    tasks = TaskSet.from_json(provenance.task_set, "the checkpoint's task set")
    return load(base, tasks, **options)


def check_base(model: nn.Module, provenance: Provenance, folder: object) -> None:
    """Raise ``UserError`` for a model without decoders for a checkpoint's tasks, before its adapter is added."""
    tasks = TaskSet.from_json(provenance.task_set, f"the task set of {folder}")
    found = getattr(getattr(unwrap(model), "decoders", None), "task_set", None)
    if found is None or found.answers_sha256 != tasks.answers_sha256:
        raise UserError(
            f"{folder} has a decoder for each of its tasks ({', '.join(tasks.names):.200}), and this "
            f"{type(unwrap(model)).__name__} has no such decoders; load both with mtl_lora.load(folder)"
        )


def placed(adapter: AdapterConfig, model: DenseModel, downsampler: bool = False, extras: bool = True) -> AdapterConfig:
    """Return the adapter placed as in MTLoRA (arXiv 2403.20320), for any method.

    In every block the adapter is on the fused query, key and value, the output projection and both feed-forward layers.
    If the method makes streams, the last three are task-specific in the last block of each stage. The decoders are
    fully trained and, with ``extras``, so are patch embedding, norms, relative positions and the reduction of patch
    merging. downsampler: the reduction gets an adapter instead (MTLoRA+). The method ``none`` trains the decoders and
    its own ``modules_to_save``. Raises ``UserError`` for a method that needs the task of each row, and for targets that
    interrupt a stream.
    """
    method, family, saved = layer_class(adapter.method), model.config.model_type, ["decoders", *adapter.modules_to_save]
    merges = any(name.endswith(f".{MERGING}") for name, _ in model.named_modules())
    if downsampler and not merges:
        raise UserError(f"downsampler adapts patch merging, which {family} does not have; leave it out")
    if not method.adapts:
        return dataclasses.replace(adapter, modules_to_save=saved)
    if method.needs_task_ids and not method.makes_streams:
        raise UserError(
            f"adapter_name {adapter.method} needs one task per image, but here every image has all tasks; choose "
            "another method"
        )
    targets = TARGETS if adapter.target_modules == "all-linear" else adapter.target_modules
    if not (isinstance(targets, list) and all(re.fullmatch(r"[\w.]+", target) for target in targets)):
        raise UserError("pass names of layers, not a regular expression")
    if downsampler:
        targets = [*targets, *({MERGING} - {*targets})]
    if extras:
        whole = [] if downsampler or not merges else [f"downsample.{MERGING}"]
        saved = [saved[0], *TRAINED[family], *whole, *saved[1:]]
    tasks = []
    if method.makes_streams:
        tasks = [f"{block}.{name}" for block in model.backbone.last_blocks for name in TASK_TARGETS]
        if missing := {name.rpartition(".")[2] for name in TASK_TARGETS} - {*targets}:
            raise UserError(f"{', '.join(sorted(missing))} must be among them, or a task's stream would end there")
    saved = list(dict.fromkeys(saved))
    return dataclasses.replace(adapter, target_modules=targets, task_modules=tasks, modules_to_save=saved)
