"""Build the GLUE tasks from downloaded files, a local folder or the Hugging Face hub; verify them; write the data sets.

    mtl-lora prepare glue                        download single files of a public repository
    mtl-lora prepare glue --source DIR           use DIR/data/glue_pretrain/CoLA/train.json and so on instead
    mtl-lora prepare glue --hub                  use all of nyu-mll/glue, with WNLI (needs the package datasets)
    mtl-lora prepare glue --hub --source DIR     use a local copy of that repository
    mtl-lora prepare glue --limit 800            at most 800 training examples per task

Writes train.json (all tasks, in order of task id), tasks.json (the --tasks_file of training), dev/<task>/test.json and
test/<task>/test.json (each a --data_dir of evaluation): lists of {"text", "text_b" (for pairs), "label", "task"}. The
test sets are GLUE's dev sets, except that without --hub those of QQP and MNLI are samples of GLUE's training sets.
Paths are relative to the current folder.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mtl_lora.config import Config, closest, flag
from mtl_lora.data_sets import Examples, Manifest, Sets, existing, separated, write_sets
from mtl_lora.errors import UserError, require_package
from mtl_lora.files import read_object, read_utf8
from mtl_lora.nlu.tasks import Task

MANIFEST = Path(__file__).with_name("glue.json")
TASKS_FILE = Path(__file__).with_name("glue_tasks.json")
HUB = "nyu-mll/glue"
# The columns with a task's texts in the hub's tables; the column "label" has the label.
TEXTS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
# Other names that the TSV files use for these columns. CoLA's file has no header.
RENAMED = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label", "score": "label"}
COLA_COLUMNS = "source\tlabel\tmark\tsentence"
# The hub's splits that become test sets, with the ``kind`` of their examples: GLUE's test labels are not public.
TESTS = {"validation": None}
MNLI_TESTS = {"validation_matched": "matched", "validation_mismatched": "mismatched"}
SAMPLES = """\
not comparable with published figures: qqp and mnli, whose train, dev and test sets are samples of GLUE's training sets
trained on samples, tested on GLUE's dev sets: sst2 (whole sentences) and qnli"""
Row = tuple[str, list, object]  # its place for errors, its texts, its label


@dataclasses.dataclass
class Prepare(Config):
    """Where the raw files come from, and where the data sets go."""

    source: str | None = flag(None, "folder with the raw files, such as data/glue_pretrain/CoLA/train.json")
    hub: bool = flag(False, f"use complete tasks, also WNLI, from {HUB} on the Hugging Face hub or a copy in --source")
    tasks: list[str] = flag([], "only these tasks, as a,b, with ids in GLUE's order; empty: all")
    output_dir: str = flag("data/glue", "folder for train.json, tasks.json, dev/ and test/", place=True)
    limit: int = flag(0, "maximum training examples per task; 0: all", min=0)
    download_dir: str = flag("data/glue/source", "folder where downloads are kept", place=True)
    base_url: str | None = flag(None, "URL of a mirror that has the manifest's paths; none: GitHub")
    manifest: str = flag(str(MANIFEST), "JSON file with path and hashes of each raw file, and the size of each split")

    def validate(self) -> None:
        if self.base_url and (self.source or self.hub):
            raise UserError("--base_url cannot be combined with --source or --hub; pass one of them")


def parse(task: Task, value: object, where: str) -> str | float:
    """Return a raw label, given by name or class index, or a raw score, given as a number or text.

    Raises ``UserError`` for an unknown label and for a score outside the task's range.
    """
    text = str(value)
    if task.labels:
        label = task.labels[int(text)] if text in map(str, range(len(task.labels))) else text
        if label in task.labels:
            return label
        raise UserError(f"{where} has the label {text!r:.60}, none of {', '.join(task.labels)}")
    low, high = task.regression
    if re.fullmatch(r"\d+(\.\d+)?", text) and low <= float(text) <= high:
        return round(float(text), 3)  # the hub stores float32, in which 3.8 reads 3.799999952316284
    raise UserError(f"{where} has the score {text!r:.60}; it must be a number from {low:g} to {high:g}")


def run(config: Prepare) -> None:
    """Read and check everything before writing anything; raises ``UserError``."""
    tasks = [task for task in json.loads(TASKS_FILE.read_text())["tasks"] if config.hub or task["name"] != "wnli"]
    known = [task["name"] for task in tasks]
    if unknown := [name for name in config.tasks if name not in known]:
        raise UserError(f"--tasks names {unknown[0]!r}{closest(unknown[0], known)}")
    tasks = [task for task in tasks if task["name"] in (config.tasks or known)]
    tasks = [task | {"id": number} for number, task in enumerate(tasks)]
    declared = {task["name"]: Task.from_json(task, str(TASKS_FILE)) for task in tasks}
    if config.hub:
        sets, notes = read_hub(config, declared)
        sizes = {name: {} for name in declared}
    else:
        manifest = Manifest.load(config.manifest, declared, MANIFEST)
        if lacking := [name for name, parts in manifest.files.items() if not {"train", "test"} <= set(parts)]:
            raise UserError(f"the manifest {config.manifest} must have a train and a test file of {lacking[0]}")
        sets = read_files(manifest.get(config.source, config.download_dir, config.base_url), declared, manifest)
        # Training examples that are in any test set are dropped, so the known sizes hold only for all tasks together.
        notes, sizes = [SAMPLES], {name: {} if config.tasks else manifest.sizes[name] for name in declared}
    sets, dropped = separated(sets)
    tasks_file = '{\n  "tasks": [\n' + ",\n".join(f"    {json.dumps(task)}" for task in tasks) + "\n  ]\n}\n"
    counts = write_sets(Path(config.output_dir), sets, sizes, config.limit, tasks_file.encode())
    print("\n".join([*notes, *dropped, counts]))


def read_files(folder: Path, tasks: dict[str, Task], manifest: Manifest) -> Sets:
    """Return the splits in the raw files; raises ``UserError``."""
    sets = {}
    for name, task in tasks.items():
        sets[name] = {}
        for part, raw in manifest.files[name].items():
            path = folder / raw.path
            rows = read_tsv(path, name) if path.suffix == ".tsv" else read_numbered(path)
            sets[name][part] = examples(rows, task)
    return sets


def read_numbered(path: Path) -> Iterator[Row]:
    """Yield the rows of ``{"0": {"text_a", "text_b" or null, "label"}, ...}``; raises ``UserError``."""
    for number, value in read_object(path, "the file").items():
        where = f"{path}, example {number}"
        if not isinstance(value, dict) or not {"text_a", "label"} <= set(value):
            raise UserError(f"{where} must be an object with text_a, text_b and label, not {value!r:.60}")
        second = value.get("text_b")
        yield where, [value["text_a"], *([] if second is None else [second])], value["label"]


def read_tsv(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of a TSV file, where quotation marks have no special meaning; raises ``UserError``."""
    lines = read_utf8(path, "the file").removesuffix("\n").split("\n")
    if name == "cola":
        lines.insert(0, COLA_COLUMNS)
    columns = [RENAMED.get(column, column) for column in lines[0].split("\t")]
    require_columns(columns, name, str(path))
    for number, line in enumerate(lines[1:], 1 if name == "cola" else 2):
        values = line.split("\t")
        if len(values) != len(columns):
            raise UserError(f"{path}, line {number} has {len(values)} values for the {len(columns)} columns")
        row = dict(zip(columns, values, strict=True))
        yield f"{path}, line {number}", [row[column] for column in TEXTS[name]], row["label"]


def require_columns(columns: Iterable[str], name: str, where: str) -> None:
    """Raise ``UserError`` naming a column that the task needs and the table lacks."""
    if missing := [column for column in (*TEXTS[name], "label") if column not in columns]:
        raise UserError(f"{where} has no column {missing[0]}; it has {', '.join(columns):.200}")


def read_hub(config: Prepare, tasks: dict[str, Task]) -> tuple[Sets, list[str]]:
    """Return the training and test sets of the hub's repository, and notes to print; raises ``UserError``."""
    require_package("hub", "datasets")
    import datasets

    known = json.loads(MANIFEST.read_text())["hub"]
    repository = str(existing(config.source)) if config.source else HUB
    revision = None if config.source else known["revision"]
    sets = {}
    notes = [f"from {repository}, {f'revision {revision}' if revision else 'which is not verified'}"]
    for name, task in tasks.items():
        try:
            tables = datasets.load_dataset(repository, name, revision=revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{name} of {repository} cannot be loaded ({reason:.300}); run the same command again, pass --source "
                "DIR with a copy of the repository, or leave out --hub"
            ) from None
        sets[name] = {"train": [], "test": []}
        for split, kind in {"train": None, **(MNLI_TESTS if name == "mnli" else TESTS)}.items():
            where = f"{repository}, {name}/{split}"
            if split not in tables:
                raise UserError(f"{where} is missing; there are {', '.join(tables)}")
            table, part = tables[split], "train" if split == "train" else "test"
            require_columns(table.column_names, name, where)
            words = getattr(table.features["label"], "names", task.labels)
            if tuple(words) != task.labels:
                raise UserError(f"{where} has the labels {', '.join(words)} instead of {', '.join(task.labels)}")
            sets[name][part] += examples(table_rows(table, name, where), task, kind)
            if len(table) != (expected := known["records"][name][split]):
                notes.append(f"{name}/{split} has {len(table):,} examples where GLUE has {expected:,}")
    return sets, notes


def table_rows(table: Iterable[dict], name: str, where: str) -> Iterator[Row]:
    """Yield the rows of one of the hub's tables."""
    for index, row in enumerate(table):
        yield f"{where}, example {index}", [row[column] for column in TEXTS[name]], row["label"]


def examples(rows: Iterable[Row], task: Task, kind: str | None = None) -> Examples:
    """Return the rows as examples for training and evaluation, each run of white space as one space.

    Raises ``UserError`` for a wrong number of texts, an unknown label and a score outside the range.
    """
    found = []
    for where, texts, label in rows:
        if len(texts) != len(TEXTS[task.name]) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} must have {len(TEXTS[task.name])} texts, not {texts!r:.60}")
        texts = [" ".join(text.split()) for text in texts]
        example = dict(zip(("text", "text_b"), texts, strict=False))
        example |= {"label": parse(task, label, where), "task": task.name}
        found.append(example | ({"kind": kind} if kind else {}))
    return found
