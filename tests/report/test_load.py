"""A study's file is read key by key; a folder of one run is a study of one experiment."""

import json

import pytest
from report_cases import BASE, TUNED, TUNED_SCHEMA_1, changed
from synthetic_study import analysis, log_text, write_study

from mtl_lora.errors import UserError
from mtl_lora.estimates import Estimate
from mtl_lora.report.load import Study, Transfer, analysis_of, load_run, load_studies, log_of
from mtl_lora.train_log import last_step

TASKS = {"first": "First", "second": "Second <&>"}


@pytest.fixture
def study_file(tmp_path):
    """A small study that a test may spoil; ``study_file(place__in__it=value)`` returns its folder."""

    def write(**places):
        write_study(tmp_path, TASKS, {"lora": "LoRA", "mtl_lora": "MTL-LoRA"}, blocks=1)
        path = tmp_path / "study.json"
        path.write_text(json.dumps(changed(json.loads(path.read_text()), **places)))
        return tmp_path

    return write


def as_schema_1(value: dict) -> dict:
    """A study as version 0.1.0 wrote it, whose results by task have an accuracy."""
    value = json.loads(json.dumps(value)) | {"schema": 1}
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            keys = ("stderr", "n", "majority")
            run["tasks"] = {
                name: {"accuracy": result["value"], **{key: result[key] for key in keys}}
                for name, result in run["tasks"].items()
            }
    return value


def test_both_schemas_of_a_study_are_the_same_and_schema_2_is_written(study_file):
    folder = study_file()
    study = Study.load(folder)
    value = json.loads((folder / "study.json").read_text())
    assert study.to_json() == value and value["schema"] == 2
    (folder / "study.json").write_text(json.dumps(as_schema_1(value)))
    assert Study.load(folder / "study.json") == study


def test_experiments_have_their_scores_intervals_logs_and_analyses(study_file):
    study = Study.load(study_file())
    base, lora, ours = study.experiments
    assert [base.method, lora.method, ours.method] == [None, "lora", "mtl_lora"]
    # Over seeds the t interval; of the one run the standard error of its questions, of a mean over two tasks too.
    first, whole = base.estimate("first"), base.estimate(None)
    assert ours.estimate("first").sd is not None and first.sd is None
    assert (first.low, first.high) == pytest.approx((first.mean - 0.02, first.mean + 0.02))
    assert whole.high - whole.mean == pytest.approx(0.02 / 2**0.5)
    log = log_of(study, ours.runs[0])
    assert set(log) == {"", "first", "second"} and log_of(study, base.runs[0]) is None
    assert analysis_of(study, ours.runs[0]).similarities and not analysis_of(study, lora.runs[0]).similarities
    assert ours.against.baseline == "LoRA" and lora.against is None
    assert study.majority == pytest.approx({"first": 0.3, "second": 0.34, None: 0.32})
    assert (study.has_seeds, study.metric(None)) == (True, "accuracy")


def test_estimates_over_seeds_are_those_of_student():
    # 0.1 apart: sd 0.1, t(0.975, 2) = 4.302653.
    estimate = Estimate.over_seeds([0.5, 0.6, 0.7])
    assert (estimate.mean, estimate.sd) == pytest.approx((0.6, 0.1))
    assert estimate.high - estimate.mean == pytest.approx(4.3026527 * 0.1 / 3**0.5)
    assert Estimate.over_seeds([0.5]) == Estimate(0.5)


def test_tasks_trained_alone_have_the_log_of_all_parts(study_file):
    folder = study_file()
    for name in TASKS:
        (folder / f"{name}.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, f"loss/{name}": 2.0}) + "\n")
    value = json.loads((folder / "study.json").read_text())
    value["experiments"][1]["runs"][0] |= {"log": None, "parts": {name: {"log": f"{name}.jsonl"} for name in TASKS}}
    (folder / "study.json").write_text(json.dumps(value))
    study = Study.load(folder)
    assert log_of(study, study.experiments[1].runs[0]) == {"": {}, "first": {1: 2.0}, "second": {1: 2.0}}
    assert sum(len(run.jobs) for run in study.runs) == len(study.runs) + 2


@pytest.mark.parametrize(
    ("places", "fact"),
    [
        ({"schema": 3}, "schema"),
        ({"kind": "table"}, "study"),
        ({"name": ...}, "name"),
        ({"task_set": {"tasks": []}}, "task_set.tasks"),
        ({"task_set": {"tasks": [{"id": 0}]}}, "task_set.tasks[0].name"),
        ({"experiments": []}, "experiments"),
        ({"experiments": [3]}, "experiments[0]"),
        ({"experiments": [{"name": "x", "runs": []}]}, "experiments[0].summary"),
        ({"transfer": [{"method": "x", "group": "y"}]}, "transfer[0].tasks"),
        ({"notes": "one"}, "notes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_broken_study_is_named_by_file_and_key(study_file, places, fact):
    folder = study_file(**places)
    with pytest.raises(UserError) as error:
        Study.load(folder)
    assert fact in str(error.value) and str(folder / "study.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("train_log.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "line 2"),
        ("train_log.jsonl", "[1]\n", "line 1"),
        ("train_log.jsonl", '{"loss": 2.0}\n', "line 1"),
        ("adapter_analysis.json", "[]", "object"),
        ("adapter_analysis.json", "{}", "schema 1"),
        ("adapter_analysis.json", '{"kind": "adapter_analysis", "schema": 1, "method": "lora"}', "tasks"),
    ],
)
def test_a_broken_log_or_analysis_is_named_by_file_and_place(tmp_path, name, text, fact):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=fact) as error:
        load_run(tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]\n", '{"step": 1}\n{"st'])
def test_a_log_without_a_last_step_is_named(tmp_path, text):
    (tmp_path / "train_log.jsonl").write_text(text)
    with pytest.raises(UserError, match="does not end with a log line"):
        last_step(tmp_path / "train_log.jsonl")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("update_similarity", [[1.0]]),
        ("update_similarity", [[1.0, "x"], [0.0, 1.0]]),
        ("mixture", {"layer": [[0.5, 0.5]]}),
        ("mixture", {"layer": [[0.5, 0.5], [1.0]]}),
        ("update_similarity_by_module", {"q_proj": 3}),
        ("mixture_at_start", {"layer": [[0.5, 0.5], [0.5, 0.5]]}),
    ],
)
def test_an_analysis_with_matrices_of_another_size_is_refused(tmp_path, random, key, wrong):
    value = analysis(random, "mtl_lora", TASKS, blocks=1)
    (tmp_path / "adapter_analysis.json").write_text(json.dumps({**value, key: wrong}))
    with pytest.raises(UserError, match=key):
        load_run(tmp_path)


def test_the_group_of_an_experiment_is_named_unless_its_name_holds_it():
    names = ("LoRA rank 1", "LoRA rank 16")
    labels = [Transfer(method=name, group="rank 1", alone="LoRA alone", tasks={}).label for name in names]
    assert labels == ["LoRA rank 1", "rank 1: LoRA rank 16"]


def test_a_file_that_the_study_names_must_be_there(study_file):
    folder = study_file()
    (folder / "runs" / "lora" / "seed1" / "train_log.jsonl").unlink()
    study = Study.load(folder)
    with pytest.raises(UserError, match=r"runs/lora/seed1/train_log\.jsonl"):
        log_of(study, study.experiments[1].runs[1])


@pytest.mark.parametrize("results", [TUNED, TUNED_SCHEMA_1], ids=["schema 2", "schema 1"])
def test_a_training_with_its_evaluation_is_one_experiment(tmp_path, random, results):
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "train_log.jsonl").write_text(log_text(random, TASKS))
    (folder / "adapter_analysis.json").write_text(json.dumps(analysis(random, "mtl_lora", TASKS, blocks=1)))
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    study = load_run(folder)
    (experiment,) = study.experiments
    assert (experiment.name, experiment.method, experiment.estimate("first").mean) == ("mtl_lora", "mtl_lora", 0.75)
    assert log_of(study, experiment.runs[0]) and analysis_of(study, experiment.runs[0])
    assert study.majority == pytest.approx({"first": 0.6, "second": 0.3, None: 0.45})


@pytest.mark.parametrize("same", [True, False])
def test_evaluation_of_an_earlier_adapter_is_not_shown_as_this_ones(write, tmp_path, capsys, same):
    write(changed(TUNED, settings={"adapter_sha256": "d" * 64}), "evaluation")
    (tmp_path / "mtl_lora_config.json").write_text(json.dumps({"weights_sha256": ("d" if same else "0") * 64}))
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0, "loss/first": 2.0, "loss/second": 2.0}\n')
    assert bool(load_run(tmp_path).scored) == same
    assert (str(tmp_path / "evaluation") in capsys.readouterr().err) == (not same)


def test_single_runs_stand_side_by_side_under_different_names(write):
    first, second = write(BASE, "a"), write(changed(BASE, tasks__first__value=0.6), "b")
    (study,) = load_studies([first, second / "results.json"])
    assert [experiment.name for experiment in study.experiments] == [f"base ({first})", f"base ({second})"]
    assert [experiment.estimate("first").mean for experiment in study.experiments] == [0.5, 0.6]


def test_a_results_file_is_that_evaluation_alone(write, tmp_path):
    write(BASE, "run"), write({**TUNED, "mode": "score"}, "run/evaluation")
    assert [each.name for each in load_run(tmp_path / "run" / "results.json").experiments] == ["base"]
    assert len(load_run(tmp_path / "run").experiments) == 2


def test_runs_of_other_tasks_do_not_stand_side_by_side(write):
    other = changed(BASE, task_set={"tasks": [{"name": "first", "id": 0}]}, tasks__second=..., data={"first": "a"})
    with pytest.raises(UserError, match="first, second"):
        load_studies([write(BASE, "a"), write(other, "b")])


def test_a_folder_that_holds_nothing_says_what_it_could_hold(tmp_path):
    with pytest.raises(UserError, match=r"study\.json, results\.json, train_log\.jsonl"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="missing"):
        load_run(tmp_path / "missing")


def test_averages_over_other_tasks_do_not_stand_side_by_side(write):
    part = changed(BASE, tasks__second=..., data={"first": "aaaa"})
    (study,) = load_studies([write(BASE, "a"), write(part, "b")])
    assert [each.estimate(None) is not None for each in study.experiments] == [True, False]
    assert [each.estimate("first").mean for each in study.experiments] == [0.5, 0.5]
