"""``results.json``: what an evaluation measured, and everything needed to trace, repeat and compare it.

Evaluation writes it through these classes (schema 2); tables, comparisons, figures and studies read it through them.
Schema 1, in which every metric was an accuracy, can still be read. Nothing here depends on a system or a benchmark.
The module starts with ``Reader``, which reads every JSON file that is kept as dataclasses, including a study's.
"""

import collections
import dataclasses
import functools
import math
import reprlib
import statistics
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.config import is_number
from mtl_lora.embedded import MODELS
from mtl_lora.errors import UserError
from mtl_lora.estimates import proportion_error
from mtl_lora.metrics import METRICS, NOTHING, Mean, one_unit, title_of

SCHEMA = 2
# A file may hold a rounded average, but not one that contradicts its own tasks in a digit that tables show.
AVERAGE_TOLERANCE = 0.001
_SCHEMA_1_TITLES = {"lora": "LoRA", "dora": "DoRA", "multilora": "MultiLoRA", "moelora": "MoELoRA"}
_SCHEMA_1_TITLES |= {"mtl_lora": "MTL-LoRA"}

# ---- JSON files as dataclasses ----

# A type, then the rule that its values must satisfy: in words, for errors, and as a test.
Text = typing.Annotated[str, "a non-empty string", str.strip]
Name = typing.Annotated[str, "letters, digits, '_', '-' or '.', and not dots alone", files.NAME.fullmatch]
Fraction = typing.Annotated[float, "a fraction from 0 to 1", lambda number: 0 <= number <= 1]
Score = typing.Annotated[float, "a number from 0 to 10", lambda number: 0 <= number <= 10 + 1e-9]
Correlation = typing.Annotated[float, "a number from -1 to 1", lambda number: -1 <= number <= 1]
Angle = typing.Annotated[float, "a number from 0 to 180", lambda number: 0 <= number <= 180]
Amount = typing.Annotated[float, "a number from 0", lambda number: number >= 0]
Error = typing.Annotated[float, "a standard error from 0", lambda number: number >= 0]
Count = typing.Annotated[int, "a whole number from 1", lambda count: count >= 1]
Index = typing.Annotated[int, "a whole number from 0", lambda count: count >= 0]
# The keys of ``TaskResult.measured`` that reports read, with their types.
_MEASURED = {"predicted": dict[str, Index], "unparsed": Fraction, "correct": Index, "f1": Fraction, "tokenizer": str}
_WORDS = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", list: "a list"}
_MISSING = type("_Missing", (), {"__repr__": lambda self: "missing"})()  # stands for a missing key


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the values of one file into dataclasses. source: names the file in errors; schema: the file's schema.

    A field's type says what its key must hold. A key whose field has a default may be missing or null. Unknown keys are
    ignored, so that a newer file can be read. A class with its own rules defines ``read_json(reader, value, place)``
    and ``to_json()``, which are used instead of its fields.
    """

    source: str
    schema: int = 1

    def read(self, expected: object, value: object, place: str = "") -> typing.Any:
        """Return ``value`` as the type ``expected``; raises ``UserError`` naming file, key and rule if it is not."""
        origin, (first, *rest) = typing.get_origin(expected), typing.get_args(expected) or (expected,)
        if origin in (types.UnionType, typing.Union):
            return None if value is None else self.read(first, value, place)
        if origin is dict:
            entries = self.read(dict, value, place).items()
            return {key: self.read(rest[0], entry, f"{place}.{key}".lstrip(".")) for key, entry in entries}
        if origin is list:
            return [self.read(first, each, f"{place}[{i}]") for i, each in enumerate(self.read(list, value, place))]
        if hasattr(first, "read_json"):
            return first.read_json(self, value, place)
        if dataclasses.is_dataclass(first):
            return first(**self.fields(first, value, place))
        known = type(value) is first or (first is object and value is not _MISSING)
        if first in (float, int):
            known = is_number(value, whole=first is int)
        words, holds = rest or (_WORDS.get(first, "an object"), lambda value: True)
        if not (known and holds(value)):
            raise self.wrong(place, value, words)
        return value

    def fields(self, cls: type, value: object, place: str = "") -> dict:
        """Return the arguments of the dataclass ``cls`` from the keys of an object."""
        entries = self.read(dict, value, place)
        return {
            name: self.key(entries, name, hint, place)
            for name, (hint, required) in _fields(cls).items()
            if required or entries.get(name) is not None
        }

    def key(self, entries: dict, key: str, expected: object, place: str = "") -> typing.Any:
        """Return the value of a required key of the object at ``place``."""
        return self.read(expected, entries.get(key, _MISSING), f"{place}.{key}".lstrip("."))

    def wrong(self, place: str, value: object, rule: str) -> UserError:
        """Return the error for a value that breaks ``rule``."""
        return UserError(f"{self.source}: {place or 'the file'} is {reprlib.repr(value)}; it must be {rule}")


@functools.cache
def _fields(cls: type) -> dict[str, tuple[object, bool]]:
    """The fields that are keys of the file: by name, the type and whether the key is required."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: (hints[field.name], field.default is field.default_factory is dataclasses.MISSING)
        for field in dataclasses.fields(cls)
        if field.compare  # a field that equality ignores is not a key of the file
    }


def to_json(value: object) -> typing.Any:
    """Return a dataclass, or a container of dataclasses, as JSON; ``Reader.read`` gives an equal value back."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return object_of(value)
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    return [to_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def object_of(value: object) -> dict:
    """Return the fields of a dataclass as the keys of a JSON object."""
    return {name: to_json(getattr(value, name)) for name in _fields(type(value))}


# ---- results ----


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The result of one task: the value of ``metric`` over ``n`` examples and its standard error; see ``measure``.

    The value of a metric in ``METRICS`` lies between its lowest and its highest, and is shown times its scale; another
    metric may have any value. majority: the value of always giving the majority class. groups: the same
    metric over parts of the examples, by name. others: other measures of the same answers, by name (``strict``,
    ``acc_norm``; for a metric that is a mean, its parts, such as ``accuracy`` and ``binary_f1``). measured: further
    JSON values (``unparsed``, ``predicted``, ``correct``, ``f1``; ``untrained``: the adapter had no training examples
    of the task).
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    majority: float | None = None
    groups: dict[str, "TaskResult"] = dataclasses.field(default_factory=dict)
    others: dict[str, "TaskResult"] = dataclasses.field(default_factory=dict)
    measured: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def measure(self) -> str:
        """What two results must share to be comparable: the metric, and for captions the tokenizer."""
        return ", tokenizer ".join(filter(None, [self.metric, self.measured.get("tokenizer")]))

    @property
    def untrained(self) -> bool:
        """Whether the adapter had no training examples of the task."""
        return bool(self.measured.get("untrained"))

    @property
    def has_known_metric(self) -> bool:
        """Whether this version knows the metric, and so whether more of it is better."""
        return self.metric in METRICS

    def minus(self, other: "TaskResult") -> "TaskResult":
        """This result minus another one; standard errors combine as for independent samples."""
        stderr = None if None in (self.stderr, other.stderr) else math.hypot(self.stderr, other.stderr)
        groups = {name: group.minus(other.groups[name]) for name, group in self.groups.items() if name in other.groups}
        measured = {"untrained": self.untrained or other.untrained}
        return TaskResult(self.metric, self.value - other.value, stderr, None, groups=groups, measured=measured)

    @classmethod
    def read_json(cls, reader: Reader, value: object, place: str, metric: str | None = None) -> "TaskResult":
        """Read from JSON; groups and other measures have the ``metric`` of their task unless they name another."""
        entries, key = {"metric": metric, **reader.read(dict, value, place)}, "value"
        if reader.schema == 1:
            entries = {"acc_norm" if name == "normalised" else name: entry for name, entry in entries.items()}
            entries["metric"] = key = "accuracy"
        metric = reader.key(entries, "metric", Text, place)
        ends = (METRICS[metric].lowest, METRICS[metric].highest) if metric in METRICS else None
        number = {None: float, (0, 1): Fraction, (-1, 1): Correlation, (0, 10): Score, (0, 180): Angle}.get(
            ends, Amount
        )
        value, stderr, n = (
            reader.key(entries, name, kind, place)
            for name, kind in ((key, number), ("stderr", Error | None), ("n", Count))
        )
        # Earlier versions wrote 0 where no answer or every answer was right.
        if stderr == 0 and ends == (0, 1) and isinstance(METRICS[metric], Mean):
            stderr = proportion_error(value, n)
        groups = reader.read(dict, entries.pop("groups", None) or {}, f"{place}.groups")
        others = {
            name: cls.read_json(reader, entry, f"{place}.{name}", metric)
            for name, entry in entries.items()
            # Not ``predicted``: its keys are answers, which may have any name.
            if name != "predicted" and isinstance(entry, dict) and {key, "stderr", "n"} <= entry.keys()
        }
        known = {"metric", key, "stderr", "n", "majority", *others}
        for name, kind in _MEASURED.items():
            reader.read(kind | None, entries.get(name), f"{place}.{name}")
        return cls(
            metric,
            value,
            stderr,
            n,
            reader.read(number | None, entries.get("majority"), f"{place}.majority"),
            {name: cls.read_json(reader, group, f"{place}.groups.{name}", metric) for name, group in groups.items()},
            others,
            {name: entry for name, entry in entries.items() if name not in known},
        )

    def to_json(self, within: str | None = None) -> dict:
        """Return a JSON object. within: for a group or another measure, the metric of its task, not repeated."""
        value = {} if self.metric == within else {"metric": self.metric}
        value |= {"value": self.value, "stderr": self.stderr, "n": self.n}
        value |= {} if within and self.majority is None else {"majority": self.majority}
        value |= self.measured | {name: other.to_json(self.metric) for name, other in self.others.items()}
        groups = {name: group.to_json(self.metric) for name, group in self.groups.items()}
        return value | ({"groups": groups} if groups else {})


def measure(
    metric: str, lines: Sequence[dict], labels: Sequence[str] = (), key: str = "parsed", **measured: object
) -> TaskResult:
    """Return a task's result from at least one prediction line, by comparing its ``parsed`` with the metric's target.

    The result has the two parts of a metric that is a mean of two as ``others``, ``groups`` by the ``kind`` of lines,
    and the number of ``correct`` lines where every line has that key; for texts also the value of the majority class
    and how often each answer was given (``predicted``).
    labels: the task's labels, where the metric needs them. key: take the answers from this key instead of ``parsed``,
    and compute the metric and its parts alone. measured: further values to record. Raises ``KeyError`` for a line
    without the keys it needs.
    """
    result = _measured(metric, lines, labels, key, measured)
    if key != "parsed":
        return result
    groups, targets = {}, [line[METRICS[metric].target] for line in lines]
    for line in lines:
        if line.get("kind") not in (None, ""):  # comes from the user's data, so it may have any type
            groups.setdefault(str(line["kind"]), []).append(line)
    found = {kind: _measured(metric, groups[kind], labels, key, {}) for kind in sorted(groups)}
    result = dataclasses.replace(result, groups=found)
    if METRICS[metric].needs == "numbers" or METRICS[metric].has_written_rows:
        return result
    counts = collections.Counter()
    for target in targets:  # one answer, several answers, or soft scores by answer
        counts.update([target] if isinstance(target, str) else target)
    ((most_frequent, _),) = counts.most_common(1)
    majority = METRICS[metric].value([most_frequent] * len(lines), targets, labels)
    predicted = dict(sorted(collections.Counter(line["parsed"] for line in lines).items()))
    return dataclasses.replace(result, majority=majority, measured=result.measured | {"predicted": predicted})


def _measured(metric: str, lines: Sequence[dict], labels: Sequence[str], key: str, measured: dict) -> TaskResult:
    if key == "parsed" and all("correct" in line for line in lines):
        measured = {"correct": sum(line["correct"] for line in lines), **measured}
    measures = {name: METRICS[name] for name in (metric, *METRICS[metric].parts)}
    found = {name: each.estimate(each.of_lines(lines, labels, key)) for name, each in measures.items()}
    result, *others = (TaskResult(name, *numbers, len(lines)) for name, numbers in found.items())
    return dataclasses.replace(result, others={other.metric: other for other in others}, measured=measured)


@dataclasses.dataclass(frozen=True)
class Average:
    """The unweighted mean over ``tasks`` tasks and its standard error. groups: over the tasks that have the group."""

    value: float
    stderr: float | None
    tasks: int
    groups: dict[str, "Average"] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        return {key: to_json(value) for key, value in vars(self).items() if key != "groups" or value}


def average_of(results: Iterable[TaskResult]) -> Average:
    """Return the plain mean of at least one result; its standard error is sqrt(sum of squared standard errors) / T."""
    results, groups = list(results), {}
    for name, group in (pair for result in results for pair in result.groups.items()):
        groups.setdefault(name, []).append(group)
    errors, count = [result.stderr for result in results], len(results)
    error = None if None in errors else math.hypot(*errors) / count
    mean = statistics.fmean(result.value for result in results)
    return Average(mean, error, count, {name: average_of(parts) for name, parts in groups.items()})


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The number of trainable parameters (``adapter``) and of all parameters of the model (``total``)."""

    adapter: Index
    total: Count

    @classmethod
    def mean(cls, counts: Sequence["Trainable | None"]) -> "Trainable | None":
        """The mean of several models, rounded; None if one is unknown."""
        if not counts or None in counts:
            return None
        return cls(*(round(statistics.fmean(getattr(each, key) for each in counts)) for key in ("adapter", "total")))


def trainable_text(trainable: Trainable | None, adapters: int = 1) -> str:
    """``16.85 (0.25 %)``: millions of trainable parameters, and their proportion of all; if there are several
    ``adapters``, their number and the mean size of each."""
    if trainable is None:
        return NOTHING
    numbers = trainable.adapter / 1e6, 100 * trainable.adapter / trainable.total
    # At least two decimals, and as many as two significant digits need.
    millions, part = (f"{n:.{max(2, 1 - math.floor(math.log10(n))) if n else 2}f}" for n in numbers)
    return f"{adapters} x {millions} ({part} %)" if adapters > 1 else f"{millions} ({part} %)"


@dataclasses.dataclass(frozen=True)
class Sample:
    """The number of examples used of each task (``records``), ``of`` how many; sha256 of the files used and of their
    sources.

    path: the file or folder to pass as a flag. content: files to write before the sample can be read, with their
    content. own: the user's files that are read directly, with their sha256.
    """

    records: dict[str, int]
    of: dict[str, int]
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    source_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    path: Path = dataclasses.field(default=Path(), compare=False)
    content: dict[Path, bytes] = dataclasses.field(default_factory=dict, compare=False)
    own: dict[Path, str] = dataclasses.field(default_factory=dict, compare=False)

    def write(self) -> None:
        """Write missing or outdated files of ``content``; raises ``UserError`` if a file of ``own`` changed."""
        for path, content in self.content.items():
            if not path.is_file() or path.read_bytes() != content:
                files.write_all({path: content})
        for path, digest in self.own.items():
            if files.sha256(path) != digest:
                raise UserError(f"{path} was changed while the study ran; run the same command again")


@dataclasses.dataclass(frozen=True)
class _Task:
    name: Name
    id: Index
    title: Text | None = None
    labels: list[str] | None = None
    options: list[str] | None = None
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class TaskNames:
    """The part of a task set that reports need: names in id order, columns in table order, titles and loss weights by
    name.

    value: the whole set as its system writes it, ``{"tasks": [{"name", "id", "title", ...}], "columns": [...]}``.
    """

    value: dict
    names: list[str]
    columns: list[str]
    titles: dict[str, str]
    weights: dict[str, float]

    @classmethod
    def from_json(cls, value: object, source: str = "the task set") -> "TaskNames":
        """Read a task set's JSON; raises ``UserError`` naming ``source`` and what is wrong."""
        return cls.read_json(Reader(source), value, "task_set")

    @classmethod
    def read_json(cls, reader: Reader, value: object, place: str) -> "TaskNames":
        tasks = reader.key(reader.read(dict, value, place), "tasks", list[_Task], place)
        tasks.sort(key=lambda task: task.id)
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise reader.wrong(f"{place}.tasks", names, "at least one task, with different names")
        columns = reader.read(list[str] | None, value.get("columns"), f"{place}.columns") or names
        if sorted(columns) != sorted(names):
            raise reader.wrong(f"{place}.columns", columns, f"each task once: {', '.join(names)}")
        titles = {task.name: task.title or task.name for task in tasks}
        return cls(value, names, columns, titles, {task.name: task.weight for task in tasks})

    @staticmethod
    def require_one(found: Sequence[typing.Any], what: str) -> None:
        """Raise ``UserError`` unless all of ``found`` (each with a ``task_set`` and a ``path``) have the same tasks.

        what: the subject of the error's last clause, "... one set of tasks", such as "one table needs".
        """
        for other in found[1:]:
            if set(other.task_set.names) != set(found[0].task_set.names):
                tasks, first = (", ".join(each.task_set.names) for each in (other, found[0]))
                about = f"{other.path} has the tasks {tasks} and {found[0].path} has {first}"
                raise UserError(f"{about}; {what} one set of tasks")

    @staticmethod
    def require_one_measure(evaluations: Iterable[tuple[object, Mapping[str, TaskResult]]]) -> None:
        """Raise ``UserError`` if two evaluations measure a task by different metrics, or captions with different
        tokenizers. evaluations: (path, results by task) of each."""
        first: dict[str, tuple[str, object]] = {}
        for path, tasks in evaluations:
            for name, result in tasks.items():
                earlier, where = first.setdefault(name, (result.measure, path))
                if result.measure != earlier:
                    about = f"{where} measures {name} by {earlier} and {path} by {result.measure}"
                    raise UserError(
                        f"{about}, which cannot share one table; evaluate one of them again, or leave it out"
                    )

    def to_json(self) -> dict:
        return self.value

    def title(self, name: str, *metrics: str) -> str:
        """A task's column heading: its title (its name if it has none), then its metrics other than accuracy."""
        words = ", ".join(title_of(metric) for metric in sorted({*metrics} - {"accuracy"}))
        return self.titles.get(name, name) + (f" ({words})" if words else "")

    def labels(self, name: str) -> list[str]:
        """The labels or options of a task; empty for free text and numbers."""
        definition = self.definition(name)
        return definition.get("labels") or definition.get("options") or []

    def definition(self, name: str) -> dict:
        """The part of a task's definition that decides its examples and answers: everything but name, id, title,
        metric, loss weight and empty values."""
        (task,) = (task for task in self.value["tasks"] if task["name"] == name)
        beside = ("name", "id", "title", "metric", "weight")
        return {key: entry for key, entry in task.items() if key not in beside and entry}


# Words in notes for settings whose name says too little.
_SETTINGS_IN_WORDS = {"base_fingerprint": "the base model's files", "tasks_sha256": "the tasks' options and patterns"}
_UNSAID = {"load_in_4bit": False}  # settings that are recorded only if they have another value than this


@dataclasses.dataclass(frozen=True)
class Comparability:
    """Which settings two evaluations must share to be compared: all except ``noted`` and ``free`` ones.

    needed: must be recorded, or nothing can be compared. noted: may differ, and reports say so. free: may differ. The
    defaults are the language system's, which wrote the files that lack these keys.
    """

    needed: list[str] = dataclasses.field(
        default_factory=lambda: ["mode", "base_fingerprint", "template", "cutoff_len"]
    )
    noted: list[str] = dataclasses.field(default_factory=lambda: ["base_fingerprint", "tasks_sha256", "dtype"])
    # The limit only decides which questions are asked, and questions are compared one by one.
    free: list[str] = dataclasses.field(default_factory=lambda: ["adapter_sha256", "batch_size", "limit"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """One evaluation: results by task name, and the settings and hashes that decide what it can be compared with.

    mode: the protocol. settings: every setting that an answer depends on. data: sha256 of the test data by task.
    test_sets: the folder of the test data. adapter: the checkpoint's own description. path: the file it was read from.
    """

    system: Text = "language"
    name: Text
    method: Text | None = None
    method_title: Text | None = None
    base_model: Text | None = None
    mode: Text | None = None
    trainable: Trainable | None = None
    tasks: dict[str, TaskResult]
    task_set: TaskNames
    settings: dict = dataclasses.field(default_factory=dict)
    comparability: Comparability = Comparability()
    data: dict[str, Text | None] = dataclasses.field(default_factory=dict)
    test_sets: str | None = None
    adapter: dict | None = None
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    command: str | None = None
    device: str | None = None
    commit: str | None = None
    path: Path | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read a results file, or the one in a folder, see ``load_all``.

        Raises ``UserError`` naming the file and the key, and for a folder with the results of several protocols.
        """
        found = cls.load_all(path)
        if len(found) > 1:
            folders = " and ".join(str(each.path.parent) for each in found)
            raise UserError(f"{path} holds the results of several protocols; pass one of {folders}")
        return found[0]

    @classmethod
    def load_all(cls, path: str | Path, needed: bool = True) -> list["Results"]:
        """Read a results file, or all results of a folder: its own, each protocol's, and those of its evaluation.

        In a checkpoint's folder, results of an earlier adapter are left out, with a line on stderr. Raises
        ``UserError`` naming the file and the key, and if there is no file, unless ``needed`` is false.
        """
        path, inside = Path(path), Path(path) / artifacts.EVALUATION
        places = [folder / name for folder in (path, inside) for name in ("", *artifacts.PROTOCOLS)]
        files_found = [path] if path.is_file() else [p for each in places if (p := each / artifacts.RESULTS).is_file()]
        found = [cls.from_json(files.read_object(file, "the results file"), str(file), file) for file in files_found]
        if any(each.path.is_relative_to(inside) for each in found) and (path / artifacts.CHECKPOINT_CONFIG).is_file():
            adapter = files.read_object(path / artifacts.CHECKPOINT_CONFIG, "the configuration")
            own = (None, adapter.get("weights_sha256"))
            for each in [each for each in found if each.settings.get("adapter_sha256") not in own]:
                print(
                    f"{each.path} is left out: it is of an earlier adapter of {path}; evaluate again", file=sys.stderr
                )
                found.remove(each)
        if needed and not found:
            file = path if path.suffix == ".json" else path / artifacts.RESULTS
            raise UserError(f"there is no results file {file}; pass a {artifacts.RESULTS} or a folder that has one")
        return found

    @classmethod
    def from_json(cls, value: dict, source: str = "the results", path: Path | None = None) -> "Results":
        """Read a JSON object of schema 1 or 2; raises ``UserError`` naming ``source`` and the key."""
        schema = value.get("schema", 1)
        reader, key = Reader(source, schema), "accuracy" if schema == 1 else "value"
        if type(schema) is not int or schema not in (1, SCHEMA):
            raise reader.wrong("schema", schema, f"1 or {SCHEMA}, which this version reads")
        found = cls(**reader.fields(cls, value), path=path)
        if schema == 1:
            titles = _SCHEMA_1_TITLES.get(found.method)
            rules = {"protocol": 1, **({"extraction": 1} if found.mode == "generate" else {})}
            found = dataclasses.replace(found, method_title=titles, settings=rules | found.settings)
        unknown = [name for name in found.tasks if name not in found.task_set.names]
        if unknown or not found.tasks:
            rule = f"results of tasks in its task set: {', '.join(found.task_set.names)}"
            raise reader.wrong(".".join(["tasks", *unknown[:1]]), value["tasks"], rule)
        if value.get("average") is not None and (average := found.average) is not None:
            given = reader.key(reader.read(dict, value["average"], "average"), key, float, "average")
            if abs(given - average.value) > AVERAGE_TOLERANCE:
                rule = f"{average.value:.4f}, the mean of its {average.tasks} tasks; evaluate again"
                raise reader.wrong(f"average.{key}", given, rule)
        return found

    def to_json(self) -> dict:
        """The content of ``results.json``, schema 2."""
        return {"schema": SCHEMA, **object_of(self), "average": to_json(self.average)}

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        files.write_json(path, self.to_json())

    @property
    def scored(self) -> list[str]:
        """Tasks with a result, in column order."""
        return [name for name in self.task_set.columns if name in self.tasks]

    @property
    def average(self) -> Average | None:
        """The average over the tasks with a result; None where their metrics have different units."""
        results = self.tasks.values()
        return average_of(results) if one_unit(result.metric for result in results) else None

    def predictions_path(self, task: str) -> Path:
        """The path of the predictions of one task."""
        return self.path.parent / artifacts.PREDICTIONS / f"{task}.jsonl"

    @staticmethod
    def notes(evaluations: "Sequence[Results]") -> list[str]:
        """Notes for readers of these results: on embedded base models, tasks without training examples or with several
        loss weights, and values that are hardly above the majority class."""
        found = dict.fromkeys(each.base_model for each in evaluations if each.base_model in MODELS)
        found = [f"{name}: {MODELS[name].note}" for name in found]
        low: dict[tuple[str, ...], list[str]] = {}
        weights: dict[str, dict[float, list[str]]] = {}
        for each in evaluations:
            found += each.untrained_notes
            for task in each.tasks if each.method else ():
                weights.setdefault(task, {}).setdefault(each.task_set.weights[task], []).append(each.name)
            known = {name: task for name, task in each.tasks.items() if task.majority is not None}
            names = tuple(name for name, task in known.items() if task.value <= task.majority + 2 * (task.stderr or 0))
            low.setdefault(names, []).append(each.name)
        for task, by_weight in weights.items():
            if len(by_weight) > 1:
                listed = "; ".join(f"{weight:g} in {', '.join(rows)}" for weight, rows in by_weight.items())
                found.append(f"The loss of {task} had different weights in training: {listed}.")
        words = "Not two standard errors above the majority class in"
        return found + [f"{words} {', '.join(tasks)}: {', '.join(rows)}." for tasks, rows in low.items() if tasks]

    @property
    def untrained_notes(self) -> list[str]:
        """One sentence naming the tasks without training examples; empty if there are none."""
        names = ", ".join(name for name, task in self.tasks.items() if task.untrained)
        return [f"{self.name} had no training examples of {names}."] if names else []

    @staticmethod
    def differ_in_questions(evaluations: "Iterable[Results]", task: str) -> bool:
        """Whether the evaluations of a task differ in the number of questions or, as far as known, in the test set."""
        having = [each for each in evaluations if task in each.tasks]
        known = {each.data.get(task) for each in having} - {None}
        return len(known) > 1 or len({each.tasks[task].n for each in having}) > 1

    @staticmethod
    def differing_settings(evaluations: "Sequence[Results]", alone: "Sequence[Results]" = ()) -> dict[str, list]:
        """Return the settings in which the evaluations differ: by setting, (name, value) of each that records it.

        Protocol and ``free`` settings are left out. alone: evaluations of single-task models; each has its own task
        set, so ``tasks_sha256`` is not compared with theirs.
        """
        everyone, found = [*evaluations, *alone], {}
        free = {"mode", *(key for each in everyone[:1] for key in each.comparability.free)}
        if len({each.base_model for each in everyone}) > 1:  # their files then differ anyway
            free.add("base_fingerprint")
        for key in dict.fromkeys(key for each in everyone for key in each.settings if key not in free):
            asked = evaluations if key == "tasks_sha256" else everyone
            having = [each for each in asked if key in each.settings or key in _UNSAID]
            pairs = [(each.name, str(each.settings.get(key, _UNSAID.get(key)))) for each in having]
            found |= {key: pairs} if len({value for _, value in pairs}) > 1 else {}
        return found

    @staticmethod
    def protocol_notes(evaluations: "Sequence[Results]", alone: "Sequence[Results]" = ()) -> list[str]:
        """Notes on the protocol, the base model and the settings that differ. alone: see ``differing_settings``."""
        everyone, notes = [*evaluations, *alone], []
        facts = {"mode": [(each.name, each.mode) for each in everyone]}
        hashes = {each.settings.get("base_fingerprint") for each in everyone}
        same = len(hashes) == 1 and None not in hashes  # one model may lie in two places
        facts["base model"] = [(each.name, everyone[0].base_model if same else each.base_model) for each in everyone]
        for key, pairs in Results.differing_settings(evaluations, alone).items():
            facts[_SETTINGS_IN_WORDS.get(key, key)] = pairs
        for word, pairs in facts.items():
            values = {value for _, value in pairs}
            if len(values) > 1:
                known = [(name, value or "unknown") for name, value in pairs]
                # A sha256 is cut short.
                shown = [f"{name} {value[:12] if len(value) == 64 else value}" for name, value in known]
                notes.append(f"Rows differ in {word}: {', '.join(shown)}.")
            elif values != {None}:
                notes.append(f"{word.capitalize()}: {values.pop()}.")
        return notes

    @staticmethod
    def differ(evaluations: "Sequence[Results]") -> bool:
        """Whether the evaluations differ in the questions of a task or in how these were answered."""
        tasks = {task for each in evaluations for task in each.tasks}
        of_questions = any(Results.differ_in_questions(evaluations, task) for task in tasks)
        of_answers = len({each.mode for each in evaluations}) > 1 or Results.differing_settings(evaluations)
        return bool(of_questions or of_answers)
