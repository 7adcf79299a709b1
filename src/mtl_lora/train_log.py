"""``train_log.jsonl``: a line for every logged step of a training, which trainings write and reports read."""

import json
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError

Losses = dict[str, dict[int, float]]  # by task, "" for all of them, and by step, in order of steps


def append(path: Path, step: int, logs: dict) -> None:
    """Add the line of a step: ``loss``, ``loss/<task>`` and whatever else was logged."""
    with path.open("a") as log:
        log.write(json.dumps({"step": step, **logs}) + "\n")


def drop_after(path: Path, step: int) -> None:
    """Make the file, or drop the lines behind ``step`` from it; a line torn by a kill counts as after everything."""
    lines = path.read_text().splitlines() if path.exists() else []
    files.write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def last_step(path: Path) -> int:
    """The last step of a training that has ended; raises ``UserError`` naming the file for a log without any."""
    lines = files.read_lines(path)
    if not lines or (step := _step_of(lines[-1])) == float("inf"):
        raise UserError(f"{path} does not end in a log line of a training; train again, or delete the run's folder")
    return step


def read_losses(path: Path) -> Losses:
    """The losses of a training log; raises ``UserError`` naming file and line."""
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
