"""transformers' Trainer, with task routing, answer-only logits, length-sorted batches and small checkpoints.

The Trainer takes an injected model for a full model and reserves adapter-only saving for PEFT, so loading and
saving are overridden: every ``checkpoint-N`` is an adapter checkpoint of this library plus the resume state.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mtl_lora.adapter import checkpoint
from mtl_lora.errors import UserError
from mtl_lora.language.collate import Collator
from mtl_lora.language.loss import TaskLosses, token_losses
from mtl_lora.language.tasks import TaskSet
from mtl_lora.language.token_cache import row_columns
from mtl_lora.training.distributed import gathered_adapter_state
from mtl_lora.training.sampler import LENGTH_POOL, LengthBatchSampler

LOG_NAME = "train_log.jsonl"
_STAGING = ".saving"


def batch_sampler(
    rows: datasets.Dataset,
    arguments: TrainingArguments,
    length_pool: int = LENGTH_POOL,
    token_budget: int = 0,
    temperature: float = 1.0,
) -> LengthBatchSampler:
    """This process's micro-batches; raises ``UserError`` as ``LengthBatchSampler`` does."""
    columns = row_columns(rows)
    return LengthBatchSampler(
        columns["length"],
        columns["task_id"],
        arguments.per_device_train_batch_size,
        arguments.seed,
        accumulation=arguments.gradient_accumulation_steps,
        world_size=arguments.world_size,
        rank=arguments.process_index,
        length_pool=length_pool,
        token_budget=token_budget,
        temperature=temperature,
    )


@contextlib.contextmanager
def adapters_attached(model):
    """A block in which transformers takes a quantised base with our adapters for one that may be trained.

    The Trainer refuses a base in 4 or 8 bits unless it carries adapters, and asks for those by PEFT's mark alone.
    """
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


class EpochLoader(DataLoader):
    """A DataLoader whose batch sampler is told the epoch by the Trainer."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class TaskTrainer(Trainer):
    """Trains an injected model on encoded rows (see ``mtl_lora.language.token_cache``)."""

    def __init__(
        self,
        *,
        tasks: TaskSet,
        origin: checkpoint.Origin,
        collator: Collator,
        sampler: LengthBatchSampler | None = None,
        **options,
    ):
        self.tasks, self.origin, self.sampler = tasks, origin, sampler
        self.task_losses = TaskLosses(len(tasks))
        with adapters_attached(options["model"]):
            super().__init__(data_collator=collator, **options)
        # compute_loss below divides by the supervised tokens of the whole step, so the Trainer shall count them and
        # shall not divide again by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def get_train_dataloader(self) -> DataLoader:
        """Each process's own micro-batches; not handed to accelerate, which would shard them once more."""
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self.sampler or batch_sampler(self.train_dataset, self.args),
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of this micro-batch's token losses over the supervised tokens of the whole step.

        The mean per process or micro-batch would weigh tokens by how long other answers are; gradients are averaged
        over processes afterwards, hence the factor.
        """
        losses, task_ids = token_losses(model, inputs)
        self.task_losses.add(losses, task_ids)
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the Trainer's formula is for full fine-tuning."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss per task since the last log line."""
        if "loss" in logs:
            sums, counts = self.task_losses.read()
            for task in self.tasks:
                if counts[task.id]:
                    logs[f"loss/{task.name}"] = (sums[task.id] / counts[task.id]).item()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Mean token loss on held-out rows, over all and per task, exact for any split into batches."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        losses = TaskLosses(len(self.tasks))
        lengths = row_columns(rows)["length"]
        order = np.argsort(lengths, kind="stable")[self.args.process_index :: self.args.world_size]
        model = self.model_wrapped
        model.eval()
        size = self.args.per_device_eval_batch_size
        # ZeRO-3 gathers weights in every forward, so all processes take the same number of batches.
        batches = -(-len(rows) // (size * self.args.world_size))
        for index in range(batches):
            chosen = order[index * size : (index + 1) * size]
            batch = self.data_collator([rows[int(row)] for row in (chosen if len(chosen) else [0])])
            token_loss, task_ids = token_losses(model, self._prepare_inputs(batch))
            if len(chosen):
                losses.add(token_loss, task_ids)
        model.train()
        sums, counts = losses.read()
        metrics = {f"{metric_key_prefix}_loss": (sums.sum() / counts.sum()).item()}
        metrics |= {
            f"{metric_key_prefix}_loss/{task.name}": (sums[task.id] / counts[task.id]).item()
            for task in self.tasks
            if counts[task.id]
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter alone; all processes take part, the first one writes."""
        state = gathered_adapter_state(self.model)
        if self.args.should_save:
            checkpoint.save(self.model, output_dir or self.args.output_dir, self.origin, state)

    def _get_output_dir(self, trial) -> str:
        return os.path.join(self.args.output_dir, _STAGING) if getattr(self, "_saving", False) else self.args.output_dir

    def _save_checkpoint(self, model, trial) -> None:
        """Save beside the run and rename when whole, so that a run killed while saving resumes from the one before."""
        staging = Path(self.args.output_dir) / _STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._barrier()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self._barrier()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            target = Path(self.args.output_dir) / name
            shutil.rmtree(target, ignore_errors=True)
            (staging / name).replace(target)
            shutil.rmtree(staging, ignore_errors=True)
            self._remove_old_checkpoints()
        self._barrier()

    def _remove_old_checkpoints(self) -> None:
        kept = self.args.save_total_limit
        for folder in checkpoints(self.args.output_dir)[: -kept or None] if kept else []:
            shutil.rmtree(folder, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        config = checkpoint.read_config(resume_from_checkpoint)
        state = checkpoint.read_weights(resume_from_checkpoint, config)
        checkpoint.load_state(self.model, state, resume_from_checkpoint)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Non-strict, because the frozen base is not in the checkpoint; the adapter's own names are checked above.
        found, _ = self.model_wrapped.load_checkpoint(
            resume_from_checkpoint,
            load_module_strict=False,
            load_optimizer_states=True,
            load_lr_scheduler_states=True,
        )
        if found is None:  # DeepSpeed only warns, and would train from the start
            raise UserError(f"{resume_from_checkpoint} holds no resume state of DeepSpeed")
        scheduler = torch.load(os.path.join(resume_from_checkpoint, "scheduler.pt"), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared

    def _barrier(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if number and (folder / "trainer_state.json").is_file():
            found.append((int(number.group(1)), folder))
    return [folder for _, folder in sorted(found)]


class LogFile(TrainerCallback):
    """Appends every log line to ``train_log.jsonl``; a resumed run first drops lines after its checkpoint."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / LOG_NAME

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a") as log:
                log.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _step_of(line: str) -> float:
    """The step of a log line; a line torn by a kill counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class RankedDropout(TrainerCallback):
    """Gives each process its own dropout masks; weights were drawn before, alike on all."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + args.process_index)
