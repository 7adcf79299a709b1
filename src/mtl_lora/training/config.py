"""The flags of training that every system has: batches, schedule, run. A system's configuration adds its own."""

import dataclasses

from mtl_lora.config import DTYPES, Config, flag
from mtl_lora.errors import UserError

SCHEDULES = ("linear", "cosine", "constant_with_warmup")


@dataclasses.dataclass
class TrainingConfig(Config):
    """What configures a training of any system. Raises ``UserError`` for a value that cannot be."""

    affects = "weights"

    output_dir: str = flag(
        "output/mtl_lora", "folder for the adapter, its checkpoints and logs", affects="nothing", group="output"
    )

    batch_size: int | str = flag(
        8,
        "examples per device and micro-batch; the global batch is this x devices x gradient_accumulation_steps",
        min=1,
        group="batches and schedule",
    )
    token_budget: int = flag(
        0,
        "most tokens per device and micro-batch, padding included (examples x longest example); replaces batch_size, "
        "which then applies to validation alone; 0: off",
        min=0,
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimiser step", min=1)
    num_epochs: float = flag(3.0, "passes over the training examples", above=0)
    sampling_temperature: float = flag(
        1.0,
        "a task's proportion of an epoch is that of its examples ^ (1 / this); 1: the data's own proportions",
        min=1,
    )
    max_steps: int = flag(-1, "optimiser steps; overrides num_epochs; -1: off")
    length_pool: int = flag(
        128, "batches sorted by length together, against padding; 1: every batch is a mixture of all tasks", min=1
    )
    lr_scheduler_type: str = flag("linear", f"after the warm-up: {', '.join(SCHEDULES)}", choices=SCHEDULES)
    learning_rate: float = flag(3e-4, "peak learning rate of AdamW", above=0)
    warmup_ratio: float = flag(0.01, "fraction of the steps with linear warm-up")
    weight_decay: float = flag(0.0, "AdamW weight decay; 0: off", min=0)
    max_grad_norm: float = flag(1.0, "gradient clipping norm; 0: off", min=0)

    val_set_size: int = flag(0, "examples held out for a validation loss at every save; 0: off", min=0, group="the run")
    save_step: int = flag(200, "steps between checkpoints; 0: only the final adapter", affects="nothing", min=0)
    save_total_limit: int = flag(3, "checkpoints kept; 0: all", affects="nothing", min=0)
    logging_steps: int = flag(10, "steps between log lines", affects="nothing", min=1)
    seed: int = flag(42, "fixes data order, initialisation and dropout", min=0, max=2**32 - 1)
    dtype: str = flag(
        "auto", "base model dtype: bf16, fp32, fp64; auto: bf16 where the hardware multiplies it", choices=DTYPES
    )
    load_in_4bit: bool = flag(False, "load the base model in 4 bits, as QLoRA does; needs bitsandbytes")
    use_gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    deepspeed: str | None = flag(None, "DeepSpeed configuration, such as config/zero2.json; none: off")
    resume_from_checkpoint: str | None = flag(
        None, "checkpoint folder to resume from; True: the last one in output_dir", affects="nothing"
    )
    overwrite_output_dir: bool = flag(False, "delete a run that output_dir already holds", affects="nothing")
    wandb_project: str | None = flag(
        None, "log to this Weights & Biases project; WANDB_MODE=offline works", affects="nothing"
    )
    tensorboard: bool = flag(False, "log for TensorBoard below output_dir", affects="nothing")
    check: bool = flag(False, "check every setting and prepare the data, then stop", affects="nothing")
    local_rank: int = flag(
        -1, "set by the deepspeed launcher; the environment's LOCAL_RANK is what counts", affects="nothing"
    )

    def validate(self) -> None:
        if isinstance(self.batch_size, str):
            raise UserError(
                f"batch_size must be a whole number, not {self.batch_size!r}; to fill micro-batches by tokens pass "
                "--token_budget"
            )
        # Gradients of fp16 activations underflow without a scaled loss.
        self.require("dtype", "bf16 or fp32 for training, or auto", self.dtype != "fp16")
        self.require("warmup_ratio", "at least 0 and below 1", 0 <= self.warmup_ratio < 1)
        self.require("max_steps", "at least 1, or -1 for num_epochs", self.max_steps >= 1 or self.max_steps == -1)
        if self.token_budget and self.length_pool != TrainingConfig.length_pool:
            raise UserError("--token_budget sorts all examples by length, so --length_pool has no effect; pass one")
        if self.token_budget and self.sampling_temperature != 1:
            raise UserError("--token_budget and --sampling_temperature cannot be combined; pass one")
