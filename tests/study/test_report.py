"""study.json and table.md of finished runs: summaries, comparisons, transfer, search, and what can be shared."""

import json
from pathlib import Path

import pytest
from study_cases import ALONE, SEARCH, dev_set, finish, grid, planner

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.study import table
from mtl_lora.study.collect import collect
from mtl_lora.study.record import FILE_NAME, record
from mtl_lora.study.search import choose, outcome

TWO = {"evaluate": {**grid()["evaluate"], "tasks": ["boolq", "piqa"]}}
RIGHT = {
    # by experiment and seed
    ("Base", None): {"boolq": "0010", "piqa": "1000"},
    ("LoRA", 0): {"boolq": "1100", "piqa": "1000"},
    ("LoRA", 1): {"boolq": "1110", "piqa": "1100"},
    ("MTL-LoRA", 0): {"boolq": "1111", "piqa": "1100"},
    ("MTL-LoRA", 1): {"boolq": "1110", "piqa": "1110"},
}


def finished(made, right) -> list:
    """The runs of a planner's study with their folders filled; those of several jobs a task each."""
    runs = []
    for (name, seed), by_task in right.items():
        run = made.run(made.study.experiment(name), seed)
        for job in run.jobs:
            finish(job, {job.folder.name: by_task[job.folder.name]} if run.experiment.alone else by_task)
        runs.append(run)
    return runs


@pytest.fixture
def study(tmp_path):
    """What study.json holds of a study of two tasks and two seeds."""
    made = planner(tmp_path, grid(**TWO))
    return record(made, finished(made, RIGHT), [])


def by_name(study: dict) -> dict[str, dict]:
    return {experiment["name"]: experiment for experiment in study["experiments"]}


def test_every_run_says_what_it_scored_and_where_that_comes_from(study, tmp_path):
    run = by_name(study)["MTL-LoRA"]["runs"][1]
    assert (run["seed"], run["average"], run["steps"], run["commit"]) == (1, 0.75, 3, "abc")
    assert run["tasks"]["piqa"] == {
        "accuracy": 0.75,
        "stderr": pytest.approx(0.2165, abs=1e-4),
        "n": 4,
        "majority": 0.5,
    }
    assert run["seconds"] == {"train": 10.0, "evaluate": 10.0}
    for key in ("results", "log"):
        assert (tmp_path / "study" / run[key]).is_file()
    assert run["analysis"] is None and run["folder"] == "runs/mtl_lora/seed1"
    assert run["adapter_sha256"] == "weights in seed1" and len(run["train_data_sha256"]) == 64
    assert [command.split()[1] for command in run["commands"]] == ["finetune.py", "commonsense_evaluate.py"]


def test_summary_is_over_seeds_and_the_base_model_has_one_run(study):
    found = by_name(study)
    average = found["MTL-LoRA"]["summary"]["average"]
    assert average["mean"] == pytest.approx(0.75) and average["sd"] == pytest.approx(0)
    assert found["MTL-LoRA"]["summary"]["tasks"]["boolq"]["mean"] == pytest.approx(0.875)
    base = found["Base"]
    assert base["summary"]["average"] == {"mean": 0.25, "sd": None, "low": None, "high": None}
    assert (base["method"], base["rank"], base["trained_on"], base["trainable"]) == (None, None, None, None)
    assert (found["LoRA"]["method"], found["LoRA"]["rank"], found["LoRA"]["group"]) == ("lora", 4, "main")
    assert found["MTL-LoRA"]["learning_rate"] == 0.01


def test_comparison_is_with_the_baseline_over_common_seeds(study):
    found = by_name(study)
    assert found["LoRA"]["against"] is None
    against = found["MTL-LoRA"]["against"]
    assert against["baseline"] == "LoRA"
    assert against["tasks"]["boolq"]["difference"] == pytest.approx(0.25)
    assert against["average"]["difference"] == pytest.approx(0.25)
    assert found["Base"]["against"]["average"]["difference"] == pytest.approx(-0.25)


def test_experiments_without_a_finished_run_are_left_out_and_named(tmp_path):
    made = planner(tmp_path, grid(**TWO))
    some = {key: right for key, right in RIGHT.items() if key not in (("MTL-LoRA", 0), ("MTL-LoRA", 1), ("LoRA", 1))}
    value = record(made, finished(made, some), [])
    assert list(by_name(value)) == ["Base", "LoRA"]
    assert "Not all runs are finished: LoRA 1 of 2, MTL-LoRA 0 of 2." in value["notes"]
    assert record(made, [], []) is None


def test_tasks_trained_alone_are_one_run_and_give_the_transfer(tmp_path):
    made = planner(tmp_path, grid(ALONE, **TWO))
    right = {**RIGHT, ("Alone", 0): {"boolq": "1000", "piqa": "1110"}, ("Alone", 1): {"boolq": "1000", "piqa": "1111"}}
    value = record(made, finished(made, right), [])
    alone = by_name(value)["Alone"]
    assert (alone["adapters"], alone["alone"], alone["trained_on"]) == (2, True, ["boolq", "piqa"])
    run = alone["runs"][0]
    assert (run["average"], run["steps"], run["log"], run["adapter_sha256"]) == (0.5, 6, None, None)
    assert run["parts"]["piqa"]["log"] == "runs/alone/seed0/piqa/train_log.jsonl"
    assert run["seconds"]["train"] == 20.0 and len(run["commands"]) == 4
    merged = files.read_json(tmp_path / "study" / run["results"], "results")
    assert list(merged["tasks"]) == ["boolq", "piqa"] and merged["average"]["accuracy"] == 0.5
    rows = {row["experiment"]: row for row in value["transfer"]}
    assert list(rows) == ["LoRA", "MTL-LoRA"]
    # LoRA together 0.625 and 0.375 minus alone 0.25 and 0.875.
    assert rows["LoRA"]["tasks"]["boolq"]["difference"] == pytest.approx(0.375)
    assert rows["LoRA"]["tasks"]["piqa"]["difference"] == pytest.approx(-0.5)
    assert rows["MTL-LoRA"]["method"] == "MTL-LoRA" and rows["MTL-LoRA"]["group"] == "main"
    assert "| LoRA - Alone " in table.render(value)


def test_table_has_a_row_a_method_with_its_spread_over_seeds(study):
    lines = table.render(study).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    assert cells[0] == [
        *("Method", "Trained weights, M (%)", "Rank", "Learning rate", "BoolQ", "PIQA", "Average", "95 % interval")
    ]
    assert cells[2] == ["always the most frequent answer", *"–––", "50.0", "50.0", "50.0", "–"]
    assert cells[3] == ["Base", *"–––", "25.0", "25.0", "25.0", "–"]
    # Averages 37.5 and 62.5: sd 17.68, half an interval 12.706 * 17.68 / sqrt 2.
    assert cells[4][:4] == ["LoRA", "0.0010 (2.00 %)", "4", "0.0003"]
    assert cells[4][4:] == ["62.5 ± 17.7", "37.5 ± 17.7", "50.0 ± 17.7", "-108.8 to 208.8"]
    difference = next(line for line in cells if line[0] == "MTL-LoRA - LoRA")
    assert difference[1].startswith("+25.0 (") and len(difference) == 4
    assert "- Test questions: a fixed sample (seed 0) of 4 questions of each task (boolq of 60, piqa of 60)." in lines
    assert any(line.startswith("- Trained on a fixed sample (seed 0) of 12 records of each task") for line in lines)


def test_table_of_one_seed_has_standard_errors_and_says_so(tmp_path):
    made = planner(tmp_path, grid(**TWO, seeds=[0]))
    value = record(made, finished(made, {key: right for key, right in RIGHT.items() if key[1] != 1}), [])
    text = table.render(value)
    assert "95 % interval |" not in text and "one seed; ± is one standard error over the questions" in text
    row = next(line for line in text.splitlines() if line.startswith("| LoRA "))
    assert "50.0 ± 25.0" in row


# ---- search ----


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0.1: 0.5, 0.2: 0.6}, 0.2),
        ({0.2: 0.6, 0.1: 0.6}, 0.1),
        ({0.1: 0.6, 0.2: 0.6, 0.3: 0.1}, 0.1),
    ],
)
def test_best_value_wins_and_of_equals_the_smaller(scores, best):
    assert choose(scores) == best


def test_search_is_told_with_every_candidate(tmp_path):
    made = planner(tmp_path, grid(**TWO, search={**SEARCH, "data_dir": dev_set(tmp_path)}))
    candidates = made.candidates(made.study.experiment("LoRA"))
    for run, right in zip(candidates, ("1000", "1110"), strict=True):
        finish(run.jobs[0], {"boolq": right, "piqa": "1100"})
    found = outcome(made, "LoRA", candidates)
    assert [(entry["value"], entry["dev"]) for entry in found["candidates"]] == [(0.01, 0.375), (0.001, 0.625)]
    value = record(made, finished(made, RIGHT), [found])
    assert value["search"]["experiments"][0]["chosen"] == 0.001 and value["search"]["flag"] == "learning_rate"
    assert value["search"]["questions"] == {"boolq": 2, "piqa": 2}
    assert "| LoRA        | 37.5 | **62.5** |" in table.render(value)


# ---- collecting ----


def collected(tmp_path) -> Path:
    """The shared folder of a study that was written out."""
    made = planner(tmp_path, grid(ALONE, **TWO))
    right = {**RIGHT, ("Alone", 0): {"boolq": "1000", "piqa": "1110"}}
    runs = finished(made, right)
    (runs[1].folder / "adapter_analysis.json").write_text("{}")
    value = record(made, runs, [])
    files.write_json(tmp_path / "study" / FILE_NAME, value)
    files.write_text(tmp_path / "study" / table.FILE_NAME, table.render(value))
    collect(tmp_path / "study", tmp_path / "shared")
    return tmp_path / "shared"


def test_shared_folder_has_every_figure_and_no_weights_predictions_data_or_paths(tmp_path):
    shared = collected(tmp_path)
    names = {path.name for path in shared.rglob("*") if path.is_file()}
    assert names == {"study.json", "table.md", "results.json", "train_log.jsonl", "adapter_analysis.json"}
    for path in shared.rglob("*.json*"):
        assert str(tmp_path) not in path.read_text(), path
    value = json.loads((shared / "study.json").read_text())
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            for part in (run, *run.get("parts", {}).values()):
                assert all((shared / part[key]).is_file() for key in ("results", "log", "analysis") if part[key])
    assert value["experiments"][1]["runs"][0]["analysis"] == "runs/lora/seed0/adapter_analysis.json"
    assert "--output_dir output/study/small/runs/lora/seed0" in value["experiments"][1]["runs"][0]["commands"][0]
    assert table.render(value) == (shared / "table.md").read_text()


def test_shared_folder_of_another_study_is_refused(tmp_path):
    shared = collected(tmp_path)
    collect(tmp_path / "study", shared)
    with pytest.raises(UserError, match="is the study's own folder"):
        collect(tmp_path / "study", tmp_path / "study")
    value = json.loads((shared / "study.json").read_text())
    files.write_json(shared / "study.json", {**value, "name": "other"})
    with pytest.raises(UserError, match="holds the study 'other'; name another folder"):
        collect(tmp_path / "study", shared)
