"""The GLUE tasks of small made-up files in the layouts of their sources, and of the real ones."""

import collections
import json
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from shared import PROJECT, git_blob

from mtl_lora import cli
from mtl_lora.data_sets import separated
from mtl_lora.metrics import METRICS
from mtl_lora.nlu.prepare import MANIFEST as MANIFEST_FILE
from mtl_lora.nlu.prepare import TASKS_FILE, TEXTS

MANIFEST = json.loads(MANIFEST_FILE.read_text())
TASKS = {task["name"]: task for task in json.loads(TASKS_FILE.read_text())["tasks"]}
NAMES = [name for name in TASKS if name != "wnli"]
PARTS = ("train", "dev", "test")
# The made-up splits by task: (label in the source, texts); those of a task that is not here are ``plain``.
MADE_UP = {
    "cola": {
        "train": [("1", 'He said " no .'), ("0", "in  dev ! "), ("0", "IN TEST.")],
        "dev": [("0", "In dev."), ("1", "in test")],
        "test": [("1", "In test ."), ("0", '"Quoted'), ("1", 'end"')],
    },
    "mrpc": {
        "train": [("1", "A cat 's .", 'One " dog "'), ("0", "m1", "m2")],
        "dev": [("1", "m3", "m4")],
        "test": [("1", "first , of mrpc 's", "second of mrpc"), ("0", "m5", "m6")],
    },
    "stsb": {
        "train": [
            ("5.000", "Second of MRPC", "First of mrpc's"),
            ("0", "s1", "s2"),
            ("3.8", "s1", "s3"),
            ("1", "!", "?"),
        ],
        "dev": [("2.50", "s4", "s5")],
        "test": [("4.750", "One dog", "a cat's"), ("0.067", "s6", "s7")],
    },
    "qqp": {
        "train": [(str(n % 2), f"q{n}", f"p{n}") for n in range(30)],
        "test": [("1", "p3", "q3"), ("0", "q3", "p4")],
    },
}
HEADERS = {"mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "sst2": "sentence\tlabel"}
HEADERS |= {"rte": "index\tsentence1\tsentence2\tlabel", "qnli": "index\tquestion\tsentence\tlabel"}
HEADERS["stsb"] = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"


def plain(name: str, part: str) -> list[tuple[str, ...]]:
    """20 examples with every label in turn, in words where the real files have them."""
    words = name in ("mnli", "qnli", "rte")
    labels = [label if words else str(number) for number, label in enumerate(TASKS[name]["labels"])]
    texts = [f"{name} {part} {{}} {column}" for column in TEXTS[name]]
    return [(labels[index % len(labels)], *(text.format(index) for text in texts)) for index in range(20)]


def rows_of(name: str, part: str) -> list[tuple[str, ...]]:
    """The made-up examples of a split."""
    return MADE_UP[name][part] if name in MADE_UP else plain(name, part)


def raw_file(name: str, part: str, path: str) -> bytes:
    """A split as the repository holds it."""
    rows = rows_of(name, part)
    if path.endswith(".json"):
        values = [{"text_a": a, "text_b": (*b, None)[0], "label": label} for label, a, *b in rows]
        return json.dumps(dict(enumerate(values)), indent=1).encode()
    if name == "cola":
        return "\n".join(f"gj04\t{label}\t*\t{text}" for label, text in rows).encode()
    column = {"Quality": 0, "score": 0, "label": 0, "#1 String": 1, "#2 String": 2, "sentence1": 1, "sentence2": 2}
    column |= {"question": 1, "sentence": len(TEXTS[name])}
    names = HEADERS[name].split("\t")
    lines = ["\t".join(row[column[each]] if each in column else "x" for each in names) for row in rows]
    return ("\ufeff" * (name == "mrpc") + "\n".join([HEADERS[name], *lines, ""])).encode()


@pytest.fixture
def world(tmp_path):
    """Raw files of eight tasks, a manifest that knows them, and where to write."""
    source, manifest = tmp_path / "source", json.loads(json.dumps(MANIFEST))
    for name, entry in manifest["tasks"].items():
        for part, raw in entry["files"].items():
            path = source / raw["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw_file(name, part, raw["path"]))
            raw["git_blob_sha1"] = git_blob(path.read_bytes())
            raw.pop("sha256")
    known = tmp_path / "manifest.json"
    known.write_text(json.dumps(manifest))
    output = tmp_path / "out"
    flags = {"--manifest": known, "--output_dir": output}
    return SimpleNamespace(set=["glue"], folder=tmp_path, source=source, output=output, manifest=known, flags=flags)


@pytest.fixture
def change(world):
    """Replace the bytes of a raw file and what the manifest knows of it: ``change(task, part, content)``."""

    def replace(name: str, part: str, content: bytes) -> Path:
        manifest = json.loads(world.manifest.read_text())
        raw = manifest["tasks"][name]["files"][part]
        (world.source / raw["path"]).write_bytes(content)
        raw["git_blob_sha1"] = git_blob(content)
        world.manifest.write_text(json.dumps(manifest))
        return world.source / raw["path"]

    return replace


def written(folder: Path, names=NAMES) -> dict[str, dict[str, list[tuple]]]:
    """(label, texts) of what was written, by task and split."""
    train = json.loads((folder / "train.json").read_text())
    assert list(dict.fromkeys(example["task"] for example in train)) == list(names)
    sets = {}
    for name in names:
        parts = {"train": [example for example in train if example["task"] == name]}
        for part in ("dev", "test"):
            parts[part] = json.loads((folder / part / name / "test.json").read_text())
        fields = {"text", "label", "task", *["text_b"] * (len(TEXTS[name]) - 1)}
        assert all(set(e) - {"kind"} == fields and e["task"] == name for given in parts.values() for e in given)
        sets[name] = {
            part: [(e["label"], *(e[field] for field in ("text", "text_b") if field in e)) for e in given]
            for part, given in parts.items()
        }
    return sets


def test_tasks_have_the_labels_and_the_metrics_of_glue():
    """In the order of the hub's class numbers; of two labels the last is the positive class of F1."""
    found = {name: (task["metric"], *task.get("labels", task.get("regression"))) for name, task in TASKS.items()}
    assert found == {
        "cola": ("matthews", "unacceptable", "acceptable"),
        "sst2": ("accuracy", "negative", "positive"),
        "mrpc": ("accuracy_and_f1", "not_equivalent", "equivalent"),
        "stsb": ("pearson_and_spearman", 0, 5),
        "qqp": ("accuracy_and_f1", "not_duplicate", "duplicate"),
        "mnli": ("accuracy", "entailment", "neutral", "contradiction"),
        "qnli": ("accuracy", "entailment", "not_entailment"),
        "rte": ("accuracy", "entailment", "not_entailment"),
        "wnli": ("accuracy", "not_entailment", "entailment"),
    }


# --- single files


def test_files_become_examples_without_what_dev_and_test_sets_hold(run, world):
    printed = run()
    sets = written(world.output)
    assert sets["cola"] == {
        "train": [("acceptable", 'He said " no .')],
        "dev": [("unacceptable", "In dev.")],
        "test": [("acceptable", "In test ."), ("unacceptable", '"Quoted'), ("acceptable", 'end"')],
    }
    # pairs count as the same in either order and with other spaces and quotation marks, across tasks too
    assert sets["mrpc"]["train"] == [("not_equivalent", "m1", "m2")]
    assert sets["mrpc"]["test"][0] == ("equivalent", "first , of mrpc 's", "second of mrpc")
    assert sets["stsb"] == {
        "train": [(0.0, "s1", "s2"), (3.8, "s1", "s3"), (1.0, "!", "?")],
        "dev": [(2.5, "s4", "s5")],
        "test": [(4.75, "One dog", "a cat's"), (0.067, "s6", "s7")],
    }
    for name in ("sst2", "mnli", "qnli", "rte"):
        labels = [row[0] for row in sets[name]["test"]]
        assert labels == [TASKS[name]["labels"][index % len(TASKS[name]["labels"])] for index in range(20)]
        assert [row[1:] for row in sets[name]["test"]] == [row[1:] for row in plain(name, "test")]
    assert "cola 3, mrpc 1, stsb 1, qqp 1" in printed
    for line, name in zip(printed.splitlines()[4:], NAMES, strict=False):
        assert line.split() == [name, str(TASKS[name]["id"]), *(str(len(sets[name][part])) for part in PARTS)]
    assert "qnli/train has 20 examples where the known set has 8,999" in printed


def test_a_tenth_of_the_training_set_is_dev_where_there_is_none(run, world):
    run()
    sets, left = written(world.output)["qqp"], [row for row in rows_of("qqp", "train") if row[1] != "q3"]
    order = list(range(29))
    random.Random(0).shuffle(order)
    texts = {part: [row[1:] for row in sets[part]] for part in PARTS}
    assert texts["dev"] == [left[index][1:] for index in sorted(order[:2])]
    assert texts["train"] == [left[index][1:] for index in sorted(order[2:])]
    assert texts["test"] == [("p3", "q3"), ("q3", "p4")]


def test_a_dev_set_that_is_sampled_has_two_thousand_examples_at_most():
    rte = {"train": [{"text": f"a{n}", "text_b": "b"} for n in range(21_000)], "test": []}
    found, _ = separated({"rte": rte})
    assert {part: len(rows) for part, rows in found["rte"].items()} == {"train": 19_000, "dev": 2_000, "test": 0}


def test_no_training_text_is_in_the_dev_set_of_another_task():
    def rows(*texts: str) -> list[dict]:
        return [{"text": text} for text in texts]

    cola = {"train": rows("One.", "two", "three"), "dev": rows("four"), "test": rows("five")}
    sst2 = {"train": rows("six", "FOUR !"), "dev": rows("one", "Five"), "test": rows("seven")}
    found, notes = separated({"cola": cola, "sst2": sst2})
    assert found["cola"] == {**cola, "train": rows("two", "three")}
    assert found["sst2"] == {**sst2, "train": rows("six"), "dev": rows("one")}
    assert notes == ["dropped because their texts are empty or in a dev or test set: cola 1, sst2 2"]


def test_files_are_downloaded_and_the_tasks_file_goes_with_them(run, world, serve):
    flags = ("--base_url", serve(world.source).url, "--download_dir", world.folder / "downloads", "--limit", 5)
    assert "22 files downloaded" in run(*flags, source=False)
    assert [len(parts["train"]) for parts in written(world.output).values()] == [1, 5, 1, 3, 5, 5, 5, 5]
    assert json.loads((world.output / "tasks.json").read_text()) == {"tasks": [TASKS[name] for name in NAMES]}


@pytest.mark.parametrize(
    ("name", "part", "content", "message"),
    [
        ("cola", "test", b"gj04\t1\t\tA.\ngj04\t2\t\tB.", "line 2 has the label '2', none of unacceptable, acceptable"),
        ("cola", "test", b"gj04\t1\tA.", "line 1 has 3 values for the 4 columns"),
        ("rte", "test", b"sentence1\tlabel\n", "has no column sentence2; it has sentence1, label"),
        ("sst2", "test", b"sentence\tlabel\nA\t1\nB\t-1\n", "line 3 has the label '-1'"),
        ("stsb", "train", b'{"7": {"text_a": "A", "text_b": "B", "label": "5.1"}}', "example 7 has the score '5.1'"),
        ("stsb", "train", b'{"7": {"text_a": "A", "text_b": "B", "label": "nan"}}', "example 7 has the score 'nan'"),
        ("mrpc", "dev", b'{"0": {"text_a": "A", "label": "1"}}', "example 0 must have 2 texts"),
        ("sst2", "dev", b'{"0": {"text_a": 3, "label": "1"}}', "example 0 must have 1 text"),
        ("qqp", "train", b'{"0": ["A"]}', "example 0 must be an object with text_a"),
        ("qqp", "train", b"[]", "must be a JSON object"),
    ],
)
def test_wrong_file_is_one_sentence(refused, change, name, part, content, message):
    path = change(name, part, content)
    sentence = refused()
    assert str(path) in sentence and message in sentence


def test_training_set_that_the_test_sets_hold_is_refused(refused, change):
    change("cola", "train", raw_file("cola", "test", ".json"))
    assert "no example is left for cola/train" in refused()


def test_manifest_without_a_test_file_is_one_sentence(refused, world):
    manifest = json.loads(world.manifest.read_text())
    del manifest["tasks"]["qqp"]["files"]["test"]
    world.manifest.write_text(json.dumps(manifest))
    sentence = refused()
    assert str(world.manifest) in sentence and "qqp" in sentence


# --- the hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A copy of the hub's repository with few examples: a card that names the tables, and a parquet file of each."""
    import datasets

    folder, card = tmp_path_factory.mktemp("hub"), ["---", "configs:"]
    for name, columns in TEXTS.items():
        target = datasets.Value("float32")
        if "labels" in TASKS[name]:
            target = datasets.ClassLabel(names=TASKS[name]["labels"])
        splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ["train", *splits, "test"]:
            table = {column: [f"{name} {split} {index} {column} " for index in range(30)] for column in columns}
            hidden = split == "test" and "labels" in TASKS[name]
            table["label"] = [-1 if hidden else 3.8 if name == "stsb" else index % 2 for index in range(30)]
            if (name, split) == ("qqp", "train"):
                table["question2"][4] = ""
            features = datasets.Features({**dict.fromkeys(columns, datasets.Value("string")), "label": target})
            path = folder / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_dict(table, features).to_parquet(path)
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """The tables that ``datasets`` keeps are this test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.slow(1)
def test_hub_gives_all_nine_tasks_and_the_kinds_of_mnli(run, world, hub, no_cache):
    printed = run("--hub", "--source", hub, "--manifest", MANIFEST_FILE, source=False)
    sets = written(world.output, TASKS)
    assert json.loads((world.output / "tasks.json").read_text()) == {"tasks": list(TASKS.values())}
    for name, parts in sets.items():
        expected = {"train": 27, "dev": 2 if name == "qqp" else 3, "test": 60 if name == "mnli" else 30}
        assert {part: len(rows) for part, rows in parts.items()} == expected
        assert {"train" in row[1] for part in ("train", "dev") for row in parts[part]} == {True}
        assert "validation" in parts["test"][0][1] and not parts["test"][0][1].endswith(" ")
    assert {row[0] for row in sets["stsb"]["test"]} == {3.8}
    assert [row[0] for row in sets["wnli"]["test"][:2]] == ["not_entailment", "entailment"]
    mnli = json.loads((world.output / "test" / "mnli" / "test.json").read_text())
    assert collections.Counter(example["kind"] for example in mnli) == {"matched": 30, "mismatched": 30}
    assert {example["kind"] for example in mnli if "mismatched" in example["text"]} == {"mismatched"}
    assert "not verified" in printed and "qqp 1" in printed
    assert "qnli/validation has 30 examples where GLUE has 5,463" in printed


def test_hub_that_cannot_be_read_is_one_sentence(refused, world, hub, no_cache, tmp_path):
    flags = ("--hub", "--manifest", MANIFEST_FILE)
    (tmp_path / "empty").mkdir()
    assert "cola of" in refused(*flags, "--source", tmp_path / "empty", source=False)
    assert "is not a folder" in refused(*flags, "--source", tmp_path / "none", source=False)
    assert "pass one" in refused(*flags, "--base_url", "http://127.0.0.1", source=False)


# --- the real files


def test_manifest_and_readme_agree():
    table = (PROJECT / "data" / "glue" / "README.md").read_text()
    files = [raw for entry in MANIFEST["tasks"].values() for raw in entry["files"].values()]
    assert len({raw["path"] for raw in files}) == len({raw["sha256"] for raw in files}) == 22
    for name in NAMES:
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        known = [f"{MANIFEST['tasks'][name]['records'][part]:,}" for part in PARTS]
        assert [cell.strip() for cell in row.split("|")[3:6]] == known
        assert ", ".join(TASKS[name].get("labels", ["0 to 5"])) in row
        assert TASKS[name]["metric"] in METRICS


@pytest.mark.slow
def test_real_files_give_the_known_examples(tmp_path, capsys):
    folder = os.environ.get("COMMONSENSE_DATA")
    if not folder or not (Path(folder) / "glue").is_dir():
        pytest.skip("COMMONSENSE_DATA is not set to a folder with glue/data/glue_pretrain and glue/data/k-shot")
    cli.main(["prepare", "glue", "--source", str(Path(folder) / "glue"), "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "known set" not in printed and "cola 26, sst2 2, mrpc 160, stsb 108\n" in printed
    sets = written(tmp_path)
    official = {"cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "qnli": 5463, "rte": 277}
    assert {name: len(sets[name]["test"]) for name in official} == official
    characters = {
        part: {
            frozenset("".join(re.findall(r"[^\W_]", text.casefold())) for text in row[1:])
            for parts in sets.values()
            for row in parts[part]
        }
        for part in PARTS
    }
    assert not characters["train"] & characters["dev"]
    assert not characters["test"] & (characters["train"] | characters["dev"])
    assert sets["mrpc"]["test"][0][0] == "equivalent" and not sets["mrpc"]["test"][0][1].startswith("\ufeff")
    labels = {name: {row[0] for row in sets[name]["train"]} for name in NAMES}
    assert all(labels[name] == set(TASKS[name]["labels"]) for name in NAMES if name != "stsb")
    assert min(labels["stsb"]) == 0.0 and max(labels["stsb"]) == 5.0
