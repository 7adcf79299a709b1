"""A training run, the same for every system: check everything, encode the data, build the model, train, save."""

import math
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments, set_seed

import mtl_lora
from mtl_lora import artifacts, files
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.analysis import write_analysis
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.layer import layer_class
from mtl_lora.base_model import BaseModel, choose_dtype, enable_checkpointing
from mtl_lora.errors import UserError, note
from mtl_lora.systems import SYSTEMS, part
from mtl_lora.tasks import TaskSet
from mtl_lora.training import distributed, resume
from mtl_lora.training.config import ADAPTER_FLAGS, TrainingConfig
from mtl_lora.training.rows import counts_note, row_columns, rows_sha256, shortened_note, split
from mtl_lora.training.sampler import LengthGroupedBatchSampler, StepSampler
from mtl_lora.training.trainer import Batch, MultiTaskTrainer, training_arguments
from mtl_lora.version import checkout_commit

_STEP = 16  # tokens; with CUDA graphs, batches are padded to a multiple of this or to the cutoff


class Run:
    """One training run; a system's subclass defines its examples, its model and its losses.

    Set during the run: ``adapter`` (the adapter configuration), ``arguments`` (the Trainer's), ``train`` (the training
    rows), ``encoded`` (a hash of all rows; None for images, which are read only when they are used).
    """

    tasks: TaskSet
    adapter: AdapterConfig
    arguments: TrainingArguments
    train: datasets.Dataset
    encoded: str | None
    shortened_at: str = ""  # where an example longer than the cutoff loses tokens; empty: the system has no cutoff
    limit: str = "the cutoff"  # what shortens examples, in words
    mean_by_task = False  # see ``MultiTaskTrainer``
    has_heads = False  # whether the model has weights of its own for each task, besides the adapter's
    start: checkpoint.CheckpointConfig | None = None  # of the checkpoint ``start_from``
    # See ``balanced_order`` and ``rows.split``; of a run that is resumed, what it began with.
    step_choices: int | None = None
    held_out_by_task = True

    def __init__(self, config: TrainingConfig):
        self.config, self.tasks = config, config.task_set()
        self.base = BaseModel(config.base_model, config.trust_remote_code, SYSTEMS[config.system])

    # ---- what a system defines ----

    def place_adapter(self, adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
        """Return the adapter configuration for this model, and notes to print; raises ``UserError`` for target modules
        that the model does not have."""
        raise NotImplementedError

    def rows(self, digest: str) -> datasets.Dataset:
        """Return the encoded examples of the data file, whose sha256 is ``digest``; raises ``UserError`` for invalid
        data."""
        raise NotImplementedError

    def data_sha256(self) -> str:
        """Return a hash of the contents of ``--data_path``."""
        return files.sha256(self.config.data_path)

    def columns(self, rows: datasets.Dataset) -> dict[str, np.ndarray]:
        """Return the numeric columns of the rows, each (N,): at least ``length`` and ``task_id``."""
        return row_columns(rows)

    def check_rows(self, rows: datasets.Dataset) -> None:
        """Raise ``UserError`` for rows longer than the model allows."""
        longest = int(row_columns(rows)["length"].max())
        way_out = f"the longest example; lower --cutoff_len, which is {self.config.cutoff_len}"
        self.base.check_positions(longest, way_out)

    def task_counts(self, rows: datasets.Dataset) -> np.ndarray:
        """Return the number of examples of each task, (T,)."""
        return np.bincount(row_columns(rows)["task_id"], minlength=len(self.tasks))

    def plan(self, structure: PreTrainedModel) -> tuple[np.ndarray, bool]:
        """Return the lengths (N,) of ``train`` by which batches are planned, and whether the examples of a step are
        distributed to its micro-batches by task."""
        return self.columns(self.train)["length"], False

    def sampler(self, lengths: np.ndarray, task_ids: np.ndarray, group_tasks: bool) -> StepSampler:
        """Return the sampler of this process's micro-batches of ``train``; lengths, group_tasks: from ``plan``."""
        config, arguments = self.config, self.arguments
        return LengthGroupedBatchSampler(
            lengths,
            task_ids,
            config.batch_size,
            config.seed,
            accumulation=config.gradient_accumulation_steps,
            world_size=arguments.world_size,
            rank=arguments.process_index,
            length_pool=config.length_pool,
            token_budget=config.token_budget,
            temperature=config.sampling_temperature,
            group_tasks=group_tasks,
            choices=self.step_choices,
        )

    def load_base(self) -> PreTrainedModel:
        """Return the model that gets the adapter."""
        return self.base.load(self.config.dtype, self.config.load_in_4bit)

    def ends(self) -> tuple[Callable, Callable[[torch.nn.Module, Batch], tuple]]:
        """Return the collator and the losses, see ``MultiTaskTrainer``."""
        raise NotImplementedError

    def facts(self) -> dict[str, object]:
        """Return the system's own entries of the run configuration."""
        return {}

    def deciding_facts(self, configuration: dict) -> dict[str, object]:
        """Return what besides the flags decides the weights in a run configuration, keyed by its wording in an error.

        Titles and columns of the tasks are left out, as they do not matter. A value is None where an earlier version
        did not record it.
        """
        tasks = type(self.tasks).from_json(configuration.get("tasks"), "the run configuration")
        return {
            "the data file": configuration.get("data_sha256"),
            "the tasks": tasks.answers_sha256,
            "the tasks' loss weights": {task.name: task.weight for task in tasks},
            "the base model's files": configuration.get("base_fingerprint"),
            "the base model's configuration": configuration.get("base_config"),
            "the examples' tokens, which depend on tokenizer and chat template too": configuration.get("rows_sha256"),
            "the dtype that --dtype auto selects": configuration.get("dtype"),
            "the parameters without weight decay": configuration.get("no_decay", []),
            "the weights in --start_from": configuration.get("start_sha256"),
        }

    def provenance(self) -> dict[str, object]:
        """Return the system's own fields of ``checkpoint.Provenance``, which checkpoints record."""
        return {}

    # ---- CUDA graphs ----

    @property
    def cuda_graphs(self) -> bool:
        """Whether steps are recorded as CUDA graphs, see ``MultiTaskTrainer``."""
        return self.config.cuda_graphs and self.arguments.device.type == "cuda" and self.arguments.world_size == 1

    def recorded_lengths(self) -> list[int]:
        """Return the few lengths to which batches are padded if steps are recorded as CUDA graphs, else an empty
        list."""
        if not self.cuda_graphs:
            return []
        return [*range(_STEP, self.config.cutoff_len, _STEP), self.config.cutoff_len]

    # ---- the run ----

    def run(self) -> None:
        """Train, or with ``check`` stop before the model is loaded; the caller has claimed the output folder."""
        config, base = self.config, self.base
        from_checkpoint = resume.checkpoint_to_resume(config)
        self.step_choices, self.held_out_by_task = resume.data_plan(from_checkpoint)
        base.check_quantisation(training=True)
        # This precedes the Trainer's arguments, because ZeRO-3 partitions every model that is created after them.
        structure = self.structure()
        notes = self._configure_adapter(structure)
        if config.start_from:
            self.start = self._read_start(config.start_from)
        self.arguments = training_arguments(config)
        distributed.check_deepspeed_values(self.arguments, one_process=config.check)
        digest = self.data_sha256()
        # One process of each node tokenises; the others read its cache.
        several = self.arguments.world_size > 1
        with PartialState().local_main_process_first() if several else nullcontext():
            rows = self.rows(digest)
        self.check_rows(rows)
        self.encoded = rows_sha256(rows) if isinstance(rows, datasets.Dataset) else None
        self.train, held_out = split(rows, config.val_set_size, config.seed, self.held_out_by_task)
        note(*notes)
        if config.cuda_graphs and not self.cuda_graphs:
            note("--cuda_graphs has no effect here, because it needs a GPU and a single process")
        lengths, group_tasks = self.plan(structure)
        sampler = self.sampler(lengths, self.columns(self.train)["task_id"], group_tasks)
        self.step_choices = getattr(sampler, "choices", None)
        where = self.shortened_at
        shortened = f"; {shortened_note(rows, self.limit, config.cutoff_len, where)}" if where else ""
        note(f"{sampler}\n{len(rows):,} examples{shortened}")
        counts, held_counts = self.task_counts(self.train), self.task_counts(held_out) if held_out else None
        note(counts_note(self.tasks.names, counts, held_counts, config.sampling_temperature))
        if weighted := [f"{task.name} {task.weight:g}" for task in self.tasks if task.weight != 1]:
            note(f"loss weights: {', '.join(weighted)}")
        untrained = self._untrained(sampler, counts)
        configuration = self.configuration(digest)
        if from_checkpoint:
            kind = type(config)
            resume.check_same_run(from_checkpoint, configuration, kind, self.deciding_facts, devices=not config.check)
            resume.check_state(from_checkpoint, config.deepspeed)
        if config.check:
            more = "" if several else "; a launch on N devices uses N such batches in a step"
            note(f"every setting is fine{more}")
            return
        model = self.build()
        base.check_unchanged(configuration["base_fingerprint"])
        collator, losses = self.ends()
        # An older run is deleted only now, after every check.
        resume.begin_output(config, self.arguments, configuration, from_checkpoint)
        start = checkpoint.adapter_state(model)  # in all processes, because ZeRO-3 gathers it
        if self.arguments.process_index == 0 and not from_checkpoint:
            checkpoint.save_start(model, config.output_dir, start)
        trainer = MultiTaskTrainer(
            model=model,
            args=self.arguments,
            losses=losses,
            collator=collator,
            tasks=self.tasks.names,
            sampler=sampler,
            provenance=checkpoint.Provenance(
                base_model=base.lasting_name,
                base_fingerprint=configuration["base_fingerprint"],
                task_set=self.tasks.to_json(),
                train_settings=config.to_json(),
                data_sha256=digest,
                commit=checkout_commit(),
                system=config.system,
                untrained_tasks=untrained,
                **self.provenance(),
            ),
            train_dataset=self.train,
            eval_dataset=held_out,
            task_weights=[task.weight for task in self.tasks],
            mean_by_task=self.mean_by_task,
            cuda_graphs=self.cuda_graphs,
        )
        self._train(trainer, from_checkpoint)

    def _configure_adapter(self, structure: PreTrainedModel) -> list[str]:
        """Set the adapter's configuration for the model on the meta device; return notes to print."""
        config = self.config
        if config.cuda_graphs and getattr(structure.config, "layerdrop", 0):
            raise UserError(f"{config.base_model} skips layers at random (layerdrop); leave out --cuda_graphs")
        try:
            self.adapter, notes = self.place_adapter(config.adapter_config(self.tasks), structure)
        except UserError as error:
            own = str(error).split(maxsplit=1)[0].rstrip(":") in {flag.name for flag in type(config).flags()}
            raise UserError(f"--{error}" if own else f"--lora_target_modules: {error}") from None
        given = {flag.name for flag in config.flags() if getattr(config, flag.name) != flag.default}
        if idle := sorted(given & self.unread):
            notes = [*notes, f"{self.adapter.method} does not read {', '.join(f'--{name}' for name in idle)}"]
        return notes

    def _read_start(self, folder: str) -> checkpoint.CheckpointConfig:
        """Return the configuration of a checkpoint that this training may start from; raises ``UserError`` for one of
        another system, base model or adapter, and for one that this training would delete."""
        found = checkpoint.read_config(folder)
        origin = found.provenance_config
        if origin.system != self.config.system:
            raise UserError(f"--start_from {folder} is of --system {origin.system}; pass that")
        if origin.base_fingerprint not in (None, self.base.fingerprint()):
            raise UserError(f"--start_from {folder} is of another base model; pass --base_model {origin.base_model}")
        checkpoint.require_same_method(self.adapter, found.adapter_config, folder)
        known = origin.task_set and type(self.tasks).from_json(origin.task_set, f"the task set of {folder}")
        if self.has_heads and (not known or known.answers_sha256 != self.tasks.answers_sha256):
            tasks = f"the tasks {', '.join(known.names)}" if known else "tasks that it does not record"
            raise UserError(
                f"--start_from {folder} has heads for {tasks}; train exactly these (with their labels), or leave it out"
            )
        if Path(folder).resolve().is_relative_to(Path(self.config.output_dir).resolve()):
            raise UserError(f"--start_from {folder} is in --output_dir, which this training writes; name another one")
        return found

    def _untrained(self, sampler: StepSampler, counts: np.ndarray) -> list[str]:
        """Return the names of the tasks without an example in the run, and say them. counts: examples by task, (T,)."""
        config, trained = self.config, {int(task_id) for task_id in counts.nonzero()[0]}
        if trained == {*sampler.task_ids.tolist()}:  # not of images, which have several tasks under one id
            steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_epochs * sampler.steps_per_epoch)
            trained = sampler.tasks_met(steps)
        untrained = [task.name for task in self.tasks if task.id not in trained]
        if self.start:
            before = {*self.start.adapter_config.tasks} - {*(self.start.provenance_config.untrained_tasks or ())}
            if kept := [name for name in untrained if name in before]:
                note(f"no training examples of {', '.join(kept)}: what only these tasks use stays that of --start_from")
            untrained = [name for name in untrained if name not in before]
        if untrained:
            where = " in these steps" if any(counts[self.tasks[name].id] for name in untrained) else ""
            names = ", ".join(untrained)
            kept = "keep their initial values" + " but for weight decay" * bool(config.weight_decay)
            note(f"no training examples of {names}{where}: weights that only these tasks use {kept}")
        return untrained

    def _train(self, trainer: MultiTaskTrainer, from_checkpoint: Path | None) -> None:
        """Train and save the adapter with its analysis; raises ``UserError`` if the GPU's memory is too small."""
        config = self.config
        try:
            trainer.train(resume_from_checkpoint=str(from_checkpoint) if from_checkpoint else None)
        except torch.OutOfMemoryError:
            ways = ["a smaller --batch_size with more --gradient_accumulation_steps"]
            if config.cuda_graphs:
                ways = ["a smaller --batch_size"]
            elif not config.use_gradient_checkpointing:
                ways.insert(0, "--use_gradient_checkpointing True (allowed when resuming too)")
            raise UserError(f"the GPU has too little memory for a step; pass {', or '.join(ways)}") from None
        trainer.save_model(config.output_dir)
        if self.arguments.process_index == 0:
            write_analysis(config.output_dir)
        trainer.accelerator.wait_for_everyone()
        note(f"saved the adapter to {config.output_dir}")
        best = trainer.best_checkpoint
        if best and best != artifacts.checkpoints(best.parent)[-1]:
            note(f"the validation loss was lowest in {best}, which can be evaluated like the adapter")

    def structure(self) -> PreTrainedModel:
        """Return the model that gets the adapter, on the meta device."""
        return self.base.structure()

    def count(self) -> tuple[int, int]:
        """Return the (trainable, total) number of parameters of the model, counted on the meta device."""
        model = self.structure()
        adapter, _ = self.place_adapter(self.config.adapter_config(self.tasks), model)
        return mtl_lora.trainable_parameters(mtl_lora.inject(model, adapter))

    @property
    def unread(self) -> set[str]:
        """The flags that the method does not read: hyperparameters of other methods, and without an adapter its own."""
        method = layer_class(self.adapter.method)
        of_adapters = {*ADAPTER_FLAGS.values()} - {"adapter_name", "modules_to_save"}
        hyperparameters = self.config.hyperparameters.keys() - {flag.name for flag in method.Hyperparameters.flags()}
        return hyperparameters if method.adapts else hyperparameters | of_adapters

    def configuration(self, digest: str) -> dict:
        """Return the content of ``run.json``: the flags, and what they resolve to on this machine.

        digest: the sha256 of the data file.
        """
        config, layer = self.config, layer_class(self.adapter.method)
        return {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": config.to_json(),
            "unused_settings": sorted(self.unread),
            "tasks": self.tasks.to_json(),
            "data_sha256": digest,
            "rows_sha256": self.encoded,
            "base_fingerprint": self.base.fingerprint(),
            "base_config": self.base.config_sha256(),
            "dtype": str(choose_dtype(config.dtype)),
            "no_decay": list(layer.no_decay) if config.weight_decay else [],
            "world_size": self.arguments.world_size,
            "deepspeed_sha256": distributed.deepspeed_sha256(config.deepspeed),
            "start_sha256": self.start and self.start.weights_sha256,
            "step_choices": self.step_choices,
            "held_out_by_task": self.held_out_by_task,
            **self.facts(),
        }

    def build(self) -> PreTrainedModel:
        """Return the base model with the adapter, initialised from the seed."""
        config = self.config
        distributed.init_deepspeed(config)
        set_seed(config.seed)
        with distributed.loading_base(config.dtype):
            model = self.load_base()
        mtl_lora.inject(model, self.adapter)
        if self.start:
            new = checkpoint.start_from(model, config.start_from)
            note(f"started from {config.start_from}" + f"; new tasks: {', '.join(new)}" * bool(new))
        if config.use_gradient_checkpointing:
            enable_checkpointing(model)
        trainable, total = mtl_lora.trainable_parameters(model)
        note(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
        return model


def train(config: TrainingConfig) -> None:
    """Train as ``config`` says, or with ``check`` stop before the model is loaded.

    Raises ``UserError`` for every mistake that can be found before training. The caller must have prepared the process
    (``distributed.prepare_process``), and leaves the process group afterwards.
    """
    one = part(config.system, "train").RUN(config)
    distributed.check_launch(config)
    config.check_files()
    with nullcontext() if config.check else files.claimed(config.output_dir):
        one.run()
