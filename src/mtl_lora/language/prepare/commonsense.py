"""Build the commonsense training file and test sets: download or read a folder, verify, tag with task ids, merge.

    mtl-lora prepare commonsense                            download from LLM-Adapters
    mtl-lora prepare commonsense --source DIR               read DIR/<task>/{train,test}.json instead
    mtl-lora prepare commonsense --merged commonsense_170k.json    tag that file, in its own order

The output is a JSON list of {instruction, input, output, answer, task_id}, one example per line, in ASCII (other
characters escaped), so that it reads the same under any locale. The task of an example is that of its source file.
Examples are in order of task id and then in file order: training shuffles them, and a fixed order gives a fixed sha256.
Test sets are copied byte for byte. Paths are relative to the current folder.
"""

import collections
import dataclasses
import json
from pathlib import Path

from mtl_lora.config import Config, flag
from mtl_lora.data_files import read_values
from mtl_lora.download import RemoteFile, fetch_all, git_blob_sha1, github_raw
from mtl_lora.errors import UserError
from mtl_lora.files import read_json, records_bytes, sha256_of, write_all
from mtl_lora.language.examples import FIELDS, parse_example
from mtl_lora.language.tasks import COMMONSENSE, Task

MANIFEST = Path(__file__).with_name("commonsense.json")
SPLITS = ("train", "test")
NAMED = 5  # the number of examples without a task that an error lists; the others are only counted


@dataclasses.dataclass
class Prepare(Config):
    """Where the files come from, and where the data set goes."""

    source: str | None = flag(None, "folder with <task>/{train,test}.json to read; none: download")
    output: str = flag("commonsense_170k_taskid.json", "training file to write", place=True)
    test_dir: str = flag("data/commonsense/test", "folder for <task>/test.json", place=True)
    merged: str | None = flag(None, "commonsense_170k.json to tag by exact instruction; none: merge the task files")
    allow_partial: bool = flag(False, "write what an incomplete or inexact source has, instead of refusing it")
    download_dir: str = flag("data/commonsense/source", "folder where downloads are kept", place=True)
    base_url: str | None = flag(None, "address of a mirror that holds the manifest's paths; none: GitHub")
    manifest: str = flag(str(MANIFEST), "JSON file with path, number of examples and hashes of each file")

    def validate(self) -> None:
        if self.source and self.base_url:
            raise UserError("--source takes a folder and --base_url downloads; pass one of them")


@dataclasses.dataclass(frozen=True)
class Expected(RemoteFile):
    """A file of the repository, with its number of examples."""

    records: int

    def difference(self, records: int, blob: str) -> str:
        """Say how many examples and which git blob were found, and which were expected."""
        return f"{records:,} of {self.records:,} examples, git blob {blob} instead of {self.git_blob_sha1}"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the source as found; ``blob`` and ``records`` are empty if it is missing."""

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
        """The state of the file for messages, with what was expected and found."""
        name, expected = f"{self.task.name}/{self.path.name}", self.expected
        if self.state == "missing":
            return f"{name} is missing ({expected.records:,} examples)"
        return f"{name} is {self.state} ({expected.difference(len(self.records), self.blob)})"


def run(config: Prepare) -> None:
    """Read everything, check everything, and only then write; raises ``UserError``."""
    url, merged, files = load_manifest(config.manifest)
    folder = Path(config.source or config.download_dir)
    if not config.source:
        fetch_all(config.base_url or url, folder, files)
    sources = read_source(folder, files)
    problems = [source.describe() for source in sources if source.state != "exact"]
    train = [source for source in sources if source.split == "train"]
    records = [record for source in train for record in source.records]
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
        count, blob = len(records) + len(unplaced), git_blob_sha1(config.merged)
        if blob == merged.git_blob_sha1:
            problems.append(f"{config.merged} is the known merged file ({count:,} examples, git blob {blob})")
        else:
            problems.append(f"{config.merged} is not the known merged file: {merged.difference(count, blob)}")
    if not records:
        raise UserError(f"{config.merged or folder} gives no training example; nothing was written")
    digest = write(config, sources, records)
    print("\n".join([table(sources, records), *problems]))
    print(f"{len(records):,} of {whole:,} training examples in {config.output}\nsha256 {digest}")


def load_manifest(path: str | Path) -> tuple[str, Expected, dict[str, Expected]]:
    """(address of the files, the merged file, each file by its path in the source); raises ``UserError``."""
    value = read_json(path, "the manifest")
    try:
        entries = {f"{task.name}/{split}": value["tasks"][task.name][split] for task in COMMONSENSE for split in SPLITS}
        files = {f"{name}.json": Expected.from_json(entry, name) for name, entry in entries.items()}
        return github_raw(value["repository"], value["commit"]), Expected.from_json(value["merged"], "merged"), files
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"the manifest {path} must have the layout of {MANIFEST}; missing or wrong: {error}") from None


def read_source(folder: Path, files: dict[str, Expected]) -> list[SourceFile]:
    """Read every task's train and test file, in order of task id; raises ``UserError``.

    If train.json is missing, train_partial.json is read in its place; its state is then ``partial``.
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
        values, blob = (read_values(path), git_blob_sha1(path)) if path.exists() else ([], "")
        records = [tagged(value, index, path, task) for index, value in enumerate(values)]
        sources.append(SourceFile(task, split, expected, path, records, blob))
    if all(source.state == "missing" for source in sources):
        raise UserError(f"the source {folder} holds no file of any task; it needs boolq/train.json and so on")
    return sources


def tagged(value: object, index: int, path: Path, task: Task) -> dict:
    """Validate an example and add its task id; raises ``UserError`` naming the file and the fault."""
    example = parse_example(value, index, str(path), COMMONSENSE, task.name, closed=True)
    expected = task.answer_prefix + example.answer
    if example.output != expected:
        raise UserError(f"{path}, example {index}: the output {example.output!r:.60} must be {expected!r}")
    return {field: getattr(example, field) for field in FIELDS}


def tag_by_lookup(path: Path, train: list[SourceFile]) -> tuple[list[dict], list[str]]:
    """Tag each example of a merged file with the task whose training file has exactly the same instruction.

    Returns the tagged examples, and the names (index, first words) of those found in no task or in several. Raises
    ``UserError`` for an invalid example.
    """
    task_of: dict[str, Task | None] = {}
    for source in train:
        for record in source.records:
            if task_of.setdefault(record["instruction"], source.task) is not source.task:
                task_of[record["instruction"]] = None
    placed, unplaced = [], []
    for index, value in enumerate(read_values(path)):
        instruction = str(value.get("instruction") if isinstance(value, dict) else value)
        if task := task_of.get(instruction):
            placed.append(tagged(value, index, path, task))
        else:
            unplaced.append(f"example {index} {json.dumps(instruction[:60])}")
    return placed, unplaced


def write(config: Prepare, sources: list[SourceFile], records: list[dict]) -> str:
    """Write the test sets and the training file; returns the sha256 of the training file. Raises ``UserError``."""
    output, test_dir = Path(config.output), Path(config.test_dir)
    found = [source for source in sources if source.split == "test" and source.state != "missing"]
    tests = {test_dir / source.task.name / "test.json": source.path.read_bytes() for source in found}
    taken = [*tests, *(source.path for source in sources), *([Path(config.merged)] if config.merged else [])]
    if output.resolve() in [path.resolve() for path in taken]:
        raise UserError(f"--output {output} is a test set or a source file; choose another name")
    content = records_bytes(records)
    write_all({output: content} | tests)
    return sha256_of(content)


def table(sources: list[SourceFile], records: list[dict]) -> str:
    """One row per task: training examples written and test questions, each with the state of its source file."""
    written = collections.Counter(record["task_id"] for record in records)
    rows = [f"{'task':<14}{'id':>3}{'train':>10}  {'state':<8}{'test':>9}  state"]
    for train, test in zip(sources[::2], sources[1::2], strict=True):
        counts = f"{written[train.task.id]:>10,}  {train.state:<8}{len(test.records):>9,}  {test.state}"
        rows.append(f"{train.task.name:<14}{train.task.id:>3}{counts}")
    tests = sum(len(source.records) for source in sources[1::2])
    return "\n".join([*rows, f"{'total':<17}{len(records):>10,}  {'':<8}{tests:>9,}"])
