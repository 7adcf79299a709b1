"""A checkpoint's adapter with its weights and without the base model: enough to ask every layer for its factors."""

import copy
from pathlib import Path

import torch
from torch import nn

from mtl_lora.adapter.checkpoint import CheckpointConfig, load_state, read_weights, split_state
from mtl_lora.adapter.inject import adapter_layers, inject
from mtl_lora.adapter.layer import layer_sizes

Sizes = dict[str, tuple[int, int]]


def adapter_without_base(
    folder: str | Path, config: CheckpointConfig, base: nn.Module | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The checkpoint's adapter on a base that has no weights: every layer's ``factors`` can be asked for.

    base: a structure on the meta device; None: layers of the sizes that the checkpoint's weights show, and no layers if
    they show none. dtype: what the adapter's weights become; None: as they are stored. Modules saved whole are left
    out. Raises ``UserError`` for a damaged checkpoint and for one that does not fit the base.
    """
    adapter = copy.copy(config.adapter_config)
    state, _ = split_state(adapter, read_weights(folder, config))
    adapter.modules_to_save = []
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    sizes = layer_sizes(adapter, state)
    model = base or stand_in(sizes)
    if not base and not sizes:
        return model
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        model.to(torch.float64)
    inject(model, adapter)
    load_state(model, state, str(folder))  # on the meta device it compares names, shapes and dtypes, and copies nothing
    for name, layer in adapter_layers(model).items():
        for key in layer.parameter_names:
            setattr(layer, key, nn.Parameter(state[f"{name}.{key}"], requires_grad=False))
    return model


def stand_in(sizes: Sizes) -> nn.Module:
    """A module tree on the meta device with a linear layer of each (k, d) under its dotted name, and nothing else."""
    root = nn.Module()
    for name, (in_features, out_features) in sizes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(in_features, out_features, bias=False, device="meta"))
    return root


def sizes_of(state: dict[str, torch.Tensor]) -> Sizes:
    """(k, d) of every adapted layer, read off its lora_A (.., k) and lora_B (d, ..), as LoRA and MTL-LoRA have them."""
    names = [key.removesuffix(".lora_A") for key in state if key.endswith(".lora_A")]
    return {name: (state[f"{name}.lora_A"].shape[1], state[f"{name}.lora_B"].shape[0]) for name in names}
