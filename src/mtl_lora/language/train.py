"""Training of language models: check everything, encode the examples, build the model, train it, save the adapter."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

import mtl_lora
from mtl_lora import files
from mtl_lora.adapter import checkpoint
from mtl_lora.adapter.analysis import write_analysis
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.adapter.inject import find_targets, fused_experts, output_head, targets_for
from mtl_lora.adapter.layer import layer_class
from mtl_lora.base_model import BaseModel, choose_dtype, enable_checkpointing
from mtl_lora.errors import UserError
from mtl_lora.language.batches import CheckedLosses, Collator, sharing_probe, token_losses
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.encode import CHAT
from mtl_lora.language.prefix import Packer, longest_pair, prefixes_to_share
from mtl_lora.language.tasks import TaskSet
from mtl_lora.language.token_cache import row_columns, shortened_note, training_rows
from mtl_lora.training import distributed, resume
from mtl_lora.training.sampler import examples_per_task
from mtl_lora.training.trainer import MultiTaskTrainer, make_sampler, training_arguments
from mtl_lora.version import checkout_commit

# On a CPU the backward pass of torch's fused attention takes several times that of the plain products, and at this
# length their (L, L) scores are small.
_EAGER_LENGTH = 512


def run(config: TrainConfig) -> None:
    """Train as ``config`` says, or with ``check`` stop before the model is loaded.

    Raises ``UserError`` for every mistake that can be found before training. The process is expected to be prepared
    (``distributed.prepare_process``); one that ends here leaves its process group itself.
    """
    tasks = config.task_set()
    adapter = config.adapter_config(tasks)
    distributed.check_launch(config)
    config.check_files()
    with nullcontext() if config.check else files.claimed(config.output_dir):
        _run(config, tasks, adapter)


def _run(config: TrainConfig, tasks: TaskSet, adapter: AdapterConfig) -> None:
    """``run`` with the output folder claimed."""
    from_checkpoint = resume.checkpoint_to_resume(config)
    base = BaseModel(config.base_model, config.trust_remote_code)
    base.check_quantisation(training=True)
    structure = base.structure()  # before the arguments are made, for from then on ZeRO-3 partitions every new model
    try:
        adapter, notes = in_language_model(adapter, structure)
    except UserError as error:
        raise UserError(f"--lora_target_modules: {error}") from None
    arguments = training_arguments(config)
    distributed.check_deepspeed_values(arguments, one_process=config.check)
    tokenizer = base.tokenizer()
    digest = files.sha256(config.data_path)
    rows = encoded_rows(config, arguments, tasks, tokenizer, digest)
    longest = int(row_columns(rows)["length"].max())
    base.check_positions(longest, f"the longest example; lower --cutoff_len, which is {config.cutoff_len}")
    train, held_out = split(rows, config.val_set_size, config.seed)
    log(arguments, *notes)
    columns = row_columns(train)
    prefixes, note = prefixes_to_share(config.reuse_prefix, train, structure, config.lora_dropout)
    log(arguments, note)
    lengths = columns["length"]
    if not config.token_budget:  # a budget is kept with whole prompts
        lengths = lengths - np.array([len(prefixes.get(task.id, ())) for task in tasks])[columns["task_id"]]
    sampler = make_sampler(config, arguments, lengths, columns["task_id"], group_tasks=bool(prefixes))
    log(arguments, f"{sampler}\n{len(rows):,} examples; {shortened_note(rows, config.cutoff_len)}")
    counts = np.bincount(columns["task_id"], minlength=len(tasks))
    log(arguments, counts_note(tasks.names, counts, held_out, config.sampling_temperature))
    untrained = [name for name, count in zip(tasks.names, counts, strict=True) if not count]
    if untrained:
        log(arguments, f"no training examples of {', '.join(untrained)}: what is these tasks' own stays as it is drawn")
    configuration = run_configuration(config, arguments, tasks, digest) | {"shared_prefixes": bool(prefixes)}
    if from_checkpoint:
        resume.check_same_run(from_checkpoint, configuration, TrainConfig, deciding_facts, devices=not config.check)
    if config.check:
        several = "" if arguments.world_size > 1 else "; a launch of N devices takes N such batches a step"
        log(arguments, f"every setting is fine{several}")
        return
    model = build_model(config, base, adapter, arguments)
    base.check_unchanged(configuration["base_fingerprint"])
    losses, packer = token_losses, None
    if prefixes:
        packer = Packer(prefixes, layer_class(adapter.method).needs_task_ids, tokenizer.pad_token_id)
        pair = longest_pair(columns["length"], columns["task_id"], prefixes)
        probe = sharing_probe([train[index] for index in pair], packer)
        losses = CheckedLosses(probe, dropout=config.reuse_prefix == "always")  # the base may have its own
    # Every mistake was found before an older run is deleted.
    resume.begin_output(config, arguments, configuration, fresh=from_checkpoint is None)
    start = checkpoint.adapter_state(model)  # by all processes, for ZeRO-3 gathers it
    if arguments.process_index == 0 and not from_checkpoint:
        checkpoint.save_start(model, config.output_dir, start)
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments,
        losses=losses,
        collator=Collator(tokenizer.pad_token_id, config.train_on_inputs, packer),
        tasks=tasks.names,
        sampler=sampler,
        provenance=checkpoint.Provenance(
            base_model=base.lasting_name,
            base_fingerprint=configuration["base_fingerprint"],
            prompt_template=config.template,
            chat_template=tokenizer.get_chat_template() if config.template == CHAT else None,
            cutoff_len=config.cutoff_len,
            task_set=tasks.to_json(),
            train_settings=config.to_json(),
            commit=checkout_commit(),
            untrained_tasks=untrained,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        eval_lengths=row_columns(held_out)["length"] if held_out else None,
    )
    trainer.train(resume_from_checkpoint=str(from_checkpoint) if from_checkpoint else None)
    trainer.save_model(config.output_dir)
    if arguments.process_index == 0:
        write_analysis(config.output_dir)
    trainer.accelerator.wait_for_everyone()
    log(arguments, f"saved the adapter to {config.output_dir}")


def log(arguments: TrainingArguments, *lines: str) -> None:
    """Print lines on stderr, from the first process alone."""
    if arguments.process_index == 0:
        print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr, flush=True)


def in_language_model(adapter: AdapterConfig, structure: PreTrainedModel) -> tuple[AdapterConfig, list[str]]:
    """The adapter without targets that text does not reach (towers for images or sound), and notes on what has none.

    Raises ``UserError`` as ``find_targets`` does.
    """
    weights, notes = {name: weight.numel() for name, weight in structure.named_parameters()}, []

    def percentage(names: Iterable[str]) -> str:
        return f"{100 * sum(weights[name] for name in names) / sum(weights.values()):.1f} % of the model's weights"

    within, towers, asked = None, [], adapter.target_modules
    if structure.config.get_text_config() is not structure.config:
        within = {*structure.get_decoder().modules(), output_head(structure)}
        towers = [name for name in weights if structure.get_submodule(name.rpartition(".")[0]) not in within]
    targets = find_targets(structure, adapter, within)
    if towers:
        adapter = AdapterConfig.from_json(adapter.to_json() | {"target_modules": targets_for(targets, structure)})
        where = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in towers))
        notes.append(f"text does not reach {where} ({percentage(towers)}), which get no adapter")
    fused = [name for name in fused_experts(structure) if name not in towers]
    endings = {name.rpartition(".")[2] for name in targets}
    if fused and (asked == "all-linear" or not endings.isdisjoint(name.rpartition(".")[2] for name in fused)):
        notes.append(f"the experts are fused and get no adapter: {fused[0]} and others hold {percentage(fused)}")
    return adapter, notes


def encoded_rows(
    config: TrainConfig,
    arguments: TrainingArguments,
    tasks: TaskSet,
    tokenizer: PreTrainedTokenizerBase,
    digest: str,
) -> datasets.Dataset:
    """The encoded examples of the data file with this sha256: one process of each node tokenises, the others read its
    cache."""
    with PartialState().local_main_process_first() if arguments.world_size > 1 else nullcontext():
        settings = config.template, config.cutoff_len, tasks, config.cache_dir, config.task
        return training_rows(config.data_path, tokenizer, *settings, digest)


def split(rows: datasets.Dataset, held_out: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(training examples, held-out examples or None): ``held_out`` examples drawn by the seed, of no task the last."""
    if not held_out:
        return rows, None
    if held_out >= len(rows):
        raise UserError(f"val_set_size must be below the number of examples, {len(rows)}, not {held_out}")
    order, ids = np.random.default_rng(seed).permutation(len(rows)), row_columns(rows)["task_id"]
    # The last example of each task in the order stays; in the place of one that was drawn comes the next that may.
    last = np.zeros(len(rows), dtype=bool)
    last[[np.flatnonzero(ids[order] == task)[-1] for task in np.unique(ids)]] = True
    drawn = np.flatnonzero(~last)[:held_out]
    if len(drawn) < held_out:
        raise UserError(
            f"val_set_size must be at most {len(drawn)}, so that each task keeps a training example, not {held_out}"
        )
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[order[drawn]] = True
    return rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))


def counts_note(names: Sequence[str], counts: np.ndarray, held_out: datasets.Dataset | None, temperature: float) -> str:
    """The training and held-out examples of each task, and which tasks an epoch takes several times, in lines."""

    def listed(counts: np.ndarray) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))

    lines = [f"training examples: {listed(counts)}"]
    if held_out:
        lines.append(f"held out: {listed(np.bincount(row_columns(held_out)['task_id'], minlength=len(names)))}")
    passes = examples_per_task(counts, temperature) / np.maximum(counts, 1)
    often = [f"{name} {times:.1f}" for name, times in zip(names, passes, strict=True) if times >= 2]
    if often:
        lines.append(f"times that an epoch takes each example of a task, by --sampling_temperature: {', '.join(often)}")
    return "\n".join(lines)


def run_configuration(config: TrainConfig, arguments: TrainingArguments, tasks: TaskSet, data_sha256: str) -> dict:
    """What ``run.json`` holds: the flags and what they stand for on this machine."""
    read = {flag.name for flag in layer_class(config.adapter_name).Hyperparameters.flags()}
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": config.to_json(),
        "unused_settings": sorted(config.hyperparameters.keys() - read),  # hyperparameters of other methods
        "tasks": tasks.to_json(),
        "data_sha256": data_sha256,
        "base_fingerprint": BaseModel(config.base_model).fingerprint(),
        "dtype": str(choose_dtype(config.dtype)),
        "no_decay": list(layer_class(config.adapter_config(tasks).method).no_decay) if config.weight_decay else [],
        "world_size": arguments.world_size,
    }


def deciding_facts(configuration: dict) -> dict[str, object]:
    """Of a run configuration, what decides the weights besides its flags, by the words of an error.

    Titles and columns of the tasks do not. None where an earlier version did not record it.
    """
    return {
        "the data file": configuration.get("data_sha256"),
        "the tasks": TaskSet.from_json(configuration.get("tasks"), "the run configuration").answers_sha256,
        "the base model's files": configuration.get("base_fingerprint"),
        "the dtype that --dtype auto means": configuration.get("dtype"),
        "the parameters without weight decay": configuration.get("no_decay", []),
        "shared prompt prefixes, see --reuse_prefix": configuration.get("shared_prefixes", False),
    }


def build_model(
    config: TrainConfig, base: BaseModel, adapter: AdapterConfig, arguments: TrainingArguments
) -> PreTrainedModel:
    """The base model with the adapter, as the seed draws it."""
    distributed.init_deepspeed(config)
    set_seed(config.seed)
    with distributed.loading_base(config.dtype):
        model = base.load(config.dtype, config.load_in_4bit)
    if arguments.device.type == "cpu" and config.cutoff_len <= _EAGER_LENGTH:
        model.set_attn_implementation("eager")
    mtl_lora.inject(model, adapter)
    if config.use_gradient_checkpointing:
        enable_checkpointing(model)
    trainable, total = mtl_lora.trainable_parameters(model)
    log(arguments, f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
    return model
