"""What finetune.py does: check everything, then build the model and train it."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import mtl_lora
from mtl_lora.adapter import checkpoint, routing
from mtl_lora.adapter.analysis import write_analysis
from mtl_lora.adapter.inject import find_targets
from mtl_lora.base_model import BaseModel
from mtl_lora.config import AdapterConfig
from mtl_lora.errors import UserError
from mtl_lora.language.collate import Collator
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.describe import describe, describe_batch
from mtl_lora.language.tasks import TaskSet
from mtl_lora.language.token_cache import training_rows
from mtl_lora.memory import keep_freed_memory
from mtl_lora.training.distributed import (
    base_in,
    check_launch,
    check_values,
    deepspeed_file,
    join,
    prepare,
    require_package,
)
from mtl_lora.training.fitting import fitted, tried_on
from mtl_lora.training.resume import check_same_run, claim_output, resume_folder, run_facts
from mtl_lora.training.trainer import LogFile, RankedDropout, TaskTrainer, batch_sampler
from mtl_lora.version import checkout_commit

# On a CPU the backward pass of torch's fused attention takes several times that of the plain products, and at this
# length their (L, L) scores are small.
_EAGER_LENGTH = 512


def run(config: TrainConfig) -> None:
    """Check the settings, tokenise, train, save. A process that ends here leaves its process group itself."""
    tasks = config.task_set()
    adapter = config.adapter_config(tasks)
    check_files(config)
    resume = resume_folder(config)
    check_targets(config, adapter)  # before the arguments are made, for from then on ZeRO-3 cuts every new model
    prepare(config.deepspeed)
    arguments = training_arguments(config)
    check_values(arguments, config.check)
    tokenizer = BaseModel(config.base_model, config.trust_remote_code).tokenizer()
    # One process of each node tokenises, the others read its cache.
    with PartialState().local_main_process_first() if arguments.world_size > 1 else nullcontext():
        rows = training_rows(
            config.data_path,
            tokenizer,
            config.template,
            config.cutoff_len,
            tasks,
            config.cache_dir,
            progress=arguments.local_process_index == 0,
        )
    train_rows, held_out = split(rows, config)
    options = config.length_pool, config.token_budget, config.sampling_temperature
    sampler = batch_sampler(train_rows, arguments, *options)
    collator = Collator(tokenizer.pad_token_id, config.train_on_inputs)
    say = print if arguments.process_index == 0 else lambda *_, **__: None
    say(describe(config, arguments, sampler, rows), file=sys.stderr, flush=True)
    facts = run_facts(config, arguments, tasks)
    if resume:
        check_same_run(resume, facts, devices=not config.check)
    if config.check:
        say("every setting is fine", file=sys.stderr)
        return
    join(config.deepspeed)
    set_seed(config.seed)
    with base_in(config.dtype):
        model = BaseModel(config.base_model, config.trust_remote_code).load(config.dtype)
    keep_freed_memory(arguments.device.type)
    if arguments.device.type == "cpu" and config.cutoff_len <= _EAGER_LENGTH:
        model.set_attn_implementation("eager")
    mtl_lora.inject(model, adapter)
    if config.use_gradient_checkpointing:
        routing.enable_gradient_checkpointing(model)
    if tried_on(arguments.device, config):
        arguments = training_arguments(fitted(config, model, train_rows, collator, arguments.device))
        sampler = batch_sampler(train_rows, arguments, *options)
        say(describe_batch(arguments, sampler), file=sys.stderr, flush=True)
    trained, total = mtl_lora.trainable_parameters(model)
    say(f"training {trained:,} of {total:,} weights ({100 * trained / total:.3f} %)", file=sys.stderr, flush=True)
    # From here on the folder is this run's: whatever can be wrong was found before an older run is deleted.
    claim_output(config, arguments, facts)
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        tasks=tasks,
        origin=origin_of(config, tasks, facts["base_fingerprint"]),
        collator=collator,
        sampler=sampler,
        train_dataset=train_rows,
        eval_dataset=held_out,
        callbacks=[LogFile(config.output_dir), RankedDropout()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(config.output_dir)
    if arguments.process_index == 0:
        write_analysis(config.output_dir)
    trainer.accelerator.wait_for_everyone()
    say(f"saved the adapter to {config.output_dir}", file=sys.stderr)


def check_files(config: TrainConfig) -> None:
    """Raise ``UserError`` for an input file or package that is not there; nothing is loaded yet."""
    check_launch(config.deepspeed, config.dtype, config.batch_size)
    if not Path(config.data_path).is_file():
        raise UserError(
            f"the data file {config.data_path} does not exist; make it with data/commonsense/prepare.py, "
            "or pass --data_path FILE"
        )
    if config.wandb_project:
        require_package("wandb", "--wandb_project")
    if config.tensorboard:
        require_package("tensorboard", "--tensorboard")


def check_targets(config: TrainConfig, adapter: AdapterConfig) -> None:
    """Raise ``UserError`` for target modules the model does not have, from its configuration alone."""
    model = BaseModel(config.base_model, config.trust_remote_code).structure()
    try:
        find_targets(model, adapter.target_modules)
    except UserError as error:
        raise UserError(f"--lora_target_modules: {error}") from None


def split(rows: datasets.Dataset, config: TrainConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(training rows, held-out rows or None): ``val_set_size`` rows drawn by the seed."""
    if not config.val_set_size:
        return rows, None
    if config.val_set_size >= len(rows):
        raise UserError(f"val_set_size must be below the number of rows, {len(rows)}, not {config.val_set_size}")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return rows.select(np.sort(order[config.val_set_size :])), rows.select(np.sort(order[: config.val_set_size]))


def origin_of(config: TrainConfig, tasks: TaskSet, base_fingerprint: str) -> checkpoint.Origin:
    """What a checkpoint of this run says of its base, prompt and tasks."""
    return checkpoint.Origin(
        base_model=config.base_model,
        base_fingerprint=base_fingerprint,
        prompt_template=config.template,
        cutoff_len=config.cutoff_len,
        task_set=tasks.to_json(),
        train_settings=config.to_json(),
        commit=checkout_commit(),
    )


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The Trainer's arguments; making them joins the process group of a distributed launch."""
    saving = "steps" if config.save_step else "no"
    report_to = (["wandb"] if config.wandb_project else []) + (["tensorboard"] if config.tensorboard else [])
    if config.wandb_project:
        os.environ["WANDB_PROJECT"] = config.wandb_project
    if config.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.output_dir) / "tensorboard")
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.micro_batch_rows,
        per_device_eval_batch_size=config.micro_batch_rows,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.lr_scheduler_type,
        optim="adamw_torch",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy=saving,
        save_steps=max(config.save_step, 1),
        save_total_limit=config.save_total_limit or None,
        eval_strategy=saving if config.val_set_size else "no",
        eval_steps=max(config.save_step, 1),
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=deepspeed_file(config.deepspeed) if config.deepspeed else None,
        report_to=report_to or "none",
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        # The base already has its dtype and adapter weights stay float32, so nothing is left to autocast.
        bf16=False,
        fp16=False,
    )
    # Several GPUs without a launcher would mean DataParallel, whose threads the task route does not reach.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
