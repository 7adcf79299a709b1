"""A checkpoint of ours with the weights that the original MTL-LoRA repository saved."""

import re
from pathlib import Path

import torch

from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.without_base import sizes_of
from mtl_lora.errors import UserError
from mtl_lora.export.imports import State, check_shape, check_whole, find_targets, write_checkpoint
from mtl_lora.language.tasks import TaskSet

_TENSOR_NAME = re.compile(
    r"(?:module\.|base_model\.model\.)*(?P<module>.+)\.(?P<weight>lora_A|lora_lambdas|lora_B|lora_B_w)"
)


def import_original(
    file: str | Path,
    output: str | Path,
    base_model: str,
    tasks: TaskSet,
    alpha: float = 16.0,
    temperature: float = 0.1,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint with the weights of the original repository's MTL-LoRA (github.com/pUmpKin-Co/MTL-LoRA).

    Rank, up-projections, tasks and the form of Lambda_t are read off the shapes: lora_A (1, r, k), lora_lambdas
    (T, r, r) or their diagonals (T, r), lora_B (n, d, r), lora_B_w (T, n). alpha and temperature stand in no file of
    the original. The prompt template is recorded as ``original``. Raises ``UserError`` naming the tensor that does
    not fit.
    """
    path = Path(file)
    tensors = _read_tensors(path)
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    check_whole(path, tensors, ("lora_A", "lora_lambdas", "lora_B", "lora_B_w"))
    rank, count, num_B, diagonal = _measure(path, tensors, modules)
    if count != len(tasks):
        raise UserError(
            f"{path} has {count} tasks and not the {len(tasks)} of {', '.join(tasks.names)}; "
            "pass --tasks_file with its tasks in id order"
        )
    state: State = {}
    for name in modules:
        state[f"{name}.lora_A"] = tensors[f"{name}.lora_A"][0]
        state[f"{name}.lora_lambda"] = tensors[f"{name}.lora_lambdas"]
        state[f"{name}.lora_w"] = tensors[f"{name}.lora_B_w"]
        state[f"{name}.lora_B"] = torch.cat(list(tensors[f"{name}.lora_B"]), dim=1)
    adapter = AdapterConfig(
        method="mtl_lora",
        rank=rank,
        alpha=alpha,
        target_modules=find_targets(base_model, sizes_of(state), str(path), trust_remote_code),
        tasks=tasks.names,
        num_B=num_B,
        temperature=temperature,
        lambda_shape="diagonal" if diagonal else "full",
    )
    return write_checkpoint(output, adapter, state, base_model, "original", tasks, [path], overwrite)


def _read_tensors(path: Path) -> State:
    """The file's tensors in float32 by ``<module>.<weight>``, the prefixes that wrappers put in front taken off."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; pass the checkpoint file of the original repository")
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises half a dozen kinds for bytes that are no tensors
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be read as a file of tensors alone ({reason})") from None
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds a {type(value).__name__}; it must hold tensors by name")
    tensors: State = {}
    for name, tensor in value.items():
        found = _TENSOR_NAME.fullmatch(str(name))
        if not found or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(
                f"{path} holds {name}, which is no weight of the original's MTL-LoRA; those are lora_A, lora_lambdas, "
                "lora_B and lora_B_w of linear layers"
            )
        tensors[f"{found['module']}.{found['weight']}"] = tensor.detach().float()
    return tensors


def _measure(path: Path, tensors: State, modules: list[str]) -> tuple[int, int, int, bool]:
    """(r, T, n, whether Lambda_t is a diagonal) of the first module, after checking that all modules agree."""
    first = modules[0]
    for weight, sizes in (("lora_A", (1, "r", "k")), ("lora_B", ("n", "d", "r")), ("lora_B_w", ("T", "n"))):
        check_shape(path, f"{first}.{weight}", tensors[f"{first}.{weight}"], sizes)
    _, rank, _ = tensors[f"{first}.lora_A"].shape
    count, num_B = tensors[f"{first}.lora_B_w"].shape
    diagonal = tensors[f"{first}.lora_lambdas"].dim() == 2
    expected = {
        "lora_A": (1, rank, "k"),
        "lora_lambdas": (count, rank) if diagonal else (count, rank, rank),
        "lora_B": (num_B, "d", rank),
        "lora_B_w": (count, num_B),
    }
    for name in modules:
        for weight, sizes in expected.items():
            check_shape(path, f"{name}.{weight}", tensors[f"{name}.{weight}"], sizes)
    return rank, count, num_B, diagonal
