"""Made-up raw files of the six text-classification tasks, a slow and obvious splitter, and a reader of the output."""

import json
import random
from pathlib import Path

from shared import PROJECT, git_blob

from mtl_lora.language.examples import load_examples
from mtl_lora.language.prepare.textclass import MANIFEST as MANIFEST_FILE
from mtl_lora.language.tasks import TaskSet

PARTS = ("train", "dev", "test")
FOLDER = PROJECT / "data" / "textclass"
TASKS = TaskSet.load(FOLDER / "tasks.json")
MANIFEST = json.loads(MANIFEST_FILE.read_text())
# Texts that try the rules: white space, control characters that other readers take for line ends, latin-1, UTF-8 (whose
# second byte may be a space of latin-1's), and the marker that evaluation reads a record's options from.
ODD = ["a  b\t c ", "one\x85two", "x\x1cy", "caf\xe9 \xa0 voil\xc3\xa0", "3 stars", "Answer format: yes/no", "cr\rlf\r"]
ODD += ["voil\xc3\xa0 na\xc3\xafve"]


def decoded(line: bytes) -> str:
    """As UTF-8, or else as latin-1."""
    return line.decode("latin-1") if "\ufffd" in line.decode("utf-8", "replace") else line.decode("utf-8")


def made_up_line(chance: random.Random, labels: int) -> str:
    """A line of a raw file, from so few words that repeats, contradictions and overlaps between tasks are many."""
    text = " ".join(chance.choices(["good", "bad", "film", "very", "caf\xe9", "plot", "a"], k=chance.choice([2, 3, 4])))
    return f"{chance.randrange(labels)} {chance.choice(ODD) if chance.random() < 0.02 else text}"


def make_source(folder: Path) -> None:
    """Write folder/source with raw files of all tasks, and folder/manifest.json that knows their bytes."""
    chance, manifest = random.Random(7), json.loads(json.dumps(MANIFEST))
    for task in TASKS:
        for part, raw in manifest["tasks"][task.name]["files"].items():
            count = {"dev": 60, "test": 80}.get(part, 1500 if task.name == "trec" else 900)
            lines = [made_up_line(chance, len(task.options)) for _ in range(count)]
            # the last line of a file has no newline in every second task
            content = ("\n".join(lines) + "\n" * (task.id % 2)).encode("latin-1")
            path = folder / "source" / raw["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            raw["git_blob_sha1"] = git_blob(content)
            raw.pop("sha256", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def written(folder: Path) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(text, label) by (task, split) of all records the command wrote, each checked by the library's own reader."""
    found = {(task.name, "train"): [] for task in TASKS}
    examples = load_examples(folder / "train.json", TASKS)
    assert [example.task_id for example in examples] == sorted(example.task_id for example in examples)
    for example in examples:
        found[TASKS[example.task_id].name, "train"].append(example)
    for task in TASKS:
        for split in ("dev", "test"):
            path = folder / split / task.name / "test.json"
            found[task.name, split] = load_examples(path, TASKS, task.name, closed=True)
    for (name, _), group in found.items():
        for example in group:
            question = example.instruction.partition("\n\n")[0]
            assert all(option in question for option in TASKS[name].options)
            assert example.input == "" and example.output == "the correct answer is " + example.answer
            assert TASKS[name].options_of(example.instruction) == TASKS[name].options
    return {
        key: [(example.instruction.partition("\n\n")[2], example.answer) for example in group]
        for key, group in found.items()
    }


def obvious(source: Path) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The README's rules, one after the other, with lists alone."""

    def lines(task, part):
        rows = []
        for line in (source / MANIFEST["tasks"][task.name]["files"][part]["path"]).read_bytes().split(b"\n"):
            if line:
                text = " ".join(decoded(line)[2:].split())
                rows.append([text, task.options[int(line[:1])]])
        return rows

    sets = {}
    for task in TASKS:
        parts = MANIFEST["tasks"][task.name]["files"]
        if "all" in parts:
            rows, kept = lines(task, "all"), []
            for text, label in rows:
                if [text, label] not in kept and all(label == other for same, other in rows if same == text):
                    kept.append([text, label])
            random.Random(0).shuffle(kept)
            size = len(kept) // 10
            splits = {"test": kept[:size], "dev": kept[size : size + size], "train": kept[size + size :]}
        elif "dev" in parts:
            splits = {part: lines(task, part) for part in parts}
        else:
            test, kept = lines(task, "test"), []
            for text, label in lines(task, "train"):
                place = [row for row in kept if row[0] == text]
                if place:
                    place[0][1] = label
                elif all(text != tested for tested, _ in test):
                    kept.append([text, label])
            random.Random(0).shuffle(kept)
            splits = {"test": test, "dev": kept[:500], "train": kept[500:]}
        sets |= {(task.name, split): rows for split, rows in splits.items()}
    kept = {}
    for split, others in (("test", ()), ("dev", ("test",)), ("train", ("dev", "test"))):
        held = {letters(text) for (_, other), rows in kept.items() for text, _ in rows if other in others}
        for name in TASKS.names:
            kept[name, split] = [tuple(row) for row in sets[name, split] if letters(row[0]) not in held]
    return kept


def letters(text: str) -> str:
    """What is left of a text without spaces, punctuation and capitals; the text itself if that is nothing."""
    return "".join(sign for sign in text.casefold() if sign.isalnum()) or text


def assert_sets_are_apart(sets):
    texts = {part: set() for part in PARTS}
    for (_, part), rows in sets.items():
        texts[part] |= {letters(text) for text, _ in rows}
    assert not texts["train"] & (texts["dev"] | texts["test"]) and not texts["dev"] & texts["test"]
