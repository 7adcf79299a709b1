"""The adapter on disk: ``mtl_lora_config.json`` says what ``mtl_lora.safetensors`` is, with its sha256.

PEFT's file names are left to what is exported for PEFT. Safetensors does not notice a flipped bit, hence the hash.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mtl_lora import files
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.inject import adapter_layers, forget_adapter, inject, replace_module
from mtl_lora.config import Config
from mtl_lora.errors import UserError
from mtl_lora.version import __version__

CONFIG_NAME = "mtl_lora_config.json"
WEIGHTS_NAME = "mtl_lora.safetensors"
FORMAT = 1


@dataclasses.dataclass
class Origin(Config):
    """Where an adapter comes from, so that nothing about it needs to be said again: its base, prompt and tasks.

    base_model: name or folder. base_fingerprint: see ``BaseModel.fingerprint``. prompt_template: name in
    ``mtl_lora.language.prompts``. cutoff_len: tokens. task_set: ``TaskSet.to_json()``. train_settings: the training's
    flags. commit: the project's, if it was trained from a git checkout.
    """

    base_model: str | None = None
    base_fingerprint: str | None = None
    prompt_template: str | None = None
    cutoff_len: int | None = None
    task_set: dict | None = None
    train_settings: dict | None = None
    commit: str | None = None


@dataclasses.dataclass
class CheckpointConfig(Config):
    """The content of ``mtl_lora_config.json``."""

    format: int
    library_version: str
    adapter: dict
    origin: dict
    weights_sha256: str

    @property
    def adapter_config(self) -> AdapterConfig:
        """The adapter's configuration; checked when the file was read."""
        return AdapterConfig.from_json(self.adapter)

    @property
    def origin_config(self) -> Origin:
        """Base model, prompt and tasks; checked when the file was read."""
        return Origin.from_json(self.origin)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every adapter weight by ``<module name>.<parameter name>``; raises ``UserError`` without an adapter."""
    layers = adapter_layers(model)
    if not layers:
        raise UserError("the model carries no adapter; put one on with mtl_lora.inject")
    return {
        f"{name}.{key}": parameter.detach()
        for name, layer in layers.items()
        for key, parameter in layer.adapter_parameters().items()
    }


def save(
    model: nn.Module, folder: str | Path, origin: Origin | None = None, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter of ``model`` to ``folder``: both files or neither, and a half-written folder never loads.

    origin: defaults to the one the adapter was loaded with. state: weights gathered elsewhere (ZeRO-3).
    """
    folder = Path(folder)
    state = adapter_state(model) if state is None else state
    origin = origin or getattr(model, "mtl_lora_origin", None) or Origin()
    # Both are whole before either takes its name, the weights first.
    with files.atomic_path(folder / CONFIG_NAME) as config_file, files.atomic_path(folder / WEIGHTS_NAME) as weights:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, weights)
        adapter, digest = model.mtl_lora_config.to_json(), files.sha256(weights)
        config = CheckpointConfig(FORMAT, __version__, adapter, origin.to_json(), digest)
        files.write_json(config_file, config.to_json())


def read_config(folder: str | Path) -> CheckpointConfig:
    """Read and check ``mtl_lora_config.json``; raises ``UserError`` naming the file and what is wrong."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder} is no MTL-LoRA checkpoint: it has no {CONFIG_NAME}")
    value = files.read_json(path, "the checkpoint configuration")
    # Asked first, for another format has other keys.
    if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {value['format']}, and this version reads format {FORMAT}; update mtl-lora")
    config = CheckpointConfig.from_json(value, str(path))
    # A lost alpha that took its default would change every output without a word.
    AdapterConfig.from_json(config.adapter, f"{path}, 'adapter'", complete=True)
    Origin.from_json(config.origin, f"{path}, 'origin'")
    return config


def load(base_model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the checkpoint's adapter on ``base_model``, in place, and return it.

    Raises ``UserError`` for a changed byte, a missing or unexpected tensor, a wrong shape or dtype (each by name);
    the model is then left as it was.
    """
    config = read_config(folder)
    state = read_weights(folder, config)
    unfrozen = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    model = inject(base_model, config.adapter_config)
    try:
        load_state(model, state, str(Path(folder) / WEIGHTS_NAME))
    except UserError:
        remove(model)
        for parameter in unfrozen:
            parameter.requires_grad_(True)
        raise
    model.mtl_lora_origin = config.origin_config
    return model


def read_weights(folder: str | Path, config: CheckpointConfig) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint on the CPU, after its sha256 was compared."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"the checkpoint {folder} has no {WEIGHTS_NAME}")
    digest = files.sha256(path)
    if digest != config.weights_sha256:
        raise UserError(
            f"{path} is damaged (its sha256 is {digest[:12]}..., and {CONFIG_NAME} says "
            f"{config.weights_sha256[:12]}...); copy it again"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None


@torch.no_grad()
def load_state(model: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy tensors into the adapter of ``model``; names, shapes and dtypes must agree both ways."""
    own = adapter_state(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [f"{label} {_some(keys)}" for label, keys in (("lacks", missing), ("has unknown", unexpected)) if keys]
        raise UserError(f"{source} does not fit this model: it {' and '.join(parts)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(own[name].shape)}"
            raise UserError(f"{source} does not fit this model: {name} has shape {shapes}")
        # A float64 model takes float32 weights as they are; anything else would round.
        if tensor.dtype not in {torch.float32, own[name].dtype}:
            raise UserError(f"{source} does not fit this model: {name} has dtype {tensor.dtype}, not {own[name].dtype}")
    for name, tensor in state.items():
        own[name].copy_(tensor)


def remove(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place: the frozen linear layers are put back as they were."""
    for name, layer in adapter_layers(model).items():
        replace_module(model, name, layer.base)
    forget_adapter(model)
    return model


def _some(keys: list[str], shown: int = 3) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more
