"""What a run says of itself before it trains: the global batch, the data, what was shortened."""

import datasets
from transformers import TrainingArguments

from mtl_lora.language.config import AUTO, TrainConfig
from mtl_lora.language.token_cache import shortened_note
from mtl_lora.training.fitting import tried_on
from mtl_lora.training.sampler import LengthBatchSampler


def describe(
    config: TrainConfig, arguments: TrainingArguments, sampler: LengthBatchSampler, rows: datasets.Dataset
) -> str:
    """A few lines on the batch and the data."""
    lines = [describe_batch(arguments, sampler), f"{len(rows):,} rows; {shortened_note(rows, config.cutoff_len)}"]
    if tried_on(arguments.device, config):
        lines.append("--batch_size auto: split into the largest micro-batches that fit, once the model is loaded")
    elif config.batch_size == AUTO:
        lines.append(f"--batch_size auto: {config.micro_batch_rows} rows, for only a GPU's memory is tried")
    return "\n".join(lines)


def describe_batch(arguments: TrainingArguments, sampler: LengthBatchSampler) -> str:
    """One line on the global batch."""
    split = f"{arguments.world_size} devices x {arguments.gradient_accumulation_steps} accumulation steps"
    if sampler.token_budget:
        steps = sampler.steps_per_epoch
        return (
            f"global batch: {sampler.token_budget:,} tokens with padding per device x {split}; "
            f"{steps:,} steps an epoch, of {len(sampler.lengths) / steps:.1f} rows on average"
        )
    rows = arguments.per_device_train_batch_size
    return f"global batch: {rows} rows per device x {split} = {sampler.global_batch_size} rows a step"
