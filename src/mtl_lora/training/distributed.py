"""What a launch of several processes needs: refusals, DeepSpeed without a compiler, weights that ZeRO-3 spreads."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from mtl_lora import files
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.layer import in_pieces
from mtl_lora.base_model import choose_dtype
from mtl_lora.errors import UserError
from mtl_lora.language.config import AUTO


def check_launch(deepspeed: str | None, dtype: str, batch_size: int | str) -> None:
    """Raise ``UserError`` for a launch that this training does not do, or a DeepSpeed configuration it cannot have."""
    if _launcher_says("ACCELERATE_USE_FSDP"):
        raise UserError("FSDP is not supported; to spread the base over GPUs use --deepspeed config/zero3.json")
    if _launcher_says("ACCELERATE_USE_DEEPSPEED") and not deepspeed:
        raise UserError(
            "with accelerate launch, leave out its --use_deepspeed and pass finetune.py --deepspeed config/zero2.json"
        )
    if not deepspeed:
        return
    require_package("deepspeed", "--deepspeed")
    config = files.read_json(deepspeed_file(deepspeed), "the DeepSpeed configuration")
    if config.get("zero_optimization", {}).get("stage") != 3:
        return
    if dtype == "fp64":
        raise UserError("--dtype fp64 does not go with ZeRO-3; use bf16 or fp32, or --deepspeed config/zero2.json")
    if batch_size == AUTO:  # a trial that fails in one process would leave the others waiting for its weights
        raise UserError("--batch_size auto does not go with ZeRO-3; pass a number of rows")


def deepspeed_file(name: str) -> str:
    """A DeepSpeed configuration's file: a path, or the package's own by name (``zero2``, ``config/zero2.json``)."""
    own = Path(__file__).with_name("deepspeed") / f"{name.removeprefix('config/').removesuffix('.json')}.json"
    return str(own) if not Path(name).exists() and own.is_file() else name


def check_values(arguments: TrainingArguments, one_process: bool) -> None:
    """Raise ``UserError`` for values in the DeepSpeed configuration that contradict the flags.

    one_process: a check before the launch, which knows nothing of the global batch.
    """
    if not arguments.deepspeed:
        return
    wrong = [line.removeprefix("- ds ") for line in arguments.hf_deepspeed_config.mismatches]
    wrong = [line for line in wrong if not (one_process and line.startswith("train_batch_size"))]
    if wrong:
        raise UserError(
            f'the DeepSpeed configuration and the flags differ ({"; ".join(wrong)}); write "auto" for these values'
        )


def require_package(name: str, flag: str) -> None:
    """Raise ``UserError`` if a package that a flag asks for is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{flag} needs the package {name}; install it with `pip install {name}`")


def prepare(deepspeed: str | None) -> None:
    """What must be so before the training arguments make the process group."""
    # The precision is what --dtype says; the one `accelerate launch` hands down would autocast on top of it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if deepspeed and not torch.cuda.is_available():
        _leave_out_shared_memory_operator()


def _leave_out_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling an operator on the CPU, so that a launch there needs no C++ compiler.

    With its process group DeepSpeed compiles a shared-memory all-reduce for inference; training's collectives are
    gloo's with or without it. It leaves out what its own table of operators calls incompatible, and that table is
    filled when it is first asked for (by probing every operator, with a compiler), so an entry made before is final.
    """
    import deepspeed

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def join(deepspeed: str | None) -> None:
    """Hand the process group to DeepSpeed, which counts processes as ZeRO-3 loads the base, before the engine starts.

    Raises ``UserError`` without a launcher, for DeepSpeed would then look for MPI.
    """
    if not deepspeed:
        return
    if not torch.distributed.is_initialized():
        raise UserError("--deepspeed needs a launcher, also for one process: torchrun --nproc_per_node 1 finetune.py")
    import deepspeed as library

    library.init_distributed()


@contextlib.contextmanager
def base_in(dtype: str) -> Iterator[None]:
    """A block in which a base model is loaded; under ZeRO-3 it gets ``dtype`` (a ``--dtype`` value) as elsewhere.

    ZeRO-3 makes weights in the dtype of DeepSpeed's configuration, and that says float32, for in bf16 DeepSpeed would
    cast the adapter too. So it says bf16 while the base is loaded, and float32 again when the engine reads it.
    """
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled() or choose_dtype(dtype) != torch.bfloat16:
        yield
        return
    config = deepspeed_config()
    before, config["bf16"] = config.get("bf16", {}), {"enabled": True}
    try:
        yield
    finally:
        config["bf16"] = before


def gathered_adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights as whole tensors; under ZeRO-3 every process takes part in gathering them."""
    state = checkpoint.adapter_state(model)
    parameters = [model.get_parameter(name) for name in state]
    if not any(in_pieces(parameter) for parameter in parameters):
        return state
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return {name: model.get_parameter(name).detach().cpu().clone() for name in state}


def leave() -> None:
    """Leave the process group, after the last training of this process: a group cannot be joined twice."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _launcher_says(name: str) -> bool:
    """Whether ``accelerate launch`` has set one of its switches."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
