"""Examples from a file, validated: an error names the file, the example and the field in one sentence; samples.

Every reader of data goes through ``read_values``, so training data, test sets and inputs may have the same formats.
"""

import csv
import dataclasses
import io
import json
import random
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.metrics import extract_answer
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.results import Sample


@dataclasses.dataclass(frozen=True)
class Example:
    """One example: the five fields with which LLM-Adapters' files are written, and its place in the file.

    context: the messages before the user's last, of an example that was given as ``messages``. extra: any further
    fields, kept for reports (for example ``kind`` in the quick-start data).
    """

    instruction: str
    input: str
    output: str
    answer: str
    task_id: int
    index: int
    extra: dict = dataclasses.field(default_factory=dict, compare=False)
    context: tuple[dict[str, str], ...] = ()

    def text(self) -> dict:
        """The fields that a prompt template reads."""
        return {"instruction": self.instruction, "input": self.input, "context": self.context}

    def record(self) -> dict:
        """A record that ``parse_example`` reads back."""
        fields = {key: getattr(self, key) for key in FIELDS}
        if self.context:
            turns = {"user": fields.pop("instruction") + fields.pop("input"), "assistant": fields.pop("output")}
            turns = [{"role": role, "content": content} for role, content in turns.items() if content]
            fields = {"messages": [*self.context, *turns], **fields}
        return fields | self.extra


FIELDS = ("instruction", "input", "output", "answer", "task_id")
ROLES = ("system", "user", "assistant")


def load_examples(path: str | Path, tasks: TaskSet, task: str | None = None, closed: bool = False) -> list[Example]:
    """Read the examples of a file, see ``read_values``; raises ``UserError`` naming file, example and field.

    task: the name of the task when the file holds one task alone; else each example has ``task_id`` or ``task``,
    unless there is only one task. closed: require an answer, one of its example's options, and no output (evaluation).
    """
    values = read_values(Path(path))
    if not values:
        raise UserError(f"{path} holds no examples")
    task = tasks.names[0] if task is None and len(tasks) == 1 else task
    return [parse_example(value, index, str(path), tasks, task, closed) for index, value in enumerate(values)]


# ---- files ----


def read_values(path: Path) -> list:
    """The values of a JSON list, of ``{"data": [...]}`` or of JSON lines; by their ending, the rows of parquet and CSV.

    A BOM and blank lines are skipped; an empty cell of CSV and a null of parquet are no field.
    """
    return READERS.get(path.suffix.lower(), _json_values)(path)


def data_file(folder: str | Path, name: str) -> Path:
    """``<name>.json`` in a folder, or the one file of this name that ends as another format that is read.

    Where there is none it is the ``.json`` that is missing. Raises ``UserError`` where there are several.
    """
    path = Path(folder, f"{name}.json")
    if path.is_file() or not path.parent.is_dir():
        return path
    found = sorted(each for each in path.parent.iterdir() if each.stem == name and each.suffix.lower() in READERS)
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(each.name for each in found)}; leave one of them")
    return found[0] if found else path


def _json_values(path: Path) -> list:
    text = files.read_utf8(path, "the data file")
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # JSON lines under another name begin with an object and have more behind it.
        if not lines and not ("Extra data" in str(error) and text.lstrip().startswith("{")):
            raise UserError(f"the data file {path} is not JSON: {error}") from None
    else:
        if isinstance(value, dict):
            value = value["data"] if isinstance(value.get("data"), list) else value
            lines = lines or bool(value.keys() & {"instruction", "messages"}) if isinstance(value, dict) else lines
        if not isinstance(value, list) and lines:
            return [value]
        if not isinstance(value, list):
            raise UserError(f"{path} must hold a JSON list of examples, not {type(value).__name__}")
        return value
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    return values


def _csv_rows(path: Path) -> list[dict[str, str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    text = io.StringIO(files.read_utf8(path, "the data file"), newline="")
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB that csv would take
    rows, reader = [], csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(filter(None, reader), [])]
        if len(set(header)) < len(header):
            raise UserError(f"{path}: the header names a column twice ({', '.join(header)})")
        for row in filter(None, reader):
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: the row has {len(row)} cells and the header {len(header)}; cells "
                    f"are divided by {delimiter!r}, and one that holds it or a line break must be quoted"
                )
            rows.append({name: cell for name, cell in zip(header, row, strict=True) if cell})
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    return rows


def _parquet_rows(path: Path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path} needs the package pyarrow; pass JSON, or in a checkout of mtl-lora: pip install '.[train]'"
        ) from None
    try:
        with ParquetFile(path) as opened:
            rows = opened.read().to_pylist()
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        return json.loads(json.dumps(rows, default=_as_text))
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the data file {path} cannot be read as parquet ({reason}); write it again") from None


def _as_text(value: object) -> str:
    """A cell for which JSON has no type: a date, or text that was written as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


READERS: dict[str, Callable[[Path], list]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_values),
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
    ".parquet": _parquet_rows,
}


# ---- examples ----


def parse_example(
    value: object,
    index: int,
    source: str,
    tasks: TaskSet,
    task: str | None = None,
    closed: bool = False,
    answered: bool = True,
) -> Example:
    """One example from its JSON value; arguments and errors as ``load_examples``, which names ``source``.

    answered: False for an example to predict: ``output`` and ``answer`` are neither needed nor kept.
    """
    where = f"{source}, example {index}"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS)}, not {type(value).__name__}")
    extra = {key: entry for key, entry in value.items() if key not in (*FIELDS, "task", "messages")}
    told = "messages" in value
    if told:
        value = _from_messages(value, where)
    needed = {"instruction": not value.get("input"), "input": False}
    if answered:  # only an evaluation compares answers, and it needs no output
        needed |= {"output": not closed, "answer": closed and not told}
    texts = dict.fromkeys(FIELDS[:-1], "")
    for field, must in needed.items():
        if must and field not in value:
            hint = " (the assistant's last message)" if told else ""
            raise UserError(f"{where} has no field {field!r}{hint}")
        if must or value.get(field) is not None:
            texts[field] = _text(value[field], f"{where}: {field!r}")
    if not (texts["instruction"] + texts["input"]).strip():
        raise UserError(f"{where}: 'instruction' is empty")
    if needed.get("output") and not texts["output"].strip():
        raise UserError(f"{where}: 'output' is empty")
    task_id = _task_id(value, where, tasks, task)
    options = tasks[task_id].options_of(texts["instruction"])
    if closed and told and not texts["answer"]:
        texts["answer"] = extract_answer(tasks[task_id], texts["output"])
    # White space around an option is how it stands behind the prefix, and need not be in the answer.
    texts["answer"] = {option.strip(): option for option in options}.get(texts["answer"], texts["answer"])
    if options and closed and texts["answer"] not in options:
        raise UserError(f"{where}: the answer {texts['answer']!r} is not one of its options {'/'.join(options)}")
    if options and answered and not closed:
        _check_output(texts, tasks[task_id], options, where)
    return Example(*texts.values(), task_id, index, extra, tuple(value.get("context", ())) if told else ())


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, not {value!r:.200}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a character, such as "\ud800"
        raise UserError(f"{what} holds half a character (a lone surrogate), which no tokenizer reads") from None
    return value


def _from_messages(value: dict, where: str) -> dict:
    """A record of ``messages`` as the fields of an example: the user's last message is the instruction, what the
    assistant says to it the output, and what was said before the ``context``."""
    if both := value.keys() & {"instruction", "input", "output"}:
        raise UserError(f"{where} has 'messages' and {sorted(both)[0]!r}; leave one of them")
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'messages' must be a list of {{role, content}}, not {turns!r:.200}")
    for number, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r:.50}; it must be {', '.join(ROLES)}")
        _text(turn.get("content"), f"{where}: the content of message {number}")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    output = {"output": turns.pop()["content"]} if turns[-1]["role"] == "assistant" else {}
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{where}: 'messages' must end with one of the user, or with the assistant's answer to it")
    return {**value, **output, "instruction": turns.pop()["content"], "context": turns}


def _check_output(texts: dict[str, str], task: Task, options: Sequence[str], where: str) -> None:
    """Raise ``UserError`` where an evaluation would extract another answer from the output than the example's."""
    output, answer, prefix = texts["output"], texts["answer"], task.answer_prefix.strip()
    if prefix not in output:  # scoring asks for the option behind it, which would never be trained
        raise UserError(
            f"{where}: the output {output!r} lacks the task's answer prefix {prefix!r}; write it before "
            'the answer, or declare "answer_prefix": "" in the tasks file'
        )
    found = extract_answer(task, output)
    if found not in options or (answer and found != answer):
        wanted = repr(answer) if answer else f"one of {'/'.join(options)}"
        raise UserError(
            f"{where}: an evaluation would read the answer {found!r} from the output {output!r}, not "
            f"{wanted}; let output and answer agree"
        )


def _task_id(value: dict, where: str, tasks: TaskSet, task: str | None) -> int:
    """The example's task by ``task_id``, by ``task`` (a name) and by its file, which must agree."""
    found = []
    if "task_id" in value:
        given = value["task_id"]
        if isinstance(given, str) and given.isascii() and given.isdecimal():  # as in CSV
            given = int(given[:9])
        elif isinstance(given, float) and given.is_integer():  # as tables write a column that has gaps
            given = int(given)
        if type(given) is not int or not 0 <= given < len(tasks):
            raise UserError(f"{where}: task_id {value['task_id']!r:.50} is none of the tasks {tasks.describe()}")
        found.append(given)
    if "task" in value:
        if value["task"] not in tasks.names:
            raise UserError(f"{where}: task {value['task']!r} is none of the tasks {tasks.describe()}")
        found.append(tasks[value["task"]].id)
    if task is not None:
        found.append(tasks[task].id)
    if not found:
        raise UserError(f"{where} has no field 'task_id' (or 'task', a name); the tasks are {tasks.describe()}")
    if len(set(found)) > 1:
        names = " and ".join(tasks[task_id].name for task_id in found)
        raise UserError(f"{where} belongs to different tasks at once: {names}")
    return found[0]


# ---- samples ----

SAMPLE_SEED = 0


def sampled(examples: Sequence[Example], most: int, task: str) -> list[Example]:
    """``most`` examples (0: all) of one task in the file's order: the first of a shuffle, so a larger sample adds."""
    order = list(range(len(examples)))
    random.Random(f"{SAMPLE_SEED} {task}").shuffle(order)
    return [examples[index] for index in sorted(order[: most or None])]


def sample_training(
    source: Path, folder: Path, examples: Sequence[Example], tasks: TaskSet, most: int, only: Collection[str] = ()
) -> Sample:
    """``most`` (0: all) of the ``examples`` of each task in ``source``, of all tasks or ``only`` of some.

    Where that is every example, ``source`` itself is read, else a file in ``folder``. Raises ``UserError`` for a task
    of ``only`` that has no example.
    """
    by_task: dict[str, list[Example]] = {name: [] for name in tasks.names}
    for example in examples:
        by_task[tasks[example.task_id].name].append(example)
    if missing := [name for name in only if not by_task[name]]:
        raise UserError(f"{source} has no examples of {', '.join(missing)}")
    chosen = {name: found for name, found in by_task.items() if found and name in (only or by_task)}
    path = folder / ("_".join(["train", *only]) + ".json") if only or most else source
    return _sample(path, {"train": (source, path, chosen)}, most)


def sample_questions(source: Path, folder: Path, tasks: TaskSet, names: Sequence[str], most: int) -> Sample:
    """``most`` (0: all, read in the ``source`` folder) of the questions of each task in ``names``, for ``folder``."""
    path, sets = folder if most else source, {}
    for name in names:
        file, target = data_file(source / name, "test"), path / name / "test.json"
        sets[name] = file, target if most else file, {name: load_examples(file, tasks, name, closed=True)}
    return _sample(path, sets, most)


def _sample(path: Path, sets: dict[str, tuple[Path, Path, dict[str, list[Example]]]], most: int) -> Sample:
    """sets: by name, the file to read, the one to write, and the examples by task."""
    sample = Sample({}, {}, {}, {}, path)
    for name, (source, target, by_task) in sets.items():
        kept = {task: sampled(examples, most, task) for task, examples in by_task.items()}
        sample.records.update((task, len(examples)) for task, examples in kept.items())
        sample.of.update((task, len(examples)) for task, examples in by_task.items())
        sample.sha256[name] = sample.source_sha256[name] = files.sha256(source)
        if target != source:
            examples = [example for examples in kept.values() for example in examples]
            sample.content[target] = files.records_bytes([example.record() for example in examples])
            sample.sha256[name] = files.sha256_of(sample.content[target])
    return sample
