"""Records from a JSON file, validated: one sentence names the file, the record and the field that is wrong."""

import dataclasses
import json
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.tasks import TaskSet


@dataclasses.dataclass(frozen=True)
class Example:
    """One record: the five fields with which LLM-Adapters' files are written, and its place in the file.

    extra: any further fields of the record, kept for reports (for example ``kind`` in the quick-start data).
    """

    instruction: str
    input: str
    output: str
    answer: str
    task_id: int
    index: int
    extra: dict = dataclasses.field(default_factory=dict, compare=False)

    def text(self) -> dict[str, str]:
        """The fields a prompt template reads."""
        return {"instruction": self.instruction, "input": self.input}


FIELDS = ("instruction", "input", "output", "answer", "task_id")


def load_examples(path: str | Path, tasks: TaskSet, task: str | None = None, closed: bool = False) -> list[Example]:
    """Read a JSON list (or JSON lines) of records; raises ``UserError`` naming file, record and field.

    task: the name of the task when the file holds one task alone; else each record says ``task_id`` or ``task``.
    closed: also require that an answer is one of its record's options (evaluation).
    """
    records = _read_records(Path(path))
    if not records:
        raise UserError(f"{path} holds no records")
    return [_example(record, index, str(path), tasks, task, closed) for index, record in enumerate(records)]


def _read_records(path: Path) -> list:
    if path.suffix != ".jsonl":
        records = files.read_json(path, "the data file")
        if not isinstance(records, list):
            raise UserError(f"{path} must hold a JSON list of records, not {type(records).__name__}")
        return records
    records = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    records.append(json.loads(line.decode("utf-8")))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read ({error.strerror})") from None
    return records


def _example(record: object, index: int, path: str, tasks: TaskSet, task: str | None, closed: bool) -> Example:
    where = f"{path}, record {index}"
    if not isinstance(record, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS)}, not {type(record).__name__}")
    values = {"input": "", **record}
    for field in ("instruction", "input", "output", "answer"):
        if field not in values:
            raise UserError(f"{where} has no field {field!r}")
        if not isinstance(values[field], str):
            raise UserError(f"{where}: {field!r} must be a string, not {values[field]!r}")
        if not _is_text(values[field]):
            raise UserError(f"{where}: {field!r} holds half a character (a lone surrogate), which no tokenizer reads")
    for field in ("instruction", "output"):
        if not values[field].strip():
            raise UserError(f"{where}: {field!r} is empty")
    task_id = _task_id(record, where, tasks, task)
    if closed:
        options = tasks[task_id].options_of(values["instruction"])
        if options and values["answer"] not in options:
            raise UserError(f"{where}: the answer {values['answer']!r} is not one of its options {'/'.join(options)}")
    extra = {key: value for key, value in record.items() if key not in FIELDS and key != "task"}
    return Example(values["instruction"], values["input"], values["output"], values["answer"], task_id, index, extra)


def _is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8; JSON can spell half of a character, such as ``"\\ud800"``."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _task_id(record: dict, where: str, tasks: TaskSet, task: str | None) -> int:
    """The record's task by ``task_id`` or by ``task`` (a name), which must agree where both stand."""
    found = []
    if "task_id" in record:
        if type(record["task_id"]) is not int or not 0 <= record["task_id"] < len(tasks):
            raise UserError(f"{where}: task_id {record['task_id']!r} is none of the tasks {tasks.describe()}")
        found.append(record["task_id"])
    if "task" in record:
        if record["task"] not in tasks.names:
            raise UserError(f"{where}: task {record['task']!r} is none of the tasks {tasks.describe()}")
        found.append(tasks[record["task"]].id)
    if task is not None:
        found.append(tasks[task].id)
    if not found:
        raise UserError(f"{where} has no field 'task_id' (or 'task', a name); the tasks are {tasks.describe()}")
    if len(set(found)) > 1:
        names = " and ".join(tasks[task_id].name for task_id in found)
        raise UserError(f"{where} is said to belong to {names}")
    return found[0]
