"""Build the commonsense training file and test sets: download them or take a folder, verify, tag with task ids, merge.

    mtl-lora prepare commonsense                            download from LLM-Adapters, then write
    mtl-lora prepare commonsense --source DIR               take DIR/<task>/{train,test}.json instead
    mtl-lora prepare commonsense --merged commonsense_170k.json    tag that file, keeping its order

The output is one JSON list, one example a line, in ASCII (other characters escaped), so that it reads the same under
any locale: {instruction, input, output, answer, task_id}. An example's task is that of the file it came from. Examples
stand in order of task id and then of their file, for training shuffles and a fixed order gives a fixed sha256.
Test sets are copied byte for byte. Paths are relative to the current folder.
"""

import collections
import dataclasses
import json
from pathlib import Path

from mtl_lora.config import Config, flag
from mtl_lora.errors import UserError
from mtl_lora.files import read_json, records_bytes, sha256_of, write_all
from mtl_lora.language.prepare import RemoteFile, fetch_all, git_blob_sha1, github_raw
from mtl_lora.language.tasks import COMMONSENSE, Task

MANIFEST = Path(__file__).with_name("commonsense.json")
FIELDS = ("instruction", "input", "output", "answer")
SPLITS = ("train", "test")
NAMED = 5  # the number of examples without a task that an error names; the others are counted


@dataclasses.dataclass
class Prepare(Config):
    """Where the files come from, and where the data set goes."""

    source: str | None = flag(None, "folder with <task>/{train,test}.json to take; none: download")
    output: str = flag("commonsense_170k_taskid.json", "training file to write", place=True)
    test_dir: str = flag("data/commonsense/test", "folder for <task>/test.json", place=True)
    merged: str | None = flag(None, "commonsense_170k.json to tag by exact instruction; none: merge the files")
    allow_partial: bool = flag(False, "write what an incomplete source has, instead of refusing it")
    download_dir: str = flag("data/commonsense/source", "folder where downloads are kept", place=True)
    base_url: str | None = flag(None, "address of a mirror that holds the manifest's paths; none: GitHub")
    manifest: str = flag(str(MANIFEST), "JSON file with path, number of examples and hashes of each file")

    def validate(self) -> None:
        if self.source and self.base_url:
            raise UserError("--source takes a folder and --base_url downloads; pass one of them")


@dataclasses.dataclass(frozen=True)
class Expected(RemoteFile):
    """A file of the repository and its number of examples."""

    records: int


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the source as it was found; without a file ``blob`` and ``records`` are empty."""

    task: Task
    split: str
    expected: Expected
    path: Path
    records: list[dict]
    blob: str

    @property
    def state(self) -> str:
        """``exact``: the known bytes. ``partial``: fewer examples. ``inexact``: other bytes. ``missing``: no file."""
        if not self.blob:
            return "missing"
        if self.blob == self.expected.git_blob_sha1:
            return "exact"
        return "partial" if len(self.records) < self.expected.records else "inexact"

    def describe(self) -> str:
        """What was expected and found, for messages."""
        name, expected = f"{self.task.name}/{self.path.name}", self.expected
        if self.state == "missing":
            return f"{name} is missing ({expected.records:,} examples)"
        counts = f"{len(self.records):,} of {expected.records:,} examples"
        return f"{name} is {self.state} ({counts}, git blob {self.blob} instead of {expected.git_blob_sha1})"


def run(config: Prepare) -> None:
    """Read everything, check everything, and only then write; raises ``UserError``."""
    url, merged, files = load_manifest(config.manifest)
    folder = Path(config.source or config.download_dir)
    if not config.source:
        fetch_all(config.base_url or url, folder, files)
    sources = read_source(folder, files)
    problems = [source.describe() for source in sources if source.state != "exact"]
    train = [source for source in sources if source.split == "train"]
    records = [tagged(record, source.task) for source in train for record in source.records]
    whole = sum(source.expected.records for source in train)
    if problems and not config.allow_partial:
        raise UserError(
            f"{folder} is incomplete or inexact ({len(records):,} of {whole:,} training examples): "
            f"{'; '.join(problems)}; complete it or pass --allow_partial"
        )
    if config.merged:
        records, unplaced = tag_by_lookup(Path(config.merged), train)
        if unplaced:
            more = f" and {len(unplaced) - NAMED:,} more" if len(unplaced) > NAMED else ""
            named = f"{', '.join(unplaced[:NAMED])}{more}"
            problems.append(f"no single task's training file holds {named} of {config.merged}")
            if not config.allow_partial:
                raise UserError(f"{problems[-1]}; --allow_partial leaves them out")
        problems.append(describe_merged(config.merged, len(records) + len(unplaced), merged))
    if not records:
        raise UserError(f"{config.merged or folder} gives no training example; nothing was written")
    digest = write(config, sources, records)
    print("\n".join([table(sources, records), *problems]))
    print(f"{len(records):,} of {whole:,} training examples in {config.output}\nsha256 {digest}")


def load_manifest(path: str | Path) -> tuple[str, Expected, dict[str, Expected]]:
    """(address of the files, the merged file, each file by its place in the source); raises ``UserError``."""
    value = read_json(path, "the manifest")
    try:
        entries = {f"{task.name}/{split}": value["tasks"][task.name][split] for task in COMMONSENSE for split in SPLITS}
        files = {f"{name}.json": Expected.from_json(entry, name) for name, entry in entries.items()}
        return github_raw(value["repository"], value["commit"]), Expected.from_json(value["merged"], "merged"), files
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"the manifest {path} must be laid out as {MANIFEST}; missing or wrong: {error}") from None


def read_source(folder: Path, files: dict[str, Expected]) -> list[SourceFile]:
    """Read every task's train and test file, in order of task id; raises ``UserError``.

    Where train.json is absent, train_partial.json stands in for it: its state is then ``partial``.
    """
    if not folder.is_dir():
        raise UserError(f"the source {folder} is not a folder; pass the one with <task>/train.json and test.json")
    sources = []
    for name, expected in files.items():
        path = folder / name
        task, split = COMMONSENSE[path.parent.name], path.stem
        partial = path.with_name("train_partial.json")
        if split == "train" and not path.exists() and partial.exists():
            path = partial
        records, blob = (read_records(path, task), git_blob_sha1(path)) if path.exists() else ([], "")
        sources.append(SourceFile(task, split, expected, path, records, blob))
    if all(source.state == "missing" for source in sources):
        raise UserError(f"the source {folder} holds no file of any task; it needs boolq/train.json and so on")
    return sources


def read_records(path: Path, task: Task | None = None) -> list[dict]:
    """Read and check a list of examples; raises ``UserError`` that names the file and the first wrong one."""
    records = read_json(path, "the data file")
    if not isinstance(records, list):
        raise UserError(f"{path} holds a JSON {type(records).__name__}; it must be a list of examples")
    for index, record in enumerate(records):
        if problem := record_problem(record, task):
            raise UserError(f"{path}: record {index} {problem}")
    return records


def record_problem(record: object, task: Task | None = None) -> str:
    """What is wrong with an example, empty if nothing is; its answer is checked if its task is known."""
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
        return f"has the answer {record['answer']!r:.60}, which must be one of {task.name}'s: {', '.join(task.options)}"
    if task and record["output"] != task.answer_prefix + record["answer"]:
        return f"has the output {record['output']!r:.60} instead of {task.answer_prefix + record['answer']!r}"
    return ""


def tagged(record: dict, task: Task) -> dict:
    """The example as training reads it."""
    return {field: record[field] for field in FIELDS} | {"task_id": task.id}


def tag_by_lookup(path: Path, train: list[SourceFile]) -> tuple[list[dict], list[str]]:
    """Tag a merged file's examples, each by the task whose training file holds the very same instruction.

    Returns the tagged examples and the names (index, first words) of those that no task or several tasks hold. Raises
    ``UserError`` for a wrong example.
    """
    task_of: dict[str, Task | None] = {}
    for source in train:
        for record in source.records:
            if task_of.setdefault(record["instruction"], source.task) is not source.task:
                task_of[record["instruction"]] = None
    placed, unplaced = [], []
    for index, record in enumerate(read_records(path)):
        task = task_of.get(record["instruction"])
        if task is None:
            unplaced.append(f"record {index} {json.dumps(record['instruction'][:60])}")
        elif problem := record_problem(record, task):
            raise UserError(f"{path}: record {index} {problem}")
        else:
            placed.append(tagged(record, task))
    return placed, unplaced


def describe_merged(path: str, records: int, expected: Expected) -> str:
    """Whether a merged file is the known one."""
    blob = git_blob_sha1(path)
    if blob == expected.git_blob_sha1:
        return f"{path} is the known merged file ({records:,} examples, git blob {blob})"
    counts = f"{records:,} of {expected.records:,} examples, git blob {blob} instead of {expected.git_blob_sha1}"
    return f"{path} is not the known merged file: {counts}"


def write(config: Prepare, sources: list[SourceFile], records: list[dict]) -> str:
    """Write the test sets, then the training file; returns the latter's sha256. Raises ``UserError``."""
    output, test_dir = Path(config.output), Path(config.test_dir)
    found = [source for source in sources if source.split == "test" and source.state != "missing"]
    tests = {test_dir / source.task.name / "test.json": source.path.read_bytes() for source in found}
    taken = [*tests, *(source.path for source in sources), *([Path(config.merged)] if config.merged else [])]
    if output.resolve() in [path.resolve() for path in taken]:
        raise UserError(f"--output {output} is a test set or a file it is made from; choose another name")
    content = records_bytes(records)
    write_all({output: content} | tests)
    return sha256_of(content)


def table(sources: list[SourceFile], records: list[dict]) -> str:
    """One row a task: training examples written and test questions, each with the state of the file behind it."""
    written = collections.Counter(record["task_id"] for record in records)
    rows = [f"{'task':<14}{'id':>3}{'train':>10}  {'state':<8}{'test':>9}  state"]
    for train, test in zip(sources[::2], sources[1::2], strict=True):
        counts = f"{written[train.task.id]:>10,}  {train.state:<8}{len(test.records):>9,}  {test.state}"
        rows.append(f"{train.task.name:<14}{train.task.id:>3}{counts}")
    tests = sum(len(source.records) for source in sources[1::2])
    return "\n".join([*rows, f"{'total':<17}{len(records):>10,}  {'':<8}{tests:>9,}"])
