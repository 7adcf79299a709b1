"""A checkpoint of ours that starts as a PEFT LoRA."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mtl_lora import files
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import kaiming
from mtl_lora.adapter.without_base import Sizes, sizes_of
from mtl_lora.errors import UserError
from mtl_lora.export.imports import State, check_shape, check_whole, find_targets, write_checkpoint
from mtl_lora.language import prompts
from mtl_lora.language.tasks import TaskSet

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Options of PEFT that are read here, or that say nothing about what a saved adapter computes.
_READ_OR_IDLE = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode", "auto_mapping", "peft_version"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}
# Options with values that keep an adapter a plain LoRA; every other option must be off. The initialisations that
# are missing here change the base model's weights too.
_PLAIN = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "revision": ("main",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def import_peft(
    peft: str | Path,
    output: str | Path,
    tasks: TaskSet,
    method: str = "mtl_lora",
    num_B: int = 3,
    temperature: float = 0.1,
    base_model: str | None = None,
    template: str = "alpaca",
    seed: int = 42,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint that equals a PEFT LoRA for every one of ``tasks``.

    method: ``lora``, or ``mtl_lora``, whose B_i are all the LoRA's B (their weights sum to 1), whose Lambda_t are
    the identity and whose w is drawn by ``seed``, so that the B_i part when training goes on. Raises ``UserError``
    for a pickle, an option that makes it no plain LoRA, tensors of other names or shapes, and other layers than the
    base model's.
    """
    prompts.template(template)
    folder = Path(peft)
    options = _read_options(folder)
    pairs = _read_pairs(folder, options["r"])
    base_model = base_model or options.get("base_model_name_or_path")
    if not base_model:
        raise UserError(f"{folder / CONFIG_NAME} does not say its base model; pass --base_model")
    sizes = sizes_of(pairs)
    adapter = AdapterConfig(
        method=method,
        rank=options["r"],
        alpha=options["lora_alpha"],
        dropout=options.get("lora_dropout") or 0.0,
        target_modules=find_targets(base_model, sizes, str(folder), trust_remote_code),
        tasks=tasks.names,
        use_rslora=bool(options.get("use_rslora")),
        **({"num_B": num_B, "temperature": temperature} if method == "mtl_lora" else {}),
    )
    state = pairs if method == "lora" else _mtl_lora_state(pairs, sizes, adapter, seed)
    return write_checkpoint(output, adapter, state, base_model, template, tasks, [folder], overwrite)


def _read_options(folder: Path) -> dict:
    """``adapter_config.json``, checked to describe a plain LoRA."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass the folder of a PEFT LoRA")
    options = files.read_json(folder / CONFIG_NAME, "the PEFT configuration")
    if not isinstance(options, dict) or options.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG_NAME} describes no LoRA: its peft_type must be LORA")
    for key, value in options.items():
        if value and key not in _READ_OR_IDLE and value not in _PLAIN.get(key, ()):
            raise UserError(
                f"{folder / CONFIG_NAME} sets {key} to {value!r}, which the checkpoint here cannot hold; "
                "only a plain LoRA can be imported"
            )
    for key, types in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(options.get(key)) not in types:
            raise UserError(f"{folder / CONFIG_NAME} must set {key} to a number, not {options.get(key)!r}")
    return options


def _read_pairs(folder: Path, r: int) -> State:
    """``<module>.lora_A`` (r, k) and ``<module>.lora_B`` (d, r) in float32."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLE_NAME).is_file():
            raise UserError(f"{folder} has only the pickle {PICKLE_NAME}; load it in PEFT and save it as safetensors")
        raise UserError(f"{folder} has no {WEIGHTS_NAME}; pass the folder of a PEFT LoRA")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None
    pairs: State = {}
    for name, tensor in tensors.items():
        found = _TENSOR_NAME.fullmatch(name)
        if not found or not tensor.is_floating_point():
            raise UserError(f"{path} holds {name}, which is no part of a plain LoRA on linear layers")
        expected = (r, "k") if found["side"] == "A" else ("d", r)
        check_shape(path, name, tensor, expected)
        pairs[f"{found['module']}.lora_{found['side']}"] = tensor.float()
    check_whole(path, pairs, ("lora_A", "lora_B"))
    return pairs


def _mtl_lora_state(pairs: State, sizes: Sizes, adapter: AdapterConfig, seed: int) -> State:
    """The MTL-LoRA that equals the LoRA ``pairs`` for every task."""
    state: State = {}
    count, rank = len(adapter.tasks), adapter.rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sizes:
            w = torch.empty(count, adapter.num_B)
            kaiming(w)
            state[f"{name}.lora_A"] = pairs[f"{name}.lora_A"]
            state[f"{name}.lora_lambda"] = torch.eye(rank).repeat(count, 1, 1)
            state[f"{name}.lora_w"] = w
            state[f"{name}.lora_B"] = pairs[f"{name}.lora_B"].repeat(1, adapter.num_B)
    return state
