"""The six sentence collections: which files they are, how their lines read, how they are split, what a record says."""

import dataclasses
import random
import re
from pathlib import Path

from mtl_lora.download import git_blob_sha1
from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.tasks import Task, TaskSet

SPLITS = ("train", "dev", "test")
TREC_DEV = 500
# What a record asks. A question names every label in the words of the answers.
QUESTIONS = {
    "cr": "Is this sentence from a product review negative or positive?",
    "mpqa": "Is the opinion that this phrase expresses negative or positive?",
    "sst2": "Is this sentence from a film review negative or positive?",
    "sst5": "How does this sentence from a film review judge the film: very negative, negative, neutral, positive or "
    "very positive?",
    "subj": "Is this sentence about a film subjective or objective?",
    "trec": "What does this question ask for: a description, an entity, an abbreviation, a person, a location or "
    "a number?",
}
Pairs = list[tuple[str, str]]  # (text, label)
Sets = dict[str, dict[str, Pairs]]  # by task name and split


@dataclasses.dataclass(frozen=True)
class RawFile:
    """One file of the repository: its path there and its git blob id."""

    path: str
    git_blob_sha1: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known: each task's raw files by part (``all``, or the split), and how many records its splits have."""

    repository: str
    commit: str
    files: dict[str, dict[str, RawFile]]
    records: dict[str, dict[str, int]]


def load_manifest(path: Path, tasks: TaskSet) -> Manifest:
    """Read which files there are; raises ``UserError`` if a task's entry is missing or laid out otherwise."""
    value = read_json(path, "the manifest")
    try:
        entries = {name: value["tasks"][name] for name in tasks.names}
        files = {
            name: {part: RawFile(**raw) for part, raw in entry["files"].items()} for name, entry in entries.items()
        }
        records = {name: {split: int(entry["records"][split]) for split in SPLITS} for name, entry in entries.items()}
        return Manifest(value["repository"], value["commit"], files, records)
    except KeyError as error:
        raise UserError(f"the manifest {path} has no entry {error}; it needs every file of every task") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the manifest {path} is not laid out as data/textclass/manifest.json is: {error}") from None


def read_raw(path: Path, task: Task) -> Pairs:
    """The lines of a raw file, each a class number, a space and a text; raises ``UserError`` naming the line.

    The bytes are latin-1, lines end at newlines alone, and a run of white space is one space.
    """
    pairs = []
    # splitlines would also cut at the control characters that a few texts hold
    for number, line in enumerate(path.read_bytes().decode("latin-1").removesuffix("\n").split("\n"), 1):
        match = re.fullmatch(r"(\d) (.*)", line, re.DOTALL)
        if not match or int(match[1]) >= len(task.options):
            last = len(task.options) - 1
            raise UserError(f"{path}, line {number} is {line!r:.60}; it must be a number from 0 to {last} and a text")
        pairs.append((" ".join(match[2].split()), task.options[int(match[1])]))
    return pairs


def shuffled(pairs: Pairs) -> Pairs:
    """The same pairs in the order that seed 0 gives."""
    pairs = list(pairs)
    random.Random(0).shuffle(pairs)
    return pairs


def split_tenths(pairs: Pairs) -> dict[str, Pairs]:
    """The first shuffled tenth is test, the second dev; repeats count once, texts with two labels not at all."""
    labels: dict[str, set[str]] = {}
    for text, label in pairs:
        labels.setdefault(text, set()).add(label)
    once = shuffled([(text, *found) for text, found in labels.items() if len(found) == 1])
    tenth = len(once) // 10
    return {"train": once[2 * tenth :], "dev": once[tenth : 2 * tenth], "test": once[:tenth]}


def split_trec(train: Pairs, test: Pairs) -> dict[str, Pairs]:
    """500 of the training questions are dev; repeats count once, with their last label; none is in the test file."""
    tested = {text for text, _ in test}
    rest = shuffled([(text, label) for text, label in dict(train).items() if text not in tested])
    return {"train": rest[TREC_DEV:], "dev": rest[:TREC_DEV], "test": test}


def split(parts: dict[str, Pairs]) -> dict[str, Pairs]:
    """A task's splits from its raw files: one file, training and test file, or all three as they are."""
    if "all" in parts:
        return split_tenths(parts["all"])
    return dict(parts) if "dev" in parts else split_trec(**parts)


def read_source(folder: Path, manifest: Manifest, tasks: TaskSet) -> Sets:
    """Read and split raw files that lie as in the repository; raises ``UserError`` naming all that are not those."""
    problems = []
    for raw in (raw for parts in manifest.files.values() for raw in parts.values()):
        path = folder / raw.path
        if not path.is_file():
            problems.append(f"{raw.path} is missing")
        elif (found := git_blob_sha1(path)) != raw.git_blob_sha1:
            problems.append(f"{raw.path} has other bytes (git blob {found} instead of {raw.git_blob_sha1})")
    if problems:
        raise UserError(
            f"{folder} is not the source: {'; '.join(problems)}; take the files of {manifest.repository} "
            f"at commit {manifest.commit}"
        )
    return {
        task.name: split({part: read_raw(folder / raw.path, task) for part, raw in manifest.files[task.name].items()})
        for task in tasks
    }


def read_prepared(folder: Path, tasks: TaskSet) -> Sets:
    """Read <task>/<split>.json, lists of {"text", "label"}; raises ``UserError`` naming file and record."""
    return {
        task.name: {part: _prepared(folder / task.name / f"{part}.json", task) for part in SPLITS} for task in tasks
    }


def _prepared(path: Path, task: Task) -> Pairs:
    records = read_json(path, "the prepared file")
    if not isinstance(records, list):
        raise UserError(f"{path} holds a JSON {type(records).__name__}; it must be a list of records")
    for index, record in enumerate(records):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: record {index} must be an object with a text and a label, not {record!r:.60}")
        if record.get("label") not in task.options:
            labels = ", ".join(task.options)
            raise UserError(f"{path}: record {index} has the label {record.get('label')!r:.60}, none of {labels}")
    return [(record["text"], record["label"]) for record in records]


def without_test_texts(sets: Sets) -> Sets:
    """The same sets, every text of any task's test set dropped from every train and dev set."""
    tested = {text for parts in sets.values() for text, _ in parts["test"]}
    return {
        name: {part: [pair for pair in parts[part] if part == "test" or pair[0] not in tested] for part in SPLITS}
        for name, parts in sets.items()
    }


def record(task: Task, text: str, label: str) -> dict:
    """A text with its label as training and evaluation read it."""
    return {
        "instruction": f"{QUESTIONS[task.name]}\n\n{text}",
        "input": "",
        "output": task.answer_prefix + label,
        "answer": label,
        "task": task.name,
    }
