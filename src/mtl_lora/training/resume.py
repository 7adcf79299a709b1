"""The output folder of a training run: its run configuration, and which checkpoint the run may resume from."""

import contextlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from transformers import TrainingArguments

from mtl_lora import artifacts, files
from mtl_lora.adapter.checkpoint import read_config, read_weights
from mtl_lora.errors import UserError
from mtl_lora.training.config import TrainingConfig
from mtl_lora.training.distributed import zero_stage
from mtl_lora.training.sampler import OLD_CANDIDATES

_OWN_FILES = (
    artifacts.CHECKPOINT_CONFIG,
    artifacts.CHECKPOINT_WEIGHTS,
    artifacts.TRAIN_LOG,
    artifacts.RUN_CONFIG,
    artifacts.ADAPTER_ANALYSIS,
    artifacts.ADAPTER_START,
)


def checkpoint_to_resume(config: TrainingConfig) -> Path | None:
    """Return the checkpoint that ``--resume_from_checkpoint`` selects, or None for a fresh run.

    Raises ``UserError`` if there is no such checkpoint, or if the output folder holds another run.
    """
    output, asked = Path(config.output_dir), config.resume_from_checkpoint or "false"
    files.require_writable(output)
    found = artifacts.checkpoints(output)
    # A run that ended before it saved anything left nothing worth keeping.
    used = bool(found) or (output / artifacts.CHECKPOINT_WEIGHTS).exists()
    if asked.lower() in ("false", "0", "no"):
        if used and not config.overwrite_output_dir:
            resume = "--resume_from_checkpoint True to resume it, " if found else ""
            raise UserError(
                f"{output} already holds a run; pass {resume}--overwrite_output_dir True to delete it, or another "
                "--output_dir"
            )
        if not config.overwrite_output_dir:
            _refuse_foreign_files(output, ", or --overwrite_output_dir True to delete it")
        return None
    if config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; pass only one")
    if asked.lower() in ("true", "1", "yes"):
        if not found:
            way_out = "pass --overwrite_output_dir True" if used else "leave out --resume_from_checkpoint"
            raise UserError(f"{output} holds no complete checkpoint; {way_out} to start from the beginning")
        return found[-1]
    checkpoint = Path(asked)
    if not (checkpoint / artifacts.RESUME_STATE).is_file():
        raise UserError(f"{checkpoint} holds no resume state; pass a checkpoint-N folder of the run")
    if used and checkpoint.resolve().parent != output.resolve():
        raise UserError(f"{output} holds a run that {checkpoint} does not belong to; pass an empty --output_dir")
    _refuse_foreign_files(output)
    return checkpoint


def _refuse_foreign_files(output: Path, more: str = "") -> None:
    """Raise ``UserError`` if a run would replace files in its folder that no run configuration shows to be a run's.

    more: a second way out for the message.
    """
    path = output / artifacts.RUN_CONFIG
    with contextlib.suppress(UserError):
        if path.is_file() and "settings" in files.read_object(path, "the run configuration"):
            return
    names = (artifacts.RUN_CONFIG, artifacts.TRAIN_LOG, artifacts.TENSORBOARD)
    if foreign := [name for name in names if (output / name).exists()]:
        listed = ", ".join(foreign)
        raise UserError(f"{output} holds {listed}, which no training wrote; pass another --output_dir{more}")


def data_plan(checkpoint: Path | None) -> tuple[int | None, bool]:
    """Return (``choices`` of ``sampler.balanced_order``, ``by_task`` of ``rows.split``) of a run that is resumed.

    Its configuration records them: with others it would train on held-out examples, or on those that its first part has
    had. (None, True) for a new run.
    """
    if checkpoint is None:
        return None, True
    path = checkpoint.parent / artifacts.RUN_CONFIG
    earlier = files.read_object(path, "the run configuration") if path.is_file() else {}
    recorded = earlier.get("step_choices")
    choices = recorded if type(recorded) is int and recorded > 0 else OLD_CANDIDATES
    return choices, earlier.get("held_out_by_task") is True


def check_same_run(
    checkpoint: Path,
    configuration: dict,
    flags: type[TrainingConfig],
    facts: Callable[[dict], dict[str, object]],
    devices: bool = True,
) -> None:
    """Raise ``UserError``, naming the differences, if a checkpoint's run had other settings or data than this run.

    Values that the checkpoint itself records take precedence over the run configuration beside it.
    configuration: the run configuration of this run, with the flags in ``settings`` and the number of processes in
    ``world_size``. facts: returns what besides the flags decides the weights in a run configuration, keyed by its
    wording in the message; None is not compared. devices: whether to compare the number of processes, which the single
    process of ``--check`` does not know.
    """
    path = checkpoint.parent / artifacts.RUN_CONFIG
    if not path.is_file():
        raise UserError(f"{checkpoint.parent} has no {artifacts.RUN_CONFIG}, so the settings cannot be compared")
    earlier = files.read_object(path, "the run configuration")
    if not isinstance(earlier.get("settings"), dict):
        raise UserError(f"the run configuration {path} must be a JSON object with 'settings'")
    own = read_config(checkpoint).provenance_config
    known = {"tasks": own.task_set, "base_fingerprint": own.base_fingerprint}
    earlier |= {name: value for name, value in known.items() if value is not None}
    settings = earlier["settings"] | (own.train_settings or {})
    # A flag that was added since then counts as its default; a renamed flag is found by its alias.
    names = {name: flag.name for flag in flags.flags() for name in flag.names}
    before = {flag.name: flag.default for flag in flags.flags()}
    before |= {names.get(name, name): value for name, value in settings.items()}
    now = configuration["settings"]
    free = ({flag.name for flag in flags.flags()} - flags.names_affecting("weights")) | {*flags.idle}
    free |= {flag.name for flag in flags.flags() if flag.metadata.get("by_outcome")}
    # The same content, perhaps at another path.
    content = {"base_model": "base_fingerprint", "deepspeed": "deepspeed_sha256", "start_from": "start_sha256"}
    free |= {flag for flag, key in content.items() if earlier.get(key) == configuration[key] is not None}
    changed = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - free)
        if before.get(name) != now.get(name)
    ]
    facts_before, facts_now = facts(earlier), facts(configuration)
    changed += [what for what, value in facts_now.items() if facts_before[what] not in (None, value)]
    if devices and earlier.get("world_size") != configuration["world_size"]:
        changed.append("the number of devices")
    if changed:
        raise UserError(f"{checkpoint} cannot be resumed: the run began with other settings ({'; '.join(changed)})")


def check_state(checkpoint: Path, deepspeed: str | None) -> None:
    """Raise ``UserError`` unless a checkpoint's adapter and resume state are complete and undamaged, because
    transformers and DeepSpeed silently start anew with missing parts. The run configuration must have been checked."""
    read_weights(checkpoint, read_config(checkpoint))
    earlier = files.read_object(checkpoint.parent / artifacts.RUN_CONFIG, "the run configuration")
    processes = known if isinstance(known := earlier.get("world_size"), int) else 1
    random = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    needed = [checkpoint / name for name in ("scheduler.pt", *random, *["optimizer.pt"] * (not deepspeed))]
    if deepspeed:
        latest, stage = checkpoint / "latest", zero_stage(deepspeed)
        folder = checkpoint / latest.read_text(errors="replace").strip() if latest.is_file() else latest
        for kind, count in {"model": processes if stage == 3 else 1, "optim": processes if stage else 0}.items():
            found = sorted(folder.glob(f"*{kind}_states.pt"))
            needed += found + [folder / f"*{kind}_states.pt"] * (len(found) < count)
    if broken := [path for path in needed if not _is_whole(path)]:
        names = ", ".join(str(path.relative_to(checkpoint)) for path in broken)
        raise UserError(f"{checkpoint} has missing or damaged resume state ({names}); resume from another checkpoint")


def _is_whole(path: Path) -> bool:
    """Return whether a file exists and its checksums, which ``torch.load`` does not verify, are right."""
    try:
        with zipfile.ZipFile(path) as opened:
            return opened.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def begin_output(
    config: TrainingConfig, arguments: TrainingArguments, configuration: dict, resumed: Path | None
) -> None:
    """Prepare the output folder and write the run configuration.

    A fresh run deletes the files of an earlier run; a run that is resumed from the checkpoint ``resumed`` deletes the
    later checkpoints.
    """
    output, fresh = Path(config.output_dir), resumed is None
    given_up = artifacts.checkpoints(output)
    if not fresh:
        here = [folder.resolve() for folder in given_up]
        given_up = given_up[here.index(resumed.resolve()) + 1 :] if resumed.resolve() in here else []
    with arguments.main_process_first(local=False):
        if arguments.process_index:
            return
        for name in _OWN_FILES if fresh else ():
            (output / name).unlink(missing_ok=True)
        for folder in given_up:
            artifacts.remove_checkpoint(folder)
        for name in (artifacts.SAVING, artifacts.TENSORBOARD) if fresh else (artifacts.SAVING,):
            shutil.rmtree(output / name, ignore_errors=True)
        files.write_json(output / artifacts.RUN_CONFIG, configuration)
