"""The base model as a structure without weights: which linear layers it has, how to name some of them, which base."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from mtl_lora.adapter.base import features
from mtl_lora.adapter.inject import is_linear
from mtl_lora.adapter.without_base import Sizes
from mtl_lora.errors import UserError
from mtl_lora.model import fingerprint, one_sentence_for, resolve


def base_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A base model's configuration; raises ``UserError`` if it can not be had."""
    with one_sentence_for(name):
        return AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)


def base_structure(name: str, trust_remote_code: bool = False) -> nn.Module | None:
    """The base model on the meta device, or None, with a note on stderr, where its configuration can not be had."""
    try:
        config = base_config(name, trust_remote_code)
        with one_sentence_for(name), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
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


def local_fingerprint(name: str) -> str | None:
    """The fingerprint of a base whose weights lie on this machine, else None; nothing is fetched for it."""
    from huggingface_hub import snapshot_download

    try:
        folder = resolve(name)
        if not Path(folder).is_dir():
            folder = snapshot_download(folder, local_files_only=True, allow_patterns=["*.safetensors*"])
        return fingerprint(folder)
    except (UserError, OSError, ValueError):
        return None


def check_fingerprint(folder: str | Path, expected: str | None, found: str | None, name: str) -> None:
    """Raise ``UserError`` if both fingerprints are known and the base is not the one the adapter was trained on."""
    if expected and found and found != expected:
        raise UserError(
            f"{folder} was trained on another base model than {name!r}: its fingerprint is {expected[:12]}..., "
            f"not {found[:12]}...; pass --base_model"
        )
