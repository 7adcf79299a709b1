"""Putting adapter layers on a model, finding them again, and folding them into plain linear layers."""

import re
from collections import Counter

import torch
from torch import nn

from mtl_lora.adapter import routing
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import AdapterLayer, is_conv1d, layer_class
from mtl_lora.errors import UserError


def inject(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Wrap the targeted linear layers in place, freeze all other weights, and return the model.

    Raises ``UserError`` for a target that names no linear layer (naming those there are) and for a model that
    already carries an adapter. A failed call leaves the model as it was.
    """
    if adapter_layers(model):
        raise UserError("the model already carries an adapter; load a fresh base model, or merge it first")
    targets = find_targets(model, config.target_modules)
    make = layer_class(config.method)
    layers = {name: make(module, config) for name, module in targets.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        for parameter in layer.adapter_parameters().values():
            parameter.requires_grad_(True)
        layer.train(model.training)
        replace_module(model, name, layer)
    model.mtl_lora_config = config
    routing.follow_beams(model)
    return model


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of a model by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def find_targets(model: nn.Module, target_modules: list[str] | str) -> dict[str, nn.Module]:
    """The linear layers that ``target_modules`` means (see ``AdapterConfig``), by name, in the model's order.

    Raises ``UserError`` for a name, ending or expression that no linear layer has, naming those there are, and for a
    layer whose owner would bypass an adapter.
    """
    targets = _matching(model, target_modules)
    for name in targets:
        _refuse_bypassed(model, name)
    return targets


def _matching(model: nn.Module, target_modules: list[str] | str) -> dict[str, nn.Module]:
    linear = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    if target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        targets = {name: module for name, module in linear.items() if module is not head}
        if not targets:
            raise UserError("'all-linear' finds no linear layer to adapt in this model")
        return targets
    if isinstance(target_modules, str):
        try:
            found = {name for name in linear if re.fullmatch(target_modules, name)}
        except re.error as error:
            raise UserError(f"the target expression {target_modules!r} is no regular expression: {error}") from None
        if not found:
            raise UserError(
                f"no linear layer's whole name matches the expression {target_modules!r}; "
                f"this model has {_endings(linear)}, for example {next(iter(linear), 'none')}"
            )
        return {name: module for name, module in linear.items() if name in found}
    found = set()
    for target in target_modules:
        matching = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matching:
            raise UserError(f"no linear layer is named {target!r}; this model has {_endings(linear)}")
        found |= matching
    return {name: module for name, module in linear.items() if name in found}


def _refuse_bypassed(model: nn.Module, name: str) -> None:
    """Raise ``UserError`` for a layer whose owner may read its weight instead of calling it, past any adapter.

    torch's own attention does so always and its encoder layer in evaluation; fused kernels of Mamba do so on GPUs.
    """
    owners = [model.get_submodule(name[:end]) for end in range(len(name)) if name[end] == "."]
    for owner in [model, *owners]:
        if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer) or _fuses_kernels(owner, name):
            raise UserError(
                f"the layer {name} cannot carry an adapter: {type(owner).__name__} may use its weight without calling "
                "the layer; name other target modules"
            )


def _fuses_kernels(owner: nn.Module, name: str) -> bool:
    return "Mamba" in type(owner).__name__ and name.rpartition(".")[2] in ("x_proj", "dt_proj", "out_proj")


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can wrap a module: nn.Linear and what derives from it (quantised layers), GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) weights; a weight that two modules share counts once."""
    trained = total = 0
    for parameter in model.parameters():
        # Under ZeRO-3 a weight lies in pieces and tells its whole size in ds_numel.
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


@torch.no_grad()
def merge(model: nn.Module, task: str | int | None = None) -> nn.Module:
    """Fold the adapter into plain linear layers for one task, in place, and return the model.

    Raises ``UserError`` for a task the adapter does not have and for a model without an adapter.
    """
    layers = adapter_layers(model)
    if not layers:
        raise UserError("the model carries no adapter to merge")
    merged = {name: layer.merged_weight(task) for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = merged[name].T.contiguous() if is_conv1d(layer.base) else merged[name]
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
        replace_module(model, name, layer.base)
    forget_adapter(model)
    return model


def forget_adapter(model: nn.Module) -> None:
    """Drop what the model says of an adapter it no longer carries, so that the next one does not inherit it."""
    for name in ("mtl_lora_config", "mtl_lora_origin"):
        if hasattr(model, name):
            delattr(model, name)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place that the dotted ``name`` tells."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _endings(linear: dict[str, nn.Module]) -> str:
    counted = Counter(name.rpartition(".")[2] for name in linear)
    return ", ".join(f"{ending} ({count})" for ending, count in counted.items()) or "none"
