"""The commonsense files of LLM-Adapters: what each must be, and reading a folder of them with every record checked."""

import dataclasses
from pathlib import Path

from mtl_lora.download import git_blob_sha1
from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.tasks import COMMONSENSE, Task

FIELDS = ("instruction", "input", "output", "answer")


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is known of one file: its path in the repository, its number of records and its git blob id."""

    path: str
    records: int
    git_blob_sha1: str

    def __post_init__(self):
        if [type(value) for value in dataclasses.astuple(self)] != [str, int, str]:
            raise TypeError(f"{self} needs path and hash as text, records as a whole number")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of one commit of a repository; ``files`` by task name and split."""

    repository: str
    commit: str
    merged: Expected
    files: dict[tuple[str, str], Expected]


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the source as it was found; ``git_blob_sha1`` is empty and ``records`` too if there is none."""

    task: Task
    split: str
    expected: Expected
    path: Path
    records: list[dict]
    git_blob_sha1: str

    @property
    def state(self) -> str:
        """``exact``: the known bytes. ``partial``: fewer records. ``inexact``: other bytes. ``missing``: no file."""
        if not self.git_blob_sha1:
            return "missing"
        if self.git_blob_sha1 == self.expected.git_blob_sha1:
            return "exact"
        return "partial" if len(self.records) < self.expected.records else "inexact"

    def describe(self) -> str:
        """What was expected and found, for messages."""
        name = f"{self.task.name}/{self.path.name}"
        if self.state == "missing":
            return f"{name} is missing ({self.expected.records:,} records)"
        return (
            f"{name} is {self.state} ({len(self.records):,} of {self.expected.records:,} records, "
            f"git blob {self.git_blob_sha1} instead of {self.expected.git_blob_sha1})"
        )


def load_manifest(path: Path) -> Manifest:
    """Read which files there are; raises ``UserError`` if an entry for one of the tasks is missing or wrong."""
    value = read_json(path, "the manifest")
    try:
        files = {
            (task.name, split): Expected(**value["tasks"][task.name][split])
            for task in COMMONSENSE
            for split in ("train", "test")
        }
        return Manifest(value["repository"], value["commit"], Expected(**value["merged"]), files)
    except KeyError as error:
        raise UserError(f"the manifest {path} has no entry {error}; it needs every file of every task") from None
    except TypeError as error:
        raise UserError(f"the manifest {path} is not laid out as data/commonsense/manifest.json is: {error}") from None


def record_problem(record: object, task: Task | None = None) -> str:
    """What is wrong with a record, empty if nothing is; its answer is checked if its task is known."""
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, not an object with {', '.join(FIELDS)}"
    for field in FIELDS:
        if field not in record:
            return f"has no field {field!r}"
        if not isinstance(record[field], str):
            return f"has the {field} {record[field]!r:.60}, which must be a string"
    if not record["instruction"].strip():
        return "has an empty instruction"
    if task and record["answer"] not in task.options:
        return f"has the answer {record['answer']!r:.60}, which is none of {task.name}'s: {', '.join(task.options)}"
    if task and record["output"] != task.answer_prefix + record["answer"]:
        return f"has the output {record['output']!r:.60} instead of {task.answer_prefix + record['answer']!r}"
    return ""


def read_records(path: Path, task: Task | None = None) -> list[dict]:
    """Read and check a list of records; raises ``UserError`` that names the file and the first wrong record."""
    records = read_json(path, "the data file")
    if not isinstance(records, list):
        raise UserError(f"{path} holds a JSON {type(records).__name__}; it must be a list of records")
    for index, record in enumerate(records):
        if problem := record_problem(record, task):
            raise UserError(f"{path}: record {index} {problem}")
    return records


def read_source(folder: Path, manifest: Manifest) -> list[SourceFile]:
    """Read every task's train and test file, in order of task id; raises ``UserError``.

    Where train.json is absent, train_partial.json stands in for it: its state is then ``partial``.
    """
    if not folder.is_dir():
        raise UserError(f"the source {folder} is no folder; pass the one that holds <task>/train.json and test.json")
    sources = []
    for (name, split), expected in manifest.files.items():
        path = folder / name / f"{split}.json"
        partial = path.with_name("train_partial.json")
        if split == "train" and not path.exists() and partial.exists():
            path = partial
        records = read_records(path, COMMONSENSE[name]) if path.exists() else []
        blob = git_blob_sha1(path) if path.exists() else ""
        sources.append(SourceFile(COMMONSENSE[name], split, expected, path, records, blob))
    if all(source.state == "missing" for source in sources):
        raise UserError(f"the source {folder} holds no file of any task; it needs boolq/train.json and so on")
    return sources
