"""Reading ``predictions/<task>.jsonl`` beside a results file, checked line by line and against that file."""

import dataclasses
import json
import reprlib
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.report.results import Results

FOLDER_NAME = "predictions"
_RULES = {
    "task": (lambda value: isinstance(value, str), "a string"),
    "index": (lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "answer": (lambda value: isinstance(value, str), "a string"),
    "correct": (lambda value: type(value) is bool, "true or false"),
    "prompt_sha256": (lambda value: isinstance(value, str), "a string"),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question: the right answer, whether it was given, its F1 (a fraction) if it has one.

    place: ``FILE, line N``, for complaints.
    """

    answer: str
    correct: bool
    f1: float | None
    prompt_sha256: str
    place: str


def predictions_path(results: Results, task: str) -> Path:
    """Where the predictions of one task lie."""
    return results.path.parent / FOLDER_NAME / f"{task}.jsonl"


def read_predictions(results: Results) -> dict[str, dict[int, Prediction]]:
    """Predictions by task and index of the question, for every question that ``results`` counts.

    Raises ``UserError`` naming the file and line for a missing or unreadable file, a torn line, a record without its
    keys, a question answered twice, and predictions that are not those that the results file counts.
    """
    return {task: _read_task(results, task) for task in results.tasks}


def _read_task(results: Results, task: str) -> dict[int, Prediction]:
    path = predictions_path(results, task)
    found: dict[int, Prediction] = {}
    for number, line in enumerate(_lines(path), 1):
        place = f"{path}, line {number}"
        record = _parse(place, line)
        if record["task"] != task:
            raise UserError(f"{place} is a prediction of the task {record['task']!r}; this file holds those of {task}")
        index = record["index"]
        if index in found:
            raise UserError(f"{place} answers question {index} a second time, after {found[index].place}; keep one")
        found[index] = Prediction(record["answer"], record["correct"], record.get("f1"), record["prompt_sha256"], place)
    limit = results.settings.get("limit")
    if type(limit) is int and limit > 0:
        # A folder keeps what an earlier evaluation with a larger limit answered; the results file does not count it.
        found = {index: prediction for index, prediction in found.items() if index < limit}
    _check_agreement(results, task, path, found)
    return found


def _lines(path: Path) -> list[str]:
    """The lines of a file; only a newline ends one, for JSON may hold the other line separators of Unicode."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(
            f"the predictions {path} can not be read ({error.strerror}); pass a whole evaluation output folder"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"the predictions {path} are not UTF-8 text: {error}") from None
    return text.removesuffix("\n").split("\n") if text else []


def _parse(place: str, line: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{place} is {reprlib.repr(line)}, not a whole JSON object; evaluate again with --overwrite True"
        )
    for key, (holds, rule) in _RULES.items():
        if key not in record:
            raise UserError(f"{place} has no {key!r}; it must be {rule}")
        if not holds(record[key]):
            raise UserError(f"{place}: {key!r} is {reprlib.repr(record[key])}; it must be {rule}")
    f1 = record.get("f1")
    if f1 is not None and not (type(f1) in (int, float) and 0 <= f1 <= 1):
        raise UserError(f"{place}: 'f1' is {reprlib.repr(f1)}; it must be a fraction from 0 to 1")
    return record


def _check_agreement(results: Results, task: str, path: Path, found: dict[int, Prediction]) -> None:
    """Raise ``UserError`` unless the results file counts these questions and these right answers."""
    score = results.tasks[task]
    right, counted = sum(prediction.correct for prediction in found.values()), round(score.accuracy * score.n)
    if (len(found), right) != (score.n, counted):
        raise UserError(
            f"{path} has {right:,} of {len(found):,} questions right where {results.path} counts {counted:,} of "
            f"{score.n:,}; evaluate again with --overwrite True"
        )
