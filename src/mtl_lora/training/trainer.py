"""transformers' Trainer for many tasks: weighted losses of any system, grouped batches, small checkpoints, logs.

The Trainer treats an injected model as a full model and saves adapters alone only for PEFT. Loading and saving are
therefore overridden: every ``checkpoint-N`` is an adapter checkpoint of this library plus the resume state.
"""

import functools
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mtl_lora import artifacts, files, train_log
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.targets import adapter_layers, is_expert, layers_in_words
from mtl_lora.errors import UserError
from mtl_lora.training.config import TrainingConfig
from mtl_lora.training.cuda_graphs import GraphedSteps
from mtl_lora.training.distributed import deepspeed_settings
from mtl_lora.training.rows import row_columns
from mtl_lora.training.sampler import StepSampler

# Copies of the trained weights in a checkpoint: the adapter and the two moments of AdamW, and with DeepSpeed up to two
# more (its own state of the model, and ZeRO's master weights).
_COPIES, _COPIES_OF_DEEPSPEED = 3, 5
# Flags with the same name in the Trainer's arguments.
_SAME_NAMES = ("output_dir", "gradient_accumulation_steps", "max_steps", "learning_rate", "weight_decay")
_SAME_NAMES += ("max_grad_norm", "lr_scheduler_type", "logging_steps", "seed")
Batch = Mapping[str, torch.Tensor]


def training_arguments(config: TrainingConfig) -> TrainingArguments:
    """Return the Trainer's arguments; making them joins the process group of a distributed launch."""
    saving = "steps" if config.save_step else "no"
    try:
        arguments = TrainingArguments(
            **{name: getattr(config, name) for name in _SAME_NAMES} | config.trainer_options(),
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            num_train_epochs=config.num_epochs,
            warmup_steps=config.warmup_ratio,
            optim="adamw_torch",
            logging_nan_inf_filter=False,
            save_strategy=saving,
            save_steps=max(config.save_step, 1),
            save_total_limit=config.save_total_limit or None,
            eval_strategy=saving if config.val_set_size else "no",
            eval_steps=max(config.save_step, 1),
            use_cpu=not torch.cuda.is_available(),
            deepspeed=deepspeed_settings(config.deepspeed) if config.deepspeed else None,
            report_to=["wandb"] * bool(config.wandb_project) + ["tensorboard"] * config.tensorboard or "none",
            disable_tqdm=True,  # ``Progress`` shows one bar
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            # No autocast: the base model already has its dtype, and adapter parameters stay float32.
            bf16=False,
            fp16=False,
        )
    except Exception as error:  # DeepSpeed and accelerate read the configuration without validating it
        if not config.deepspeed or isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"the DeepSpeed configuration {config.deepspeed} does not work here: {reason}") from None
    # With several GPUs and no launcher, the Trainer would use DataParallel, whose threads do not get the task ids.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class LossSums:
    """Sums of weighted losses and of weights by task since the last ``read``, on the device: no synchronisation."""

    def __init__(self, tasks: int, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(2, tasks, dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, weights: torch.Tensor, task_ids: torch.Tensor) -> None:
        """Add losses (N,) with their weights (N,) to their tasks (N,)."""
        weights = weights.detach().to(self.sums.dtype)
        self.sums.index_add_(1, task_ids, torch.stack([losses.detach().to(self.sums.dtype) * weights, weights]))

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sums of weighted losses, sums of weights), each (T,), over all processes, and reset them to zero."""
        # A process without examples takes part too, on its device, because NCCL only sums tensors on the device.
        sums = self.sums.clone()
        self.sums.zero_()  # in place, because a recorded step adds to this memory
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return sums[0].cpu(), sums[1].cpu()


class MultiTaskTrainer(Trainer):
    """Trains an injected model of any system.

    losses: ``(model, batch) -> losses (N,), weights (N,), task ids (N,)``, where an entry is whatever the system counts
    (a token, an example, a pixel). The loss of a step is the sum of the losses, each times its weight and its task's
    weight, divided by the sum of the entries' weights, over all micro-batches and processes of the step. Tasks' weights
    are left out of the divisor, in which they would cancel if a step had one task. collator: turns examples into a
    batch, which holds the inputs of ``losses`` and the scalar ``loss_weight``, the sum of the weights that ``losses``
    will return. tasks: task names in id order. provenance: recorded in every checkpoint. task_weights: (T,), by default
    ones. mean_by_task: the loss of a step is the sum over tasks of the task's weight times its mean loss, and
    ``loss_weight`` is (T,). cuda_graphs: whether to record and replay steps, which must have one micro-batch in one
    process, see ``GraphedSteps``.
    """

    def __init__(
        self,
        *,
        losses: Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        collator: Callable[[Sequence], Batch],
        tasks: Sequence[str],
        sampler: StepSampler,
        provenance: checkpoint.Provenance,
        task_weights: Sequence[float] | None = None,
        mean_by_task: bool = False,
        cuda_graphs: bool = False,
        **options,
    ):
        self.losses, self.tasks, self.sampler, self.provenance = losses, list(tasks), sampler, provenance
        self.mean_by_task = mean_by_task
        self._began: int | None = None  # the step after which this process began to train; None before that
        self.room: BinaryIO | None = None
        # The Trainer refuses a base model in 4 or 8 bits unless it has adapters, which it recognises by PEFT's mark.
        model = options["model"]
        before, model._hf_peft_config_loaded = getattr(model, "_hf_peft_config_loaded", False), True
        try:
            super().__init__(data_collator=collator, **options)
        finally:
            model._hf_peft_config_loaded = before
        self.task_losses = LossSums(len(self.tasks), self.args.device)
        weights = [1.0] * len(self.tasks) if task_weights is None else task_weights
        self.task_weights = torch.tensor(weights, dtype=torch.float64, device=self.args.device)
        self.graphed: GraphedSteps | None = None
        if cuda_graphs:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.graphed = GraphedSteps(functools.partial(super().training_step, model), trained)
        # compute_loss divides by the weights of the whole step; the Trainer must not also divide by the micro-batches.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        for callback in (LogFile, GradientCheck, Progress):
            self.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's micro-batches; not prepared by accelerate, which would shard them a second time."""
        options = {"collate_fn": self.data_collator, "pin_memory": self.args.device.type == "cuda"}
        options["num_workers"] = self.args.dataloader_num_workers
        return DataLoader(self.train_dataset, batch_sampler=self.sampler, **options)

    def get_batch_samples(self, *arguments, **options):
        """As the Trainer's; a ``UserError`` of a data loader process is raised again without that process's
        traceback in its message."""
        try:
            return super().get_batch_samples(*arguments, **options)
        except UserError as error:
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None

    def get_decay_parameter_names(self, model) -> list[str]:
        """Return the names of the parameters with weight decay: not norms, biases and what a layer declares as
        ``no_decay``."""
        names, spared = super().get_decay_parameter_names(model), set()
        # Without weight decay, keep the parameter groups that optimiser states of earlier versions have.
        if self.args.weight_decay:
            spared = {f"{name}.{key}" for name, layer in adapter_layers(model).items() for key in layer.no_decay}
        return [name for name in names if name not in spared]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Return the sum of the weights of a step over all micro-batches and processes, () or (T,) float32."""
        total = sum((batch["loss_weight"] for batch in batch_samples), torch.zeros(())).to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total[None]).sum(dim=0)
        return total.clamp(min=torch.finfo(total.dtype).tiny)  # so that a step without any weight has loss zero

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run the forward and backward pass of a micro-batch, with ``cuda_graphs`` by recording and replaying it."""
        if self.graphed is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self.graphed(inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the weighted sum of this micro-batch's losses divided by the weights of the whole step.

        With a mean per process or micro-batch, the weight of an entry would depend on the number of entries beside it.
        The factor ``num_processes`` compensates for gradients being averaged over processes afterwards.
        """
        losses, weights, task_ids = self.losses(model, inputs)
        self.task_losses.add(losses, weights, task_ids)
        total = num_items_in_batch
        if self.mean_by_task:
            # Divide the weights first: for a task without weight in the step, task_weights / total would overflow.
            weights, total = weights / total[task_ids], 1.0
        weights = weights * self.task_weights[task_ids].to(weights.dtype)
        return (losses * weights).sum() / total * self.accelerator.num_processes

    def floating_point_ops(self, inputs) -> int:
        """Return 0: operations are not counted, because the Trainer's formula is for full fine-tuning."""
        return 0

    def _run_epoch(self, *arguments, epoch: int, **options) -> None:
        if self._began is None:
            self._began = self.state.global_step
            # Each process draws its own dropout masks; the parameters were drawn before, the same in all processes.
            torch.manual_seed(self.args.seed + self.args.process_index)
        # The Trainer checks only after a step whether it was the last; a run resumed at its end would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # Not left to the data loader: when an epoch is resumed, the Trainer uses another one that lacks the epoch.
        self.sampler.set_epoch(epoch)
        self._collate_as_in(epoch)
        super()._run_epoch(*arguments, epoch=epoch, **options)

    def _collate_as_in(self, epoch: int) -> None:
        """Tell the epoch to a collator that draws at random anew in each epoch."""
        if hasattr(self.data_collator, "set_epoch"):
            self.data_collator.set_epoch(epoch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the loss per task since the last log line; raises ``UserError`` for a value that is not finite."""
        if "train_loss" in logs:
            if self._began in (None, self.state.global_step):
                return  # no step was taken, so there is no mean
            # transformers also counts the steps before a resume, and the losses not yet logged are this process's
            # alone.
            total = torch.tensor([self._total_loss_scalar], dtype=torch.float64, device=self.args.device)
            logs["train_loss"] = self.accelerator.gather(total).mean().item() / (self.state.global_step - self._began)
            # The first assumes batch_size examples per micro-batch; the second is always 0.
            logs = {key: value for key, value in logs.items() if key not in ("train_samples_per_second", "total_flos")}
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at step {self.state.global_step} of {self.state.max_steps} or since the last "
                    "log line; lower --learning_rate, or resume from an earlier checkpoint"
                )
        if "loss" in logs:
            logs |= self._by_task("loss", *self.task_losses.read())
        super().log(logs, start_time)

    def _by_task(self, key: str, sums: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
        """Return the mean loss of every task that has any weight, as ``key/task``."""
        means = zip(self.tasks, sums.tolist(), weights.tolist(), strict=True)
        return {f"{key}/{task}": total / weight for task, total, weight in means if weight}

    @torch.no_grad()
    def evaluate(self, ignore_keys=None) -> dict[str, float]:
        """Return the mean loss on held-out examples, over all and per task, exact for any split into batches."""
        examples, losses = self.eval_dataset, LossSums(len(self.tasks), self.args.device)
        lengths = row_columns(examples)["length"]  # batches of similar length
        order = np.argsort(lengths, kind="stable")[self.args.process_index :: self.args.world_size]
        model, size = self.model_wrapped, self.args.per_device_eval_batch_size
        model.eval()
        self._collate_as_in(0)  # held-out examples always get the answers drawn for epoch 0
        # ZeRO-3 gathers parameters in every forward, so all processes must run the same number of batches.
        for index in range(-(-len(examples) // (size * self.args.world_size))):
            chosen = order[index * size : (index + 1) * size]
            batch = self.data_collator([examples[int(row)] for row in (chosen if len(chosen) else [0])])
            found = self.losses(model, self._prepare_inputs(batch))
            if len(chosen):
                losses.add(*found)
        model.train()
        self._collate_as_in(self.sampler.epoch)
        sums, weights = losses.read()
        total = weights.clamp(min=torch.finfo(weights.dtype).tiny) if self.mean_by_task else weights.sum()
        mean = (sums / total) @ self.task_weights.cpu()
        metrics = {"eval_loss": mean.item(), **self._by_task("eval_loss", sums, weights)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----

    def train(self, *arguments, **options):
        """As the Trainer's, but reserves disk space for the next save before it starts.

        Raises ``UserError`` for too little space, at the start or right after a checkpoint, so that no step is lost.
        """
        self._reserve_room(checkpoints=self.args.save_strategy != "no")
        try:
            return super().train(*arguments, **options)
        except BaseException:
            self._release_room()
            raise

    def _reserve_room(self, checkpoints: bool) -> None:
        """Reserve disk space for the final adapter, and for a checkpoint if there are more to come."""
        self._release_room()
        if self.args.should_save:
            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            size = sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in weights)
            copies = _COPIES_OF_DEEPSPEED if self.is_deepspeed_enabled else _COPIES
            self.room = files.reserved(self.args.output_dir, size * (1 + copies * checkpoints) + 2**20)

    def _release_room(self) -> None:
        if self.room:
            self.room.close()
            self.room = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter alone; all processes take part, the first one writes."""
        state = checkpoint.adapter_state(self.model)
        self._release_room()
        if self.args.should_save:
            checkpoint.save(self.model, output_dir or self.args.output_dir, self.provenance, state)

    def _get_output_dir(self, trial) -> str:
        """Return the staging folder, in which the Trainer saves and, at its end, finds nothing to delete."""
        return os.path.join(self.args.output_dir, artifacts.SAVING)

    def _save_checkpoint(self, model, trial) -> None:
        """Save to a staging folder and rename it when complete, so a run killed while saving resumes from the previous
        checkpoint."""
        staging = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (complete,) = artifacts.checkpoints(staging)
            files.take_place(complete, Path(self.args.output_dir) / complete.name)
            shutil.rmtree(staging, ignore_errors=True)
            kept, best = self.args.save_total_limit, self.best_checkpoint
            for folder in artifacts.checkpoints(self.args.output_dir)[: -kept or None] if kept else []:
                if folder != best:
                    artifacts.remove_checkpoint(folder)
        self._reserve_room(checkpoints=self.state.global_step < self.state.max_steps)
        self.accelerator.wait_for_everyone()

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint in the output folder with the lowest validation loss, of equal ones the first; None without
        one."""
        entries = [entry for entry in self.state.log_history if "eval_loss" in entry]
        losses = {f"checkpoint-{entry['step']}": entry["eval_loss"] for entry in entries}
        found = [folder for folder in artifacts.checkpoints(self.args.output_dir) if folder.name in losses]
        return min(found, key=lambda folder: losses[folder.name], default=None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        state = checkpoint.read_weights(resume_from_checkpoint, checkpoint.read_config(resume_from_checkpoint))
        checkpoint.load_state(self.model, state, resume_from_checkpoint)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Not strict, because the checkpoint lacks the frozen base model; the adapter's names are checked above.
        found, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        if found is None:  # DeepSpeed only warns and would train from the start
            raise UserError(f"{resume_from_checkpoint} holds no resume state of DeepSpeed")
        scheduler = torch.load(os.path.join(resume_from_checkpoint, "scheduler.pt"), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared


class LogFile(TrainerCallback):
    """Appends every log line to ``train_log.jsonl``; a resumed run first drops the lines after its checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed state has the earlier run's logging and saving intervals
        if state.is_world_process_zero:
            train_log.drop_after(Path(args.output_dir) / artifacts.TRAIN_LOG, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            train_log.append(Path(args.output_dir) / artifacts.TRAIN_LOG, state.global_step, logs)


class Progress(TrainerCallback):
    """Shows progress: on a terminal a progress bar with the latest loss, otherwise a line for every log line."""

    bar = tqdm(disable=True)  # an evaluation before any training also logs
    began = 0  # the step at which this process began

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        only_step = state.max_steps == 1 and state.global_step == 0
        if only_step and state.is_world_process_zero and not any(lr_scheduler.get_last_lr()):
            note = "the only step warms up, with learning rate 0, which trains nothing; pass --warmup_ratio 0"
            tqdm.write(f"note: {note}", sys.stderr)
        self.began, how = state.global_step, {"desc": "training", "unit": "step", "dynamic_ncols": True}
        shown = state.is_world_process_zero and sys.stderr.isatty()
        self.bar = tqdm(total=state.max_steps, initial=self.began, disable=not shown, **how)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}")
        since = f" (since step {self.began})" if self.began else ""
        names = {"eval_loss": "validation loss", "train_loss": f"mean training loss{since}"}
        for key, name in ({"loss": "loss", **names} if self.bar.disable else names).items():
            if key in logs and state.is_world_process_zero:
                self.bar.write(f"step {state.global_step} of {state.max_steps}: {name} {logs[key]:.4f}", sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class GradientCheck(TrainerCallback):
    """Names the adapter layers that the first step calls but gives no gradient: they would keep their initial values.

    Experts are left out, because a router chooses them. Under DeepSpeed, which keeps gradients elsewhere, nothing is
    checked.
    """

    is_done = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.is_done or args.deepspeed or not state.is_world_process_zero:
            return
        self.is_done, layers = True, adapter_layers(model)
        weights = {name: layer.adapter_parameters().values() for name, layer in layers.items() if not is_expert(name)}
        unreached = [name for name, own in weights.items() if all(weight.grad is None for weight in own)]
        if unreached and len(unreached) < len(weights):  # if none has a gradient, they are kept elsewhere
            tqdm.write(
                f"note: no gradient in the first step for {layers_in_words(unreached, layers)}; if its output never "
                "reaches the loss, name target modules without it",
                sys.stderr,
            )
