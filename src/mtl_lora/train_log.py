"""``train_log.jsonl``: a line for every logged step of a training run. Training writes it and reports read it."""

import json
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError

Losses = dict[str, dict[int, float]]  # task ("" for all tasks together) -> step -> loss, in the order of the steps


def append(path: Path, step: int, logs: dict) -> None:
    """Append the line of a step: ``loss``, ``loss/<task>`` and whatever else was logged."""
    with path.open("a") as log:
        log.write(json.dumps({"step": step, **logs}) + "\n")


def drop_after(path: Path, step: int) -> None:
    """Drop the lines after ``step``, also a line that a kill left incomplete; creates the file if it does not exist."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    files.write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    return step if type(step) is int else float("inf")


def last_step(path: Path) -> int:
    """Return the last step of a completed training run; raises ``UserError`` naming the file if the log has none."""
    lines = files.read_lines(path)
    if not lines or (step := _step_of(lines[-1])) == float("inf"):
        raise UserError(f"{path} does not end with a log line of a training; train again, or delete the run's folder")
    return step


def read_losses(path: Path) -> Losses:
    """Return the losses in a training log; raises ``UserError`` naming file and line for an invalid line."""
    losses: Losses = {"": {}}
    for number, line in enumerate(files.read_lines(path), start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
            for key in entry:
                if key == "loss" or key.startswith("loss/"):
                    losses.setdefault(key.removeprefix("loss").removeprefix("/"), {})[step] = float(entry[key])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise UserError(f"{path}, line {number} is not a log line of a training; delete the line") from None
    return {task: dict(sorted(curve.items())) for task, curve in losses.items()}
