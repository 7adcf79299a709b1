"""Support for launches of several processes: checks, DeepSpeed without a compiler, partitioned parameters (ZeRO-3)."""

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from mtl_lora import artifacts, files
from mtl_lora.base_model import choose_dtype, quiet_deepspeed
from mtl_lora.errors import UserError, require_package
from mtl_lora.memory import keep_freed_memory
from mtl_lora.training.config import TrainingConfig

# Keys of a DeepSpeed configuration that take the values of flags instead of DeepSpeed's own defaults.
_BY_FLAGS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def check_launch(config: TrainingConfig) -> None:
    """Raise ``UserError`` for an unsupported launch, or if a package that a flag needs is not installed."""
    switched = {name for name in os.environ if os.environ[name].lower() in ("true", "1", "yes")}
    if "ACCELERATE_USE_FSDP" in switched:
        raise UserError("FSDP is not supported; pass --deepspeed config/zero3.json to partition the base over GPUs")
    if "ACCELERATE_USE_DEEPSPEED" in switched and not config.deepspeed:
        raise UserError(
            "--use_deepspeed of accelerate launch is not supported; leave it out and pass --deepspeed "
            "config/zero2.json to finetune.py"
        )
    packages = {"wandb_project": "wandb", "tensorboard": "tensorboard", "deepspeed": "deepspeed"}
    for flag, package in (packages | {"load_in_4bit": "bitsandbytes"}).items():
        require_package(flag, package, getattr(config, flag))
    partitioned = bool(config.deepspeed) and zero_stage(config.deepspeed) == 3
    if partitioned and (config.dtype == "fp64" or config.load_in_4bit):
        what = "--load_in_4bit" if config.load_in_4bit else "--dtype fp64"
        raise UserError(f"ZeRO-3 cannot train with {what}; leave it out, or use --deepspeed config/zero2.json")


def deepspeed_settings(name: str) -> dict:
    """Return the DeepSpeed configuration in a file, or the package's own by name (``zero2``, ``config/zero2.json``).

    Values that flags set and the file leaves out are taken from the flags. Raises ``UserError`` for sections that would
    replace flags.
    """
    own = Path(__file__).with_name("deepspeed") / f"{name.removeprefix('config/').removesuffix('.json')}.json"
    path = own if not Path(name).exists() and own.is_file() else name
    settings = files.read_object(path, "the DeepSpeed configuration")
    flags = {"scheduler": "--lr_scheduler_type and --warmup_ratio", "optimizer": "--learning_rate and --weight_decay"}
    flags |= {"torch_autocast": "--dtype", "amp": "--dtype"}
    if found := [f"{section!r} ({flags[section]})" for section in flags if section in settings]:
        raise UserError(f"{name} has sections that would replace flags, {' and '.join(found)}; remove them")
    return dict.fromkeys(_BY_FLAGS, "auto") | settings


def deepspeed_sha256(name: str | None) -> str | None:
    """Return the sha256 of a DeepSpeed configuration, given by file or name; None without one."""
    return files.sha256_of(json.dumps(deepspeed_settings(name), sort_keys=True).encode()) if name else None


def zero_stage(name: str) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration, given by file or name."""
    zero = deepspeed_settings(name).get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return stage if isinstance(stage, int) else 0


def check_deepspeed_values(arguments: TrainingArguments, one_process: bool) -> None:
    """Raise ``UserError`` for values in the DeepSpeed configuration that contradict the flags.

    one_process: whether this is a check before the launch, when the global batch is not yet known.
    """
    if not arguments.deepspeed:
        return
    wrong = [line.removeprefix("- ds ") for line in arguments.hf_deepspeed_config.mismatches]
    wrong = [line for line in wrong if not (one_process and line.startswith("train_batch_size"))]
    if wrong:
        raise UserError(
            f'the DeepSpeed configuration and the flags differ ({"; ".join(wrong)}); write "auto" for these values'
        )


def prepare_process(config: TrainingConfig) -> None:
    """Set the global state of a training process before anything else: environment, memory allocator, DeepSpeed."""
    # --dtype sets the precision; the mixed precision that `accelerate launch` passes on would autocast on top of it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if config.wandb_project:
        os.environ["WANDB_PROJECT"] = config.wandb_project
    if config.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.output_dir) / artifacts.TENSORBOARD)
    # DeepSpeed calls collectives by deprecated names, and torch would warn about them in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if os.environ.get("LOCAL_RANK", "0") != "0":  # only the first process shows a progress bar
        logging.disable_progress_bar()
    if torch.cuda.is_available():
        return
    keep_freed_memory()
    quiet_deepspeed()
    if config.deepspeed and importlib.util.find_spec("deepspeed"):
        # When DeepSpeed sets up its process group on a CPU, it compiles a shared-memory all-reduce for inference, which
        # training never uses: its collectives are gloo's. Marking the operator as incompatible before DeepSpeed fills
        # its table of operators prevents this, so a launch needs no C++ compiler.
        import deepspeed

        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def init_deepspeed(config: TrainingConfig) -> None:
    """Hand the process group to DeepSpeed, which ZeRO-3 needs to load the base model, before its engine starts.

    Raises ``UserError`` without a launcher, because DeepSpeed would then look for MPI.
    """
    if not config.deepspeed:
        return
    if not torch.distributed.is_initialized():
        raise UserError("--deepspeed needs a launcher, even for one process: torchrun --nproc_per_node 1 finetune.py")
    import deepspeed

    deepspeed.init_distributed()


def destroy_process_group() -> None:
    """Leave the process group after the last training of this process; a group cannot be joined twice."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_backend() == "gloo":
            # DDP and DeepSpeed keep the group and its threads alive until the process ends. A thread that then still
            # holds a Python tensor aborts the process (exit code -6); a barrier makes the threads release theirs.
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def loading_base(dtype: str) -> Iterator[None]:
    """A context in which to load a base model, so that it gets ``dtype`` (a ``--dtype`` value) under ZeRO-3 too.

    ZeRO-3 creates parameters in the dtype of the DeepSpeed configuration. That is float32, because in bf16 DeepSpeed
    would cast the adapter too. It is therefore bf16 only while the base model is loaded, and float32 again when the
    engine reads it.
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
