"""The output folder of a run: whose it is, what the run was told, and from where it may go on."""

import shutil
from pathlib import Path

from transformers import TrainingArguments

from mtl_lora import files
from mtl_lora.adapter import analysis, checkpoint
from mtl_lora.base_model import BaseModel, choose_dtype
from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.tasks import TaskSet
from mtl_lora.training.trainer import LOG_NAME, checkpoints

RUN_NAME = "run.json"
_OWN_FILES = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME, LOG_NAME, RUN_NAME, analysis.FILE_NAME)
# Settings that may change between a run and its continuation, for they do not touch a weight.
_FREE = {
    "output_dir",
    "cache_dir",
    "data_path",  # the data's bytes are compared instead
    "tasks_file",  # the tasks are compared instead
    "save_step",
    "save_total_limit",
    "logging_steps",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "wandb_project",
    "tensorboard",
    "check",
    "local_rank",
}
_FACTS = {
    "data_sha256": "the data file",
    "tasks": "the tasks",
    "base_fingerprint": "the base model's files",
    "dtype": "the dtype that --dtype auto means",
}


def resume_folder(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None for a fresh run; raises ``UserError`` if the folder is another run's."""
    output, asked = Path(config.output_dir), config.resume_from_checkpoint or "false"
    files.require_writable(output)
    used = any((output / name).exists() for name in _OWN_FILES) or bool(checkpoints(output))
    if asked.lower() not in ("false", "0", "no"):
        if config.overwrite_output_dir:
            raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; pass one")
        if asked.lower() in ("true", "1", "yes"):
            return _last_whole(output)
        resume = _whole(Path(asked))
        if used and resume.resolve().parent != output.resolve():
            raise UserError(f"{output} holds a run, and {resume} is of another; pass an --output_dir that is empty")
        return resume
    if used and not config.overwrite_output_dir:
        raise UserError(
            f"{output} already holds a run; pass --resume_from_checkpoint True to go on with it, "
            "--overwrite_output_dir True to delete it, or another --output_dir"
        )
    return None


def _last_whole(output: Path) -> Path:
    found = checkpoints(output)
    if not found:
        raise UserError(f"{output} holds no whole checkpoint; pass --overwrite_output_dir True to begin anew")
    return found[-1]


def _whole(folder: Path) -> Path:
    if not (folder / "trainer_state.json").is_file():
        raise UserError(f"{folder} holds no resume state; pass a checkpoint-N folder of the run")
    return folder


def run_facts(config: TrainConfig, arguments: TrainingArguments, tasks: TaskSet) -> dict:
    """What a run is told, as ``run.json`` keeps it."""
    return {
        "settings": config.to_json(),
        "tasks": tasks.to_json(),
        "data_sha256": files.sha256(config.data_path),
        "base_fingerprint": BaseModel(config.base_model).fingerprint(),
        "dtype": str(choose_dtype(config.dtype)),
        "world_size": arguments.world_size,
    }


def claim_output(config: TrainConfig, arguments: TrainingArguments, facts: dict) -> None:
    """Make the folder this run's: clear it if told to, and write what the run is told to ``run.json``."""
    output = Path(config.output_dir)
    with arguments.main_process_first(local=False):
        if arguments.process_index:
            return
        if config.overwrite_output_dir:
            for name in _OWN_FILES:
                (output / name).unlink(missing_ok=True)
            for folder in checkpoints(output):
                shutil.rmtree(folder)
        files.write_json(output / RUN_NAME, facts)


def check_same_run(resume: Path, facts: dict, devices: bool = True) -> None:
    """Raise ``UserError`` if a run began with other data or settings than it is to go on with.

    devices: whether the number of processes is compared; the one process of a check says nothing of it.
    """
    path = resume.parent / RUN_NAME
    if not path.is_file():
        raise UserError(f"{resume.parent} has no {RUN_NAME}, so it cannot be told whether the settings are the same")
    earlier = files.read_json(path, "what the run was told,")
    # A flag that came with a later version did then what its default does.
    before, now = TrainConfig().to_json() | earlier["settings"], facts["settings"]
    changed = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - _FREE)
        if before.get(name) != now.get(name)
    ]
    # What a later version came to note is compared where an earlier one noted it.
    changed += [what for key, what in _FACTS.items() if key in earlier and earlier[key] != facts[key]]
    if devices and earlier["world_size"] != facts["world_size"]:
        changed.append("the devices")
    if changed:
        raise UserError(f"{resume} cannot go on: the run began with other settings ({'; '.join(changed)})")
