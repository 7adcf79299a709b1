"""A study's file is read key by key; a folder of one run is a study of one experiment."""

import json

import pytest
from report_records import BASE, TUNED, changed
from synthetic_study import analysis, log_text, write_study

from mtl_lora.errors import UserError
from mtl_lora.report.read_folder import read_all, read_one
from mtl_lora.report.study import OVER_QUESTIONS, OVER_SEEDS

TASKS = {"first": "First", "second": "Second <&>"}


@pytest.fixture
def study_file(tmp_path):
    """A small study that a test may spoil; ``study_file(place__in__it=value)`` returns its folder."""

    def write(**places):
        write_study(tmp_path, seeds=(0, 1), blocks=1, tasks=TASKS, methods={"LoRA": "lora", "MTL-LoRA": "mtl_lora"})
        path = tmp_path / "study.json"
        path.write_text(json.dumps(changed(json.loads(path.read_text()), **places)))
        return tmp_path

    return write


def test_experiments_have_their_scores_intervals_logs_and_analyses(study_file):
    study = read_one(study_file())
    base, lora, ours = study.experiments
    assert [base.method, lora.method, ours.method] == [None, "lora", "mtl_lora"]
    assert {value.of for value in ours.scores.tasks.values()} == {OVER_SEEDS}
    assert {value.of for value in base.scores.tasks.values()} == {OVER_QUESTIONS}
    first = base.scores.tasks["first"]
    assert (first.low, first.high) == pytest.approx((first.mean - 0.02, first.mean + 0.02))
    # The error of a mean over two tasks with 0.02 each.
    assert base.scores.average.high - base.scores.average.mean == pytest.approx(0.02 / 2**0.5)
    assert [run.seed for run in ours.runs] == [0, 1]
    assert set(ours.runs[0].log.losses) == {"", "first", "second"} and base.runs[0].log is None
    assert ours.runs[0].analysis.similarities.keys() and not lora.runs[0].analysis.similarities
    assert ours.against.label == "LoRA" and lora.against is None
    assert study.majority == pytest.approx({"first": 0.3, "second": 0.34})
    assert [row.group for row in study.transfer] == ["rank 8", "rank 8", "rank 4", "rank 4", "rank 2", "rank 2"]
    assert study.title("second") == "Second <&>"


def test_tasks_trained_alone_have_the_log_of_all_parts(study_file):
    folder = study_file()
    parts = {name: {"log": f"{name}.jsonl", "analysis": None} for name in TASKS}
    for name, part in parts.items():
        (folder / part["log"]).write_text(json.dumps({"step": 1, "loss": 2.0, f"loss/{name}": 2.0}) + "\n")
    value = json.loads((folder / "study.json").read_text())
    value["experiments"][1]["runs"][0] |= {"log": None, "parts": parts}
    (folder / "study.json").write_text(json.dumps(value))
    assert read_one(folder).experiments[1].runs[0].log.losses == {"": {}, "first": {1: 2.0}, "second": {1: 2.0}}


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ({"schema": 2}, "is no study of schema 1"),
        ({"kind": "table"}, "is no study of schema 1"),
        ({"name": ...}, "the key name is missing"),
        ({"task_set": {"tasks": []}}, "at least one task"),
        ({"task_set": {"tasks": [{"id": 0}]}}, "task_set"),
        ({"experiments": []}, "experiments is empty"),
        ({"experiments": [3]}, "must be a list of objects"),
        ({"experiments": [{"name": "x", "runs": []}]}, "the key experiments[0].summary is missing"),
        ({"transfer": [{"method": "x", "group": "y"}]}, "the key transfer[0].tasks is missing"),
        ({"notes": "one"}, "notes is 'one'; it must be a list of strings"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_broken_study_is_named_by_file_and_key(study_file, places, complaint):
    folder = study_file(**places)
    with pytest.raises(UserError) as error:
        read_one(folder)
    assert complaint in str(error.value) and str(folder / "study.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("train_log.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "line 2 is no log line"),
        ("train_log.jsonl", "[1]\n", "line 1 is no log line"),
        ("train_log.jsonl", '{"loss": 2.0}\n', "line 1 is no log line"),
        ("adapter_analysis.json", "[]", "is no analysis of schema 1"),
        ("adapter_analysis.json", '{"kind": "adapter_analysis", "schema": 1}', "the key tasks is missing"),
    ],
)
def test_a_broken_log_or_analysis_is_named_by_file_and_place(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        read_one(tmp_path)
    assert str(tmp_path / name) in str(error.value)


def test_an_analysis_with_matrices_of_another_size_is_refused(tmp_path, random):
    value = analysis(random, "mtl_lora", TASKS, blocks=1)
    for key, wrong in [
        ("update_similarity", [[1.0]]),
        ("update_similarity", [[1.0, "x"], [0.0, 1.0]]),
        ("mixture", {"layer": [[0.5, 0.5]]}),
        ("mixture", {"layer": [[0.5, 0.5], [1.0]]}),
        ("update_similarity_by_module", {"q_proj": 3}),
    ]:
        (tmp_path / "adapter_analysis.json").write_text(json.dumps({**value, key: wrong}))
        with pytest.raises(UserError, match=key):
            read_one(tmp_path)


def test_a_file_that_the_study_names_must_be_there(study_file):
    folder = study_file()
    (folder / "runs" / "lora" / "seed1" / "train_log.jsonl").unlink()
    with pytest.raises(UserError, match=r"experiments\[1\].runs\[1\].log names .*train_log.jsonl, which is not there"):
        read_one(folder)


def test_a_training_with_its_evaluation_is_one_experiment(tmp_path, random):
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "train_log.jsonl").write_text(log_text(random, 0.5, TASKS))
    (folder / "adapter_analysis.json").write_text(json.dumps(analysis(random, "mtl_lora", TASKS, blocks=1)))
    (folder / "evaluation" / "results.json").write_text(json.dumps(TUNED))
    study = read_one(folder)
    (experiment,) = study.experiments
    assert (experiment.name, experiment.scores.tasks["first"].mean) == ("mtl_lora", 0.75)
    assert experiment.runs[0].log and experiment.runs[0].analysis
    assert study.majority == {"first": 0.6, "second": 0.3}


def test_single_runs_stand_side_by_side_under_different_names(write):
    first, second = write(BASE, "a"), write(changed(BASE, tasks__first__accuracy=0.6), "b")
    (study,) = read_all([first, second / "results.json"])
    assert [experiment.name for experiment in study.experiments] == [f"base ({first})", f"base ({second})"]
    assert [experiment.scores.tasks["first"].mean for experiment in study.experiments] == [0.5, 0.6]


def test_runs_of_other_tasks_do_not_stand_side_by_side(write):
    other = changed(BASE, task_set={"tasks": [{"name": "first", "id": 0}]}, tasks__second=..., data={"first": "a"})
    with pytest.raises(UserError, match="side by side need one set of tasks"):
        read_all([write(BASE, "a"), write(other, "b")])


def test_a_folder_that_holds_nothing_says_what_it_could_hold(tmp_path):
    with pytest.raises(UserError, match=r"holds none of study\.json, results\.json, train_log\.jsonl"):
        read_one(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        read_one(tmp_path / "missing")
