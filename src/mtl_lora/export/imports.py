"""What both imports share: tensors checked by name and shape, and a checkpoint written of weights on no model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.export.folders import whole_folder
from mtl_lora.export.structure import Sizes, base_structure, check_layers, targets_for
from mtl_lora.language.tasks import TaskSet

State = dict[str, torch.Tensor]


def check_shape(path: Path, name: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ``UserError`` unless the shape is ``expected``, where a letter stands for any size from 1."""
    fits = len(tensor.shape) == len(expected) and all(
        size == wanted or (isinstance(wanted, str) and size >= 1)
        for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        shape = ", ".join(map(str, expected))
        raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, where ({shape}) was expected")


def check_whole(path: Path, tensors: State, weights: tuple[str, ...]) -> None:
    """Raise ``UserError`` naming a tensor that a module lacks."""
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    for name in {key.rpartition(".")[0]: None for key in tensors}:
        for weight in weights:
            if f"{name}.{weight}" not in tensors:
                raise UserError(f"{path} lacks {name}.{weight}")


def find_targets(base_model: str, sizes: Sizes, source: str, trust_remote_code: bool) -> list[str] | str:
    """``target_modules`` for the layers in ``sizes``, compared with the base model's where it can be had."""
    base = base_structure(base_model, trust_remote_code)
    if base is not None:
        check_layers(base, sizes, source)
    return targets_for(sizes, base)


def write_checkpoint(
    output: str | Path,
    adapter: AdapterConfig,
    state: State,
    base_model: str,
    template: str,
    tasks: TaskSet,
    inputs: Iterable[str | Path],
    overwrite: bool,
) -> Path:
    """Write ``state`` as the checkpoint of an ``adapter`` that was trained on ``base_model`` with ``template``."""
    origin = checkpoint.Origin(
        base_model=base_model,
        base_fingerprint=BaseModel(base_model).local_fingerprint(),
        prompt_template=template,
        task_set=tasks.to_json(),
    )
    holder = nn.Module()
    holder.mtl_lora_config = adapter
    names = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME)
    with whole_folder(output, names, overwrite, inputs) as folder:
        checkpoint.save(holder, folder, origin, state)
    return Path(output)
