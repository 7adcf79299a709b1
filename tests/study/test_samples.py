"""Samples of a study are fixed: the same records for every experiment, on every machine, at every start."""

import itertools
import json
from pathlib import Path

import pytest
from shared import QUICKSTART, quickstart_records
from study_cases import SEARCH, dev_set, grid, planner, write_grid

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.study.data import StudyData, as_record, sample, write
from mtl_lora.study.read_grid import read_grid


@pytest.fixture(scope="module")
def examples():
    return load_examples(QUICKSTART / "test" / "piqa" / "test.json", COMMONSENSE, "piqa")


def data(tmp_path: Path, **changes) -> StudyData:
    return StudyData(read_grid(write_grid(tmp_path, grid(**changes))), tmp_path / "study")


def test_sample_is_these_records_for_ever(examples):
    assert [example.index for example in sample(examples, 5, "piqa")] == [8, 24, 37, 48, 58]


def test_larger_sample_adds_to_a_smaller_one_in_the_files_order(examples):
    indices = [[example.index for example in sample(examples, most, "piqa")] for most in range(1, 70)]
    for smaller, larger in itertools.pairwise(indices):
        assert set(smaller) <= set(larger) and larger == sorted(larger)
    assert indices[-1] == list(range(60)) == [example.index for example in sample(examples, 0, "piqa")]


def test_tasks_are_sampled_by_their_names(examples):
    assert sample(examples, 5, "piqa") != sample(examples, 5, "boolq")


def test_record_of_the_data_is_written_as_it_was(examples):
    first = json.loads((QUICKSTART / "test" / "piqa" / "test.json").read_text())[0]
    assert as_record(examples[0]) == first


def test_training_sample_has_so_many_records_of_every_task_and_is_told_by_its_bytes(tmp_path):
    part = data(tmp_path, train_records=7).train()
    write(part)
    records = json.loads(part.path.read_text())
    assert part.counts == dict.fromkeys(COMMONSENSE.names, 7) and part.of == dict.fromkeys(COMMONSENSE.names, 240)
    assert [record["task_id"] for record in records] == [task for task in range(8) for _ in range(7)]
    assert all(record in quickstart_records() for record in records)
    assert part.sha256 == {"train": files.sha256(part.path)}
    assert part.source == {"train": files.sha256(QUICKSTART / "train.json")}


def test_records_of_one_task_are_those_of_the_sample_of_all(tmp_path):
    study_data = data(tmp_path, train_records=7)
    whole, one = study_data.train(), study_data.train(("winogrande",))
    for part in (whole, one):
        write(part)
    records = [record for record in json.loads(whole.path.read_text()) if record["task_id"] == 4]
    assert json.loads(one.path.read_text()) == records and one.path != whole.path


def test_whole_sets_are_read_where_they_lie(tmp_path):
    study_data = data(tmp_path, train_records=0, test_records=0)
    assert study_data.train().path == QUICKSTART / "train.json"
    assert study_data.test.path == QUICKSTART / "test"
    assert not study_data.train().content and not study_data.test.content
    assert study_data.test.sha256["boolq"] == files.sha256(QUICKSTART / "test" / "boolq" / "test.json")


def test_test_sample_is_a_folder_the_evaluation_reads(tmp_path):
    part = data(tmp_path, test_records=4).test
    write(part)
    for task in COMMONSENSE.names:
        kept = load_examples(part.path / task / "test.json", COMMONSENSE, task, closed=True)
        assert len(kept) == 4 == part.counts[task]
        assert part.sha256[task] == files.sha256(part.path / task / "test.json")


def test_files_that_are_right_are_not_written_again(tmp_path):
    part = data(tmp_path).train()
    write(part)
    before = part.path.stat().st_mtime_ns
    write(part)
    assert part.path.stat().st_mtime_ns == before
    part.path.write_text("[]")
    write(part)
    assert part.path.read_bytes() == part.content[part.path]


def test_missing_data_names_the_command_that_makes_them(tmp_path):
    changed = grid(prepare="python prepare.py")
    changed["train"]["data_path"] = "none.json"
    with pytest.raises(UserError, match=r"records none\.json do not exist; make them with `python prepare.py`"):
        planner(tmp_path, changed)
    changed = grid(evaluate={"data_dir": str(tmp_path)})
    with pytest.raises(UserError, match=r"there is no test file .*boolq/test\.json; say where they are in the grid"):
        planner(tmp_path, changed)


def test_development_set_that_is_a_copy_of_the_test_sets_is_refused(tmp_path):
    folder = Path(dev_set(tmp_path))
    planner(tmp_path, grid(search={**SEARCH, "data_dir": str(folder)}))
    (folder / "piqa" / "test.json").write_bytes((QUICKSTART / "test" / "piqa" / "test.json").read_bytes())
    with pytest.raises(UserError, match="hold the same records of piqa; choose by a development set"):
        planner(tmp_path, grid(search={**SEARCH, "data_dir": str(folder)}))
