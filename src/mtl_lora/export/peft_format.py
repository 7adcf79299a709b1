"""One PEFT LoRA folder per task: what ``layer.factors(task)`` says, under PEFT's names."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from mtl_lora import files
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.adapter.inject import adapter_layers
from mtl_lora.adapter.layer import AdapterLayer, Factors, is_conv1d
from mtl_lora.adapter.without_base import adapter_without_base
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.export.card import model_card, read_scores
from mtl_lora.export.folders import whole_folder
from mtl_lora.export.structure import base_structure, targets_for

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
PREFIX = "base_model.model."
FOR_ALL = "all"  # the folder of an adapter that was trained without tasks


def export_peft(
    checkpoint: str | Path,
    output: str | Path,
    tasks: list[str] | None = None,
    base_model: str | None = None,
    results: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write ``<output>/<task>/`` for each of ``tasks`` (None or empty: all); returns the folders.

    Needs the checkpoint and the base model's configuration, no weights of the base. Every method gets one folder a
    task, also those that are the same for every task: prompt and score of a task then stand beside its weights.
    Raises ``UserError`` for a task that is not there, a damaged checkpoint, and an ``output`` in use.
    """
    config = read_config(checkpoint)
    names = choose_tasks(config.adapter_config.tasks, tasks)
    base_model = base_model or config.origin_config.base_model
    if base_model is None:
        raise UserError(f"{checkpoint} does not say its base model; pass --base_model")
    handle = BaseModel(base_model, trust_remote_code)
    handle.check_fingerprint(config.origin_config.base_fingerprint, handle.local_fingerprint(), checkpoint)
    scores = read_scores(checkpoint, config, results)
    base = base_structure(base_model, trust_remote_code)
    layers = adapter_layers(adapter_without_base(checkpoint, config, base))
    targets = targets_for(layers, base)
    with whole_folder(output, FILES, overwrite, [checkpoint], nested=True) as folder:
        for name in names:
            task = None if name == FOR_ALL and not config.adapter_config.tasks else name
            settings = _write_task(folder / name, layers, task, targets, base_model)
            card = model_card(name, config, base_model, settings["r"], scores.get(name))
            files.write_text(folder / name / CARD_NAME, card)
    return [Path(output) / name for name in names]


def choose_tasks(known: list[str], wanted: list[str] | None) -> list[str]:
    """The folder names to write; raises ``UserError`` for a task that is not there or cannot name a folder."""
    chosen = list(dict.fromkeys(wanted or known or [FOR_ALL]))
    for name in chosen:
        check_task(known or [FOR_ALL], name)
        if name in (".", "..") or Path(name).name != name:
            raise UserError(f"the task {name!r} cannot name a folder; rename it in the checkpoint's tasks")
    return chosen


def check_task(known: list[str], name: str) -> None:
    """Raise ``UserError`` that lists the tasks there are."""
    if name not in known:
        raise UserError(f"there is no task {name!r}; the adapter's tasks are {', '.join(known) or 'none'}")


def _write_task(
    folder: Path, layers: dict[str, AdapterLayer], task: str | None, targets: list[str] | str, base_model: str
) -> dict:
    """Weights and configuration of one task; returns the configuration."""
    tensors, settings = {}, {}
    for name, layer in layers.items():
        with torch.no_grad():
            factors = layer.factors(task)
        rank = factors.A.shape[0]
        alpha, B = alpha_and_up(factors)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous()
        if factors.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = factors.magnitude.contiguous()
        settings |= {"r": rank, "lora_alpha": alpha, "use_dora": factors.magnitude is not None}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **settings,
        "lora_dropout": 0.0,
        "target_modules": targets,
        # A model with both kinds of layer is fine: PEFT sets it right layer by layer.
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    files.write_json(folder / CONFIG_NAME, config)
    return config


def alpha_and_up(factors: Factors) -> tuple[int, torch.Tensor]:
    """(lora_alpha, B) with lora_alpha / R * B equal to the factors' scale * B.

    PEFT declares lora_alpha a whole number: where the scale asks for another (alpha 0.5, or rsLoRA), it goes into B
    and lora_alpha is R. DoRA's norm is that of W + scale B A and does not care where the scale stands.
    """
    rank = factors.A.shape[0]
    alpha = round(factors.scale * rank)
    if alpha > 0 and alpha / rank == factors.scale:
        return alpha, factors.B
    return rank, factors.B * factors.scale
