"""Examples from a JSON file, validated: an error names the file, the example and the field in one sentence; samples."""

import dataclasses
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.metrics import extract_answer
from mtl_lora.language.tasks import TaskSet
from mtl_lora.results import Sample


@dataclasses.dataclass(frozen=True)
class Example:
    """One example: the five fields with which LLM-Adapters' files are written, and its place in the file.

    extra: any further fields, kept for reports (for example ``kind`` in the quick-start data).
    """

    instruction: str
    input: str
    output: str
    answer: str
    task_id: int
    index: int
    extra: dict = dataclasses.field(default_factory=dict, compare=False)

    def text(self) -> dict[str, str]:
        """The fields that a prompt template reads."""
        return {"instruction": self.instruction, "input": self.input}


FIELDS = ("instruction", "input", "output", "answer", "task_id")


def load_examples(path: str | Path, tasks: TaskSet, task: str | None = None, closed: bool = False) -> list[Example]:
    """Read a JSON list, or JSON lines, of examples; raises ``UserError`` naming file, example and field.

    task: the name of the task when the file holds one task alone; else each example has ``task_id`` or ``task``,
    unless there is only one task. closed: require an answer, one of its example's options (evaluation).
    """
    values = read_values(Path(path))
    if not values:
        raise UserError(f"{path} holds no examples")
    task = tasks.names[0] if task is None and len(tasks) == 1 else task
    return [parse_example(value, index, str(path), tasks, task, closed) for index, value in enumerate(values)]


def read_values(path: Path) -> list:
    """The values of a JSON list or of JSON lines; a BOM and blank lines are skipped."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read ({error.strerror})") from None
    if path.suffix.lower() != ".jsonl":
        try:
            values = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            # JSON lines under the name of a list begin with an object and have more behind it.
            if "Extra data" not in str(error) or not content.startswith(b"{"):
                raise UserError(f"the data file {path} is not JSON: {error}") from None
        else:
            if not isinstance(values, list):
                raise UserError(f"{path} must hold a JSON list of examples, not {type(values).__name__}")
            return values
    values = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            values += [json.loads(line.decode())] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
    return values


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
    # Only an evaluation compares answers.
    values = {"input": "", **({} if closed else {"answer": ""}), **value}
    if values["input"] is None:
        values["input"] = ""
    needed = ("instruction", "input", "output", "answer") if answered else ("instruction", "input")
    for field in needed:
        if field not in values:
            raise UserError(f"{where} has no field {field!r}")
        if not isinstance(values[field], str):
            raise UserError(f"{where}: {field!r} must be a string, not {values[field]!r}")
        try:
            values[field].encode()
        except UnicodeEncodeError:  # JSON can spell half of a character, such as "\ud800"
            raise UserError(
                f"{where}: {field!r} holds half a character (a lone surrogate), which no tokenizer reads"
            ) from None
    for field in ("instruction", "output"):
        if field in needed and not values[field].strip():
            raise UserError(f"{where}: {field!r} is empty")
    task_id = _task_id(value, where, tasks, task)
    options = tasks[task_id].options_of(values["instruction"])
    if answered:  # white space around an option is how it stands behind the prefix, and need not be in the answer
        written = {option.strip(): option for option in options}
        values["answer"] = written.get(values["answer"], values["answer"])
    if options and closed and values["answer"] not in options:
        raise UserError(f"{where}: the answer {values['answer']!r} is not one of its options {'/'.join(options)}")
    if options and answered and not closed:
        found = extract_answer(tasks[task_id], values["output"])
        prefix = tasks[task_id].answer_prefix.strip()
        if prefix not in values["output"]:  # scoring asks for the option behind it, which would never be trained
            raise UserError(
                f"{where}: the output {values['output']!r} lacks the task's answer prefix {prefix!r}; write it before "
                'the answer, or declare "answer_prefix": "" in the tasks file'
            )
        if found not in options or (values["answer"] and found != values["answer"]):
            wanted = repr(values["answer"]) if values["answer"] else f"one of {'/'.join(options)}"
            raise UserError(
                f"{where}: an evaluation would read the answer {found!r} from the output {values['output']!r}, not "
                f"{wanted}; let output and answer agree"
            )
    extra = {key: entry for key, entry in value.items() if key not in FIELDS and key != "task"}
    texts = [values[field] if field in needed else "" for field in ("instruction", "input", "output", "answer")]
    return Example(*texts, task_id, index, extra)


def _task_id(value: dict, where: str, tasks: TaskSet, task: str | None) -> int:
    """The example's task by ``task_id``, by ``task`` (a name) and by its file, which must agree."""
    found = []
    if "task_id" in value:
        if type(value["task_id"]) is not int or not 0 <= value["task_id"] < len(tasks):
            raise UserError(f"{where}: task_id {value['task_id']!r} is none of the tasks {tasks.describe()}")
        found.append(value["task_id"])
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
        file = Path(name, "test.json")
        sets[name] = source / file, path / file, {name: load_examples(source / file, tasks, name, closed=True)}
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
            records = [{key: getattr(example, key) for key in FIELDS} | example.extra for example in examples]
            sample.content[target] = files.records_bytes(records)
            sample.sha256[name] = files.sha256_of(sample.content[target])
    return sample
