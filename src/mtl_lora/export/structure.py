"""The base model as a structure without weights: which linear layers it has, how to name some of them, which base."""

import re
import sys
from collections.abc import Iterable

from torch import nn

from mtl_lora.adapter.inject import is_linear
from mtl_lora.adapter.layer import features
from mtl_lora.adapter.without_base import Sizes
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError


def base_structure(name: str, trust_remote_code: bool = False) -> nn.Module | None:
    """The base model on the meta device, or None, with a note on stderr, where its configuration cannot be had."""
    try:
        return BaseModel(name, trust_remote_code).structure()
    except UserError as error:
        print(f"note: layer names are not compared with the base model's: {error}", file=sys.stderr)
        return None


def check_layers(base: nn.Module, sizes: Sizes, source: str) -> None:
    """Raise ``UserError`` naming the first layer that ``base`` does not have, or has in another size."""
    linear = {name: features(module) for name, module in base.named_modules() if is_linear(module)}
    for name, (in_features, out_features) in sizes.items():
        if name not in linear:
            raise UserError(
                f"{source} adapts {name}, which is no linear layer of the base model; pass its --base_model"
            )
        if linear[name] != (in_features, out_features):
            raise UserError(
                f"{source} takes {name} for a layer of {in_features} to {out_features} features, and the base model's "
                f"has {linear[name][0]} to {linear[name][1]}; pass its --base_model"
            )


def targets_for(names: Iterable[str], base: nn.Module | None) -> list[str] | str:
    """``target_modules`` that mean exactly the modules ``names``, here and in PEFT.

    Name endings if they meet no other module of ``base``, else whole names, else an expression of whole names.
    """
    names = list(names)
    if base is None:
        return names
    everything = [name for name, _ in base.named_modules()]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for targets in (endings, names):
        ends = tuple(f".{target}" for target in targets)
        if {name for name in everything if name in targets or name.endswith(ends)} == set(names):
            return targets
    return "|".join(re.escape(name) for name in names)
