"""The text-classification set of small made-up raw files against a slow, obvious splitter, and on the real sets."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from shared import git_blob
from textclass_cases import FOLDER, MANIFEST, PARTS, TASKS, assert_sets_are_apart, make_source, obvious, written

from mtl_lora import cli


@pytest.fixture
def world(tmp_path):
    """Raw files of all tasks, a manifest of them, and where to write."""
    make_source(tmp_path)
    source, output = tmp_path / "source", tmp_path / "out"
    manifest = tmp_path / "manifest.json"
    flags = {"--manifest": manifest, "--output_dir": output}
    return SimpleNamespace(
        set=["textclass"], folder=tmp_path, source=source, output=output, manifest=manifest, flags=flags
    )


# --- raw files


@pytest.mark.slow(1)
def test_raw_files_are_split_as_the_rules_say(run, world):
    run()
    sets = written(world.output)
    assert sets == obvious(world.source)
    assert_sets_are_apart(sets)
    # the made-up files try what they are meant to try
    assert all(sets.values()) and {"one two", "caf\xe9 voil\xc3"} <= {
        text for rows in sets.values() for text, _ in rows
    }


def test_output_is_the_same_every_time_and_printed_with_its_counts(run, world):
    printed = run()
    first = (world.output / "train.json").read_bytes()
    assert first.isascii() and len(first.splitlines()) == len(json.loads(first)) + 2
    sets = written(world.output)
    for line, task in zip(printed.splitlines()[1:], TASKS, strict=False):
        assert line.split() == [task.name, str(task.id), *(f"{len(sets[task.name, part]):,}" for part in PARTS)]
    assert "cr/dev has" in printed and "where the known set has 376" in printed
    assert run() == printed and (world.output / "train.json").read_bytes() == first


@pytest.mark.slow(1)
def test_limit_takes_so_many_of_each_task_and_a_larger_one_adds_to_them(run, world):
    run()
    whole = written(world.output)
    run("--limit", "20")
    few = written(world.output)
    run("--limit", "21")
    more = written(world.output)
    for task in TASKS:
        key = task.name, "train"
        in_order = iter(whole[key])
        assert len(few[key]) == 20 and len(more[key]) == 21
        assert all(pair in in_order for pair in few[key]) and few[key] != whole[key][:20]
        assert Counter(few[key]) <= Counter(more[key]) <= Counter(whole[key])
        assert few[task.name, "test"] == whole[task.name, "test"] and few[task.name, "dev"] == whole[task.name, "dev"]


@pytest.mark.parametrize("line", ["2 third class", "good", "", "0", "-1 text", "10 text"])
def test_wrong_line_is_named(refused, world, line):
    path = world.source / "data" / "custrev.all"
    path.write_bytes(b"1 good\n" + line.encode() + b"\n0 bad\n")
    manifest = json.loads(world.manifest.read_text())
    manifest["tasks"]["cr"]["files"]["all"]["git_blob_sha1"] = git_blob(path.read_bytes())
    world.manifest.write_text(json.dumps(manifest))
    assert f"{path}, line 2 is {line!r}" in refused()


def test_other_bytes_and_missing_files_are_all_named(refused, world):
    (world.source / "data" / "mpqa.all").write_bytes(b"1 good\n")
    (world.source / "data" / "TREC.test.all").unlink()
    sentence = refused()
    assert f"data/mpqa.all has other bytes (git blob {git_blob(b'1 good' + bytes([10]))} instead of" in sentence
    assert "data/TREC.test.all is missing" in sentence and "custrev" not in sentence


def test_too_little_data_is_refused(refused, world):
    path = world.source / "data" / "custrev.all"
    path.write_bytes(b"1 good\n")
    manifest = json.loads(world.manifest.read_text())
    manifest["tasks"]["cr"]["files"]["all"]["git_blob_sha1"] = git_blob(path.read_bytes())
    world.manifest.write_text(json.dumps(manifest))
    assert "no example is left for" in refused()


# --- sets that are split already


@pytest.fixture
def prepared(world):
    """Six tasks of {"text", "label"}: a training text of cr is tested in trec, and two labels have several words."""
    for task in TASKS:
        for split in PARTS:
            rows = [{"text": f"{split} {task.name} {option}", "label": option} for option in task.options]
            if (task.name, split) == ("cr", "train"):
                rows.append({"text": "Test TREC: person ...", "label": "negative"})
                rows.append({"text": "dev sst2 positive", "label": "positive"})
            if (task.name, split) == ("subj", "dev"):
                rows.append({"text": "test mpqa positive !", "label": "objective"})
            path = world.folder / "prepared" / task.name / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows))
    return world.folder / "prepared"


def test_prepared_sets_become_records_without_texts_of_test_sets(run, world, prepared):
    run("--prepared", prepared, source=False)
    sets = written(world.output)
    assert_sets_are_apart(sets)
    for (name, split), rows in sets.items():
        assert rows == [(f"{split} {name} {option}", option) for option in TASKS[name].options]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a", "label": "good"}]', "example 0 has the label 'good', none of negative, positive"),
        ('[{"text": "a", "label": ["positive"]}]', "example 0 has the label"),
        ('[{"text": " ", "label": "positive"}]', "example 0 must be an object with a text"),
        ('["a"]', "example 0 must be an object with a text"),
        ("{}", "must hold a JSON list of examples, not dict"),
        ("[", "is not JSON"),
        ("[]", "no example is left for sst2/dev"),
    ],
)
def test_wrong_prepared_file_is_one_sentence(refused, prepared, content, message):
    path = prepared / "sst2" / "dev.json"
    path.write_text(content)
    sentence = refused("--prepared", prepared, source=False)
    assert message in sentence and (content == "[]" or str(path) in sentence)


def test_missing_prepared_file_is_named(refused, prepared):
    (prepared / "subj" / "test.json").unlink()
    assert str(prepared / "subj" / "test.json") in refused("--prepared", prepared, source=False)


def test_prepared_sets_are_never_written_over(run, prepared, capsys):
    before = (prepared / "cr" / "test.json").read_bytes()
    moved = prepared.rename(prepared.parent / "test")
    with pytest.raises(SystemExit):
        run("--prepared", moved, "--output_dir", moved.parent, source=False)
    assert "would overwrite" in capsys.readouterr().err
    assert (moved / "cr" / "test.json").read_bytes() == before


# --- downloading, writing, flags


@pytest.mark.slow(1)
def test_files_are_downloaded_once_and_verified(run, refused, world, serve):
    server, downloads = serve(world.source), world.folder / "downloads"
    flags = ("--base_url", server.url, "--download_dir", downloads)
    raw = world.source / "data" / "subj.all"
    content = raw.read_bytes()
    raw.write_bytes(content[:-2])
    sentence = refused(*flags, source=False)
    assert "data/subj.all" in sentence and "other bytes" in sentence and "--source" in sentence
    raw.write_bytes(content)
    assert "3 files downloaded" in run(*flags, source=False)  # subj, and TREC's two behind it
    assert written(world.output) == obvious(world.source)
    asked = len(server.asked)
    assert "0 files downloaded" in run(*flags, source=False) and len(server.asked) == asked


def test_stop_while_writing_leaves_the_old_files(run, world, monkeypatch):
    run("--limit", "5")
    before = {path: path.read_bytes() for path in world.output.rglob("*") if path.is_file()}
    calls = iter(range(100))

    def interrupted(descriptor):
        if next(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(SystemExit):
        run("--limit", "6")
    after = {path: path.read_bytes() for path in world.output.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["tasks"].pop("trec"),
        lambda value: value["tasks"]["cr"].update(files=[]),
        lambda value: value["tasks"]["cr"]["files"]["all"].update(size=3),
        lambda value: value["tasks"]["cr"]["records"].update(train="many"),
    ],
)
def test_wrong_manifest_is_one_sentence(refused, world, change):
    value = json.loads(world.manifest.read_text())
    change(value)
    world.manifest.write_text(json.dumps(value))
    assert str(world.manifest) in refused()


def test_tasks_file_goes_with_the_examples_and_is_that_of_the_project(run, world):
    run("--limit", "5")
    assert (world.output / "tasks.json").read_bytes() == (FOLDER / "tasks.json").read_bytes()


# --- the real sets


def test_tasks_and_manifest_agree_with_the_table_of_the_readme():
    known = {name: entry["records"] for name, entry in MANIFEST["tasks"].items()}
    assert list(known) == TASKS.names
    files = [raw for entry in MANIFEST["tasks"].values() for raw in entry["files"].values()]
    assert len({raw["path"] for raw in files}) == len({raw["git_blob_sha1"] for raw in files}) == 11
    table = (FOLDER / "README.md").read_text()
    for task in TASKS:
        row = next(line for line in table.splitlines() if line.startswith(f"| {task.name} "))
        assert ", ".join(task.options) in row
        assert [f"{known[task.name][part]:,}" for part in PARTS] == [cell.strip() for cell in row.split("|")[3:6]]


def _as_utf8(text: str) -> str:
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:  # which it was
        return text


@pytest.mark.slow
def test_real_sets_give_the_known_records(tmp_path, capsys):
    folder = os.environ.get("COMMONSENSE_DATA")
    if not folder or not (Path(folder) / "textclass").is_dir():
        pytest.skip("COMMONSENSE_DATA is not set to a folder with textclass/<task>/{train,dev,test}.json")
    source, given = tmp_path / "source", Path(folder) / "textclass"
    shutil.copytree(given, source)
    for path in [path for name in ("sst2", "sst5") for path in sorted((source / name).glob("*.json"))]:
        # Where SST was read as latin-1, and a run of its spaces made one.
        records = json.loads(path.read_text())
        for record in records:
            words = record["text"].replace("\xc2 ", " ").split("\xc3 ")
            record["text"] = " ".join("\xe0 ".join(_as_utf8(part) for part in words).split())
        path.write_text(json.dumps(records))
    cli.main(["prepare", "textclass", "--prepared", str(source), "--output_dir", str(tmp_path / "sets")])
    assert "known set" not in capsys.readouterr().out
    sets = written(tmp_path / "sets")
    assert_sets_are_apart(sets)
    for (name, split), rows in sets.items():
        given = [(row["text"], row["label"]) for row in json.loads((source / name / f"{split}.json").read_text())]
        assert rows == [pair for pair in given if pair in rows] and (split != "test" or rows == given)
        assert len(rows) == MANIFEST["tasks"][name]["records"][split]
