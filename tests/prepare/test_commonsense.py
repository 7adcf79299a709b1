"""The commonsense set of a small synthetic copy of LLM-Adapters' layout, and of the real files where they are."""

import collections
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from shared import PROJECT, git_blob

from mtl_lora import cli
from mtl_lora.files import sha256
from mtl_lora.language.prepare import commonsense
from mtl_lora.language.tasks import COMMONSENSE

SCRIPT = PROJECT / "data" / "commonsense" / "prepare.py"


def record(task, text: str) -> dict:
    answer = task.options[-1]
    return {"instruction": f"{text}\n\né", "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def dump(path: Path, value) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4))
    return path.read_bytes()


@pytest.fixture
def world(tmp_path):
    """A complete source of 17 training and 8 test records, its manifest, its merged file, and where to write."""
    source, tasks, merged = tmp_path / "source", {}, []
    for task in COMMONSENSE:
        tasks[task.name] = {}
        for split, count in (("train", 3 if task.name == "boolq" else 2), ("test", 1)):
            # the same words in every task but for its name: only the file or the whole text tells the task
            records = [record(task, f"{split} question {number} of {task.name}") for number in range(count)]
            merged += records if split == "train" else []
            content = dump(source / task.name / f"{split}.json", records)
            path = f"dataset/{task.name}/{split}.json"
            tasks[task.name][split] = {"path": path, "records": count, "git_blob_sha1": git_blob(content)}
    merged = merged[::-1]
    content = dump(tmp_path / "merged.json", merged)
    known = {"path": "merged.json", "records": len(merged), "git_blob_sha1": git_blob(content)}
    dump(tmp_path / "manifest.json", {"repository": "a/b", "commit": "c", "merged": known, "tasks": tasks})
    manifest, output, tests = tmp_path / "manifest.json", tmp_path / "out" / "train.json", tmp_path / "out" / "test"
    return SimpleNamespace(
        folder=tmp_path,
        source=source,
        merged=tmp_path / "merged.json",
        records=merged,
        manifest=manifest,
        output=output.parent,
        train=output,
        tests=tests,
        set=["--set", "commonsense"],
        flags={"--manifest": manifest, "--output": output, "--test_dir": tests},
    )


def training_records(world) -> list[dict]:
    return json.loads(world.train.read_bytes())


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]


# --- a folder as the source


def test_records_carry_the_id_of_the_file_they_came_from_in_order_of_ids(run, world):
    printed = run()
    records = training_records(world)
    assert [entry["task_id"] for entry in records] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    for entry in records:
        assert set(entry) == {"instruction", "input", "output", "answer", "task_id"}
        assert f"of {COMMONSENSE[entry['task_id']].name}\n" in entry["instruction"]
    assert "17 of 17 training examples" in printed
    assert hashlib.sha256(world.train.read_bytes()).hexdigest() in printed


def test_output_is_ascii_one_record_a_line_and_the_same_every_time(run, world):
    run()
    first = world.train.read_bytes()
    assert first.isascii() and len(first.splitlines()) == 17 + 2
    run()
    assert world.train.read_bytes() == first and half_written(world.folder) == []


def test_test_sets_are_copied_byte_for_byte(run, world):
    run()
    for task in COMMONSENSE:
        copy = world.tests / task.name / "test.json"
        assert copy.read_bytes() == (world.source / task.name / "test.json").read_bytes()


def test_table_names_id_counts_and_state_of_every_task(run, world):
    (world.source / "piqa" / "test.json").unlink()
    lines = run("--allow_partial").splitlines()
    assert lines[1].split() == ["boolq", "0", "3", "exact", "1", "exact"]
    assert lines[2].split() == ["piqa", "1", "2", "exact", "0", "missing"]
    assert lines[9].split() == ["total", "17", "7"]


@pytest.fixture
def incomplete(world):
    """HellaSwag with one of two training examples, in train_partial.json, and another test set; OBQA without one."""
    hellaswag = world.source / "hellaswag"
    records = json.loads((hellaswag / "train.json").read_bytes())
    (hellaswag / "train.json").unlink()
    dump(hellaswag / "train_partial.json", records[:1])
    dump(hellaswag / "test.json", [record(COMMONSENSE["hellaswag"], "other words")])
    (world.source / "openbookqa" / "test.json").unlink()
    return world


def assert_names_what_is_incomplete(text: str, world):
    assert "hellaswag/train_partial.json is partial (1 of 2 examples, git blob " in text
    found = git_blob((world.source / "hellaswag" / "test.json").read_bytes())
    expected = json.loads(world.manifest.read_bytes())["tasks"]["hellaswag"]["test"]["git_blob_sha1"]
    assert f"hellaswag/test.json is inexact (1 of 1 examples, git blob {found} instead of {expected})" in text
    assert "openbookqa/test.json is missing (1 examples)" in text
    assert text.count(" is missing ") == text.count(" is inexact ") == text.count(" is partial ") == 1


def test_incomplete_source_is_refused_and_named(refused, incomplete):
    sentence = refused()
    assert_names_what_is_incomplete(sentence, incomplete)
    assert "16 of 17 training examples" in sentence and "--allow_partial" in sentence


def test_incomplete_source_is_written_when_allowed_and_named(run, incomplete):
    printed = run("--allow_partial")
    assert_names_what_is_incomplete(printed, incomplete)
    assert "16 of 17 training examples" in printed
    assert [entry["task_id"] for entry in training_records(incomplete)].count(3) == 1
    assert not (incomplete.tests / "openbookqa").exists()


def test_partial_file_is_not_read_where_the_whole_one_is(run, world):
    dump(world.source / "hellaswag" / "train_partial.json", [])
    assert "17 of 17" in run()


def spoil(**changes):
    return lambda entry: entry.update(changes)


WRONG_RECORDS = {
    "no answer": (lambda entry: entry.pop("answer"), "has no field 'answer'"),
    "no instruction": (lambda entry: entry.pop("instruction"), "has no field 'instruction'"),
    "a number": (spoil(input=3), "'input' must be a string, not 3"),
    "null": (spoil(output=None), "must be "),
    "blank": (spoil(instruction=" \n"), "'instruction' is empty"),
    "another task's answer": (spoil(answer="answer1"), "'answer1' is not one of its options solution1"),
    "another output": (spoil(output="the correct answer is solution1"), "must be 'the correct answer is solution2'"),
}


@pytest.mark.parametrize("case", WRONG_RECORDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_wrong_record_is_named_by_file_and_index(refused, world, case, split):
    change, message = WRONG_RECORDS[case]
    path = world.source / "piqa" / f"{split}.json"
    records = json.loads(path.read_bytes())
    change(records[-1])
    dump(path, records)
    sentence = refused("--allow_partial")
    assert f"{path}, example {len(records) - 1}" in sentence and message in sentence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"instruction": "cut o', "is not JSON"),
        (b"\xff\xfe\xfa", "UTF-16"),
        (b"", "is not JSON"),
        (b'{"train": []}', "must hold a JSON list of examples, not dict"),
        (b'["text"]', "example 0 must be an object with instruction, input, output, answer, task_id, not str"),
    ],
)
def test_file_that_is_no_list_of_records_is_named(refused, world, content, message):
    path = world.source / "winogrande" / "train.json"
    path.write_bytes(content)
    sentence = refused("--allow_partial")
    assert str(path) in sentence and message in sentence


def test_folder_in_the_place_of_a_file_is_one_sentence(refused, world):
    path = world.source / "winogrande" / "train.json"
    path.unlink()
    path.mkdir()
    assert f"{path} cannot be read" in refused("--allow_partial")


def test_source_that_is_no_source_is_one_sentence(refused, world):
    assert "is not a folder" in refused("--source", world.folder / "nowhere")
    assert "is not a folder" in refused("--source", world.merged)
    assert "holds no file of any task" in refused("--source", world.folder, "--allow_partial")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["tasks"].pop("piqa"), "'piqa'"),
        (lambda value: value.pop("commit"), "'commit'"),
        (lambda value: value["merged"].update(records="17"), "whole number"),
        (lambda value: value["tasks"]["piqa"]["test"].update(size=3), "'size'"),
        (lambda value: value["tasks"].update(piqa=[]), "layout"),
    ],
)
def test_wrong_manifest_is_one_sentence(refused, world, change, message):
    value = json.loads(world.manifest.read_bytes())
    change(value)
    dump(world.manifest, value)
    sentence = refused()
    assert str(world.manifest) in sentence and message in sentence


# --- writing


@pytest.mark.parametrize("flag", ["--output", "--test_dir"])
def test_unwritable_place_is_one_sentence_and_nothing_is_written(refused, world, flag):
    path = world.merged / "below" / "a file"
    assert f"{path}" in refused(flag, path)
    assert half_written(world.folder) == []


def test_output_that_is_a_folder_or_an_input_is_refused(refused, world):
    assert "it is a folder" in refused("--output", world.source)
    for path in (world.source / "boolq" / "train.json", world.tests / "boolq" / "test.json", world.merged):
        assert "choose another name" in refused("--merged", world.merged, "--output", path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("moment", [1, 5, 9])
def test_stop_while_writing_leaves_nothing_half_written_and_the_old_output(run, world, monkeypatch, stop, moment):
    world.output.mkdir()
    world.train.write_text("old")
    calls = iter(range(1, 100))

    def interrupted(descriptor):
        if next(calls) == moment:
            raise stop

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises((SystemExit, RuntimeError)):
        run()
    assert world.train.read_text() == "old" and half_written(world.output) == []
    for path in world.tests.rglob("*.json"):
        assert path.read_bytes() == (world.source / path.relative_to(world.tests)).read_bytes()


# --- an existing merged file


def test_merged_file_is_tagged_in_its_own_order(run, world):
    printed = run("--merged", world.merged)
    records = training_records(world)
    assert [entry.pop("task_id") for entry in records] == [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0]
    assert records == world.records
    assert "is the known merged file (17 examples" in printed


def test_merged_file_with_other_bytes_says_so(run, world):
    dump(world.merged, world.records[2:])
    printed = run("--merged", world.merged)
    found = git_blob(world.merged.read_bytes())
    assert f"is not the known merged file: 15 of 17 examples, git blob {found} instead of" in printed
    assert "15 of 17 training examples" in printed


@pytest.fixture
def strangers(world):
    """Seven records that no task holds, one of them but for a space, at every second place from 1 on."""
    for number in range(7):
        text = "train question 0 of boolq " if number == 0 else f"Why,\nstranger {number}?"
        world.records.insert(1 + 2 * number, record(COMMONSENSE["boolq"], text))
    dump(world.merged, world.records)
    return world


def test_records_without_a_task_are_refused_and_named(refused, strangers):
    sentence = refused("--merged", strangers.merged)
    assert 'example 1 "train question 0 of boolq ' in sentence
    assert 'example 3 "Why,\\nstranger 1?' in sentence
    assert "and 2 more" in sentence and "example 11" not in sentence


def test_records_without_a_task_are_left_out_and_counted_when_allowed(run, strangers):
    printed = run("--merged", strangers.merged, "--allow_partial")
    assert "example 1 " in printed and "and 2 more" in printed
    assert "24 of 17 examples" in printed
    records = training_records(strangers)
    assert len(records) == 17 and not any("stranger" in entry["instruction"] for entry in records)


def test_instruction_of_two_tasks_is_not_guessed(refused, world):
    twin = json.loads((world.source / "ARC-Easy" / "train.json").read_bytes())[0]
    path = world.source / "ARC-Challenge" / "train.json"
    content = dump(path, [*json.loads(path.read_bytes()), twin])
    value = json.loads(world.manifest.read_bytes())
    value["tasks"]["ARC-Challenge"]["train"].update(records=3, git_blob_sha1=git_blob(content))
    dump(world.manifest, value)
    assert 'example 3 "train question 0 of ARC-Easy' in refused("--merged", world.merged)


def test_merged_record_of_a_test_set_is_not_placed(refused, world):
    dump(world.merged, [*world.records, record(COMMONSENSE["piqa"], "test question 0 of piqa")])
    assert 'example 17 "test question 0 of piqa' in refused("--merged", world.merged)


def test_merged_record_with_another_tasks_answer_is_named(refused, world):
    world.records[4].update(answer="true", output="the correct answer is true")
    dump(world.merged, world.records)
    assert f"{world.merged}, example 4: the answer 'true' is not one of its options" in refused(
        "--merged", world.merged
    )


def test_merged_file_needs_a_whole_source_too(refused, incomplete):
    assert "hellaswag/train_partial.json is partial" in refused("--merged", incomplete.merged)


def test_no_record_at_all_is_refused(refused, world):
    dump(world.merged, [])
    assert "gives no training example" in refused("--merged", world.merged, "--allow_partial")


# --- downloading


@pytest.fixture
def mirror(world, serve):
    """The source served on loopback under the manifest's paths; ``asked`` lists the paths that were asked for."""
    (world.folder / "served").mkdir()
    world.source.rename(world.folder / "served" / "dataset")
    server, downloads = serve(world.folder / "served"), world.folder / "downloads"
    return SimpleNamespace(
        asked=server.asked,
        downloads=downloads,
        dataset=world.folder / "served" / "dataset",
        flags=("--base_url", server.url, "--download_dir", downloads),
    )


def test_files_are_downloaded_once(run, world, mirror):
    printed = run(*mirror.flags, source=False)
    assert "16 files downloaded" in printed and "17 of 17" in printed
    assert mirror.asked[0] == "/dataset/boolq/train.json" and len(mirror.asked) == 16
    first = world.train.read_bytes()
    assert "0 files downloaded" in run(*mirror.flags, source=False)
    (mirror.downloads / "piqa" / "test.json").write_text("broken")
    assert "1 files downloaded" in run(*mirror.flags, source=False)
    assert len(mirror.asked) == 17
    assert world.train.read_bytes() == first and half_written(world.folder) == []


def test_missing_file_on_the_mirror_is_one_sentence_with_its_address(refused, mirror):
    (mirror.dataset / "winogrande" / "test.json").unlink()
    sentence = refused(*mirror.flags, source=False)
    assert "/dataset/winogrande/test.json" in sentence and "404" in sentence and "--source" in sentence
    (mirror.dataset / "winogrande" / "test.json").write_text("[]")
    mirror.asked.clear()
    assert "other bytes" in refused(*mirror.flags, source=False)
    assert set(mirror.asked) == {"/dataset/winogrande/test.json"}  # the nine before it were kept
    assert half_written(mirror.downloads) == []


# --- the command line


def test_the_script_beside_the_data_takes_the_flags_and_ends_with_code_2(incomplete):
    flags = {"source": incomplete.source, "manifest": incomplete.manifest, "output": incomplete.train}
    command = [sys.executable, str(SCRIPT), *(f"--{name}={path}" for name, path in flags.items())]
    done = subprocess.run([*command, "--test-dir", str(incomplete.tests)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert_names_what_is_incomplete(done.stderr, incomplete)
    assert not incomplete.train.exists()


@pytest.mark.parametrize("root", [True, False], ids=["script", "installed command"])
def test_places_are_those_of_the_project_for_its_script_and_of_the_caller_for_the_command(world, monkeypatch, root):
    here, there = world.folder / "here", world.folder / "there"
    here.mkdir()
    monkeypatch.chdir(here)
    arguments = ["commonsense", "--source", "../source", "--manifest", "../manifest.json"]
    cli.prepare(arguments, there if root else None)
    folder, other = (there, here) if root else (here, there)
    assert (folder / "commonsense_170k_taskid.json").is_file()
    assert len(list(folder.glob("data/commonsense/test/*/test.json"))) == 8
    assert not other.exists() or list(other.iterdir()) == []


# --- the real files


def test_manifest_has_every_file_of_every_task():
    _, merged, files = commonsense.load_manifest(commonsense.MANIFEST)
    train = [entry.records for name, entry in files.items() if name.endswith("/train.json")]
    test = [entry.records for name, entry in files.items() if name.endswith("/test.json")]
    assert sum(train) == merged.records == 170_420
    assert sum(test) == 22_419
    assert all(len(entry.git_blob_sha1) == 40 for entry in (*files.values(), merged))
    assert all(entry.path == f"dataset/{name}" for name, entry in files.items())


@pytest.mark.slow
def test_real_files_give_the_known_examples(tmp_path, capsys):
    folder = os.environ.get("COMMONSENSE_DATA")
    if not folder:
        pytest.skip("COMMONSENSE_DATA is not set to a folder with llm_adapters/<task>/{train,test}.json")
    source, output = Path(folder) / "llm_adapters", tmp_path / "train.json"
    flags = ["--source", str(source), "--output", str(output), "--test_dir", str(tmp_path / "test")]
    cli.main(["prepare", "commonsense", *flags, "--allow_partial"])
    printed = capsys.readouterr().out
    states = {row.split()[0]: row.split()[3::2] for row in printed.splitlines()[1:9]}
    assert list(states) == COMMONSENSE.names
    assert {name: state for name, state in states.items() if name != "hellaswag" and state != ["exact", "exact"]} == {}
    for name, known in commonsense.load_manifest(commonsense.MANIFEST)[2].items():
        assert name.startswith("hellaswag") or known.sha256 == sha256(source / name)
    counts = collections.Counter(entry["task_id"] for entry in json.loads(output.read_bytes()))
    whole = states["hellaswag"][0] == "exact"
    known = [9_427, 16_113, 33_410, 39_905 if whole else 3_368, 63_238, 1_119, 2_251, 4_957]
    assert [counts[task.id] for task in COMMONSENSE] == known
    assert f"{170_420 if whole else 133_883:,} of 170,420 training examples" in printed
