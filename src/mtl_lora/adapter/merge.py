"""Taking the adapter off a model: for a while, for good, or into the weights for one task."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.inject import adapter_layers, replace_modules
from mtl_lora.adapter.layer import is_conv1d
from mtl_lora.adapter.saved import release_slots, unwrap
from mtl_lora.errors import UserError


@torch.no_grad()
def merge(model: nn.Module, task: str | int | None = None) -> nn.Module:
    """Fold the adapter into plain linear layers for one task, in place, and return the model.

    Modules saved whole keep their trained values. Nothing else of the adapter is left: the model's methods, hooks and
    attributes, and which weights require a gradient, are what they were before ``inject``. Raises ``UserError`` for a
    task the adapter does not have and for a model without an adapter.
    """
    layers = adapter_layers(model)
    if not layers:
        raise UserError("the model carries no adapter to merge")
    trainable = {id(parameter) for parameter in unwrap(model).mtl_lora_injection.trainable}
    merged = {name: layer.merged_weight(task) for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = merged[name].T.contiguous() if is_conv1d(layer.base) else merged[name]
        layer.base.weight = nn.Parameter(weight, requires_grad=id(layer.base.weight) in trainable)
    _take_off(model, keep=True)
    if getattr(getattr(model, "config", None), "_name_or_path", ""):
        model.config._name_or_path = ""  # another base now, which the next adapter must not record as the one before
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place, and return the model: the base model as it was before ``inject``.

    Raises ``UserError`` for a model without an adapter.
    """
    if not adapter_layers(model):
        raise UserError("the model carries no adapter to unload")
    _take_off(model, keep=False)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A block in which the model is the base model: its own layers stand in their places, and its output is the
    base's bit for bit. ``task_ids`` are still taken, and not used."""
    layers = {layer: layer.base for layer in adapter_layers(model).values()}
    slots = unwrap(model).mtl_lora_injection.slots if layers else []
    replace_modules(model, layers)
    trained = [slot.put_original() for slot in slots]
    try:
        yield
    finally:
        for slot, tensor in zip(slots, trained, strict=True):
            slot.put(tensor)
        for layer, base in layers.items():
            layer.training = base.training  # the model may have changed its mode inside the block
        replace_modules(model, {base: layer for layer, base in layers.items()})


def _take_off(model: nn.Module, keep: bool) -> None:
    """Undo everything that ``inject`` did; keep: modules saved whole keep their trained values."""
    root = unwrap(model)
    injection = root.mtl_lora_injection
    replace_modules(root, {layer: layer.base for layer in adapter_layers(root).values()})
    release_slots(injection.slots, root, keep, {id(parameter) for parameter in injection.trainable})
    for parameter in injection.trainable:
        parameter.requires_grad_(True)
    routing.unfollow_generation(root)
    routing.unfollow_checkpointing(injection.checkpointed)
    for handle in injection.handles:
        handle.remove()
    for name in ("mtl_lora_config", "mtl_lora_injection", "mtl_lora_provenance"):
        if hasattr(root, name):
            delattr(root, name)
