"""What a training leaves to be drawn: ``train_log.jsonl`` and ``adapter_analysis.json``, checked."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.report.record import Record, is_number, is_object

LOG_NAME = "train_log.jsonl"
ANALYSIS_NAME = "adapter_analysis.json"
# Key of the analysis -> what is compared, in words.
SIMILARITIES = {
    "lambda_similarity": "Λₜ",
    "lambda_minus_identity_similarity": "Λₜ − I",
    "update_similarity": "update s Bₜ Aₜ",
}
Matrix = Sequence[Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class Log:
    """The training loss by step: ``losses[""]`` over all tasks, ``losses["cr"]`` of one; in order of steps."""

    losses: dict[str, dict[int, float]]

    def joined(self, other: "Log") -> "Log":
        """Both as one, as for tasks that were trained apart; the loss over all tasks is then that of neither."""
        return Log({**self.losses, **other.losses, "": {}})


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an adapter does for each task: see ``mtl_lora.adapter.analysis``, which writes it.

    mixture: by layer, (T, n), or empty. similarities: key of ``SIMILARITIES`` to (T, T), those there are.
    by_module: short name of the adapted modules to (T, T) similarity of updates.
    """

    method: str
    tasks: list[str]
    layers: list[str]
    mixture: dict[str, Matrix]
    similarities: dict[str, Matrix]
    by_module: dict[str, Matrix]


def read_log(path: Path) -> Log:
    """The losses of a training log; raises ``UserError`` naming file and line."""
    losses: dict[str, dict[int, float]] = {"": {}}
    for number, line in enumerate(_lines(path), start=1):
        try:
            entry = json.loads(line)
            step = entry["step"]
            found = {key.removeprefix("loss").removeprefix("/"): entry[key] for key in entry if _is_loss(key)}
            for task, loss in found.items():
                losses.setdefault(task, {})[int(step)] = float(loss)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number} is no log line of a training; delete the line") from None
    return Log({task: dict(sorted(curve.items())) for task, curve in losses.items()})


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the training log {path} can not be read: {error}") from None


def _is_loss(key: str) -> bool:
    return key == "loss" or key.startswith("loss/")


def read_analysis(path: Path) -> Analysis:
    """The analysis of an adapter; raises ``UserError`` naming file and key."""
    value = read_json(path, "the adapter's analysis")
    if not isinstance(value, dict) or value.get("kind") != "adapter_analysis" or value.get("schema") != 1:
        raise UserError(f"{path} is no analysis of schema 1; write it with python -m mtl_lora.adapter.analysis")
    root = Record(path, "", value)
    tasks, layers = (root.take(key, _are_names, "a list of names") for key in ("tasks", "layers"))
    count = len(tasks)
    similarities = {key: _matrix(root, key, count, count) for key in SIMILARITIES if value.get(key) is not None}
    return Analysis(
        method=root.text("method"),
        tasks=tasks,
        layers=layers,
        mixture=_matrices(root, "mixture", count, None),
        similarities=similarities,
        by_module=_matrices(root, "update_similarity_by_module", count, count),
    )


def _matrices(root: Record, key: str, rows: int, columns: int | None) -> dict[str, Matrix]:
    root.take(key, is_object, "an object", optional=True)
    child = root.child(key)
    return {name: _matrix(child, name, rows, columns) for name in child.value} if child else {}


def _matrix(record: Record, key: str, rows: int, columns: int | None) -> Matrix:
    """A matrix whose size is known, or, with ``columns`` None, whose rows are merely of one length."""

    def fits(value) -> bool:
        listed = isinstance(value, list) and len(value) == rows and all(isinstance(row, list) for row in value)
        widths = {len(row) for row in value} if listed else set()
        right = widths <= {columns} if columns is not None else len(widths) <= 1
        return listed and right and all(_is_number_or_null(entry) for row in value for entry in row)

    return record.take(key, fits, f"{rows} rows of equally many numbers" if columns is None else f"{rows} x {columns}")


def _is_number_or_null(value: object) -> bool:
    return value is None or is_number(value)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
