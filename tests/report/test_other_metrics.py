"""Reports of tasks whose metrics are no means of right answers, as those of GLUE are."""

import csv
import io
import json

import numpy as np
import pytest
from report_cases import SETTINGS, assert_mistakes, grid, run_command, write_lines

from mtl_lora.errors import UserError
from mtl_lora.metrics import METRICS
from mtl_lora.report.compare import compare
from mtl_lora.report.figures import draw
from mtl_lora.report.load import load_run, load_studies
from mtl_lora.report.table import build_table, study_tables
from mtl_lora.results import Results, measure
from mtl_lora.study.summary import compared

LABELS = ["unacceptable", "acceptable"]
TASKS = [
    {"name": "sst2", "id": 0, "title": "SST-2", "labels": LABELS, "metric": "accuracy"},
    {"name": "cola", "id": 1, "title": "CoLA", "labels": LABELS, "metric": "matthews"},
    {"name": "mrpc", "id": 2, "title": "MRPC", "labels": LABELS, "metric": "accuracy_and_f1"},
    {"name": "stsb", "id": 3, "title": "STS-B", "regression": [0, 5], "metric": "pearson_and_spearman"},
]
N = 40


def lines_of(task: dict, noise: float) -> list[dict]:
    """Prediction lines that come near their answers, which are the same for every noise."""
    random = np.random.default_rng(task["id"])
    hidden = random.normal(size=N)
    given = hidden + noise * random.normal(size=N)
    lines = [{"task": task["name"], "index": index, "prompt_sha256": str(index)} for index in range(N)]
    for line, answer, parsed in zip(lines, hidden.tolist(), given.tolist(), strict=True):
        if "labels" in task:
            line |= {"answer": LABELS[int(answer > 0.3)], "parsed": LABELS[int(parsed > 0.3)]}
            line["correct"] = line["answer"] == line["parsed"]
        else:
            line |= {"answer": round(2 + answer), "parsed": parsed}
    return lines


@pytest.fixture
def runs(tmp_path):
    """The folders of two runs on four tasks."""
    folders = []
    for name, noise in (("a", 1.0), ("b", 0.5)):
        found = {task["name"]: lines_of(task, noise) for task in TASKS}
        folders.append(tmp_path / name)
        for task, lines in found.items():
            write_lines(folders[-1] / "predictions" / f"{task}.jsonl", lines)
        results = {
            "schema": 2,
            "system": "nlu",
            "name": name,
            "tasks": {t["name"]: measure(t["metric"], found[t["name"]], t.get("labels", ())).to_json() for t in TASKS},
            "task_set": {"tasks": TASKS},
            "settings": SETTINGS,
            "data": dict.fromkeys(found, "data"),
        }
        (folders[-1] / "results.json").write_text(json.dumps(results))
    return folders


def test_a_table_names_each_metric_and_shows_it_times_100(runs, capsys):
    rows = grid(run_command(capsys, "table", *runs)[1])
    assert rows["Method"][1:] == [
        *("SST-2", "CoLA (Matthews)", "MRPC (Accuracy and F1)", "STS-B (Pearson and Spearman)", "Average")
    ]
    tasks = Results.load(runs[0]).tasks
    assert rows["a"][1:5] == [f"{100 * task.value:.1f} ± {100 * task.stderr:.1f}" for task in tasks.values()]
    assert rows["a"][5].startswith(f"{25 * sum(task.value for task in tasks.values()):.1f} ± ")
    # Always one class has no correlation, and numbers have no classes.
    majority = rows["majority class"]
    assert majority[2] == "0.0" and majority[4:] == ["–", "–"]
    out = run_command(capsys, "table", *runs)[1]
    assert "Accuracy, Accuracy and F1 in percent; Matthews, Pearson and Spearman times 100;" in out
    _, first, _ = csv.DictReader(io.StringIO(run_command(capsys, "table", *runs, "--format", "csv")[1]))
    assert float(first["cola matthews"]) == tasks["cola"].value
    assert "STS-B (Pearson and Spearman)" in run_command(capsys, "table", *runs, "--format", "latex")[1]


@pytest.mark.parametrize("change", [{"metric": "accuracy"}, {"tokenizer": "simple"}])
def test_values_of_two_measures_do_not_stand_side_by_side(runs, change):
    path = runs[1] / "results.json"
    results = json.loads(path.read_text())
    results["tasks"]["cola"] |= change
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"a/results\.json measures cola by matthews and .*b/results\.json by "):
        build_table([Results.load(run) for run in runs], difference=True)
    with pytest.raises(UserError, match=r"measures cola by matthews and "):
        load_studies(runs)


def test_details_have_both_metrics_of_a_task_of_two(runs, capsys):
    rows, tasks = grid(run_command(capsys, "details", runs[0])[1]), Results.load(runs[0]).tasks
    assert rows["Task"] == [
        *("Questions", "Accuracy", "Matthews", "Accuracy and F1", "Binary F1"),
        *("Pearson and Spearman", "Pearson", "Spearman", "Majority class", "Answers given"),
    ]
    both = tasks["mrpc"].others
    assert rows["MRPC"][3].startswith(f"{50 * (both['accuracy'].value + both['binary_f1'].value):.1f} ± ")
    assert rows["MRPC"][1].startswith(f"{100 * both['accuracy'].value:.1f} ± ")
    assert rows["STS-B"][-2:] == ["–", ""] and rows["SST-2"][2:4] == ["–", "–"]


def test_runs_are_compared_by_each_tasks_own_metric(runs):
    value = compare(*map(Results.load, runs), resamples=500, seed=3).value
    differences, drawn = [], []
    for task in TASKS:
        row, (a, b) = value["tasks"][task["name"]], (lines_of(task, noise) for noise in (1.0, 0.5))
        metric, targets = METRICS[task["metric"]], [line["answer"] for line in a]
        sides = [metric.rows([line["parsed"] for line in side], targets, LABELS) for side in (a, b)]
        difference, resampled = metric.difference([sides], [3, *task["name"].encode()], 500)
        assert row["metric"] == task["metric"] and row["value"]["difference"] == pytest.approx(difference)
        assert [row["value"][key] for key in "ab"] == pytest.approx([metric.value_of(side) for side in sides])
        interval = [row["value"][key] for key in ("low", "high")]
        assert interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]).tolist())
        assert (row["p"] is None) == (task["name"] == "stsb")
        differences.append(difference)
        drawn.append(resampled)
    average = value["average"]
    assert average["value"]["difference"] == pytest.approx(np.mean(differences))
    assert average["value"]["low"] == pytest.approx(np.quantile(np.mean(drawn, axis=0), 0.025))
    assert average["only_a"] == sum(row["only_a"] or 0 for row in value["tasks"].values()) and average["n"] == 4 * N


@pytest.mark.slow(1)
def test_a_study_compares_them_over_its_seeds(runs):
    files = [(run / "results.json",) for run in runs]
    names = tuple(task["name"] for task in TASKS)
    found, again = compared((tuple(files),), names), compared((tuple(files), tuple(files)), names)
    expected = compare(*map(Results.load, runs)).value
    for change, row in (
        *zip(found["tasks"].values(), expected["tasks"].values(), strict=True),
        (found["average"], expected["average"]),
    ):
        assert vars(change) == pytest.approx({key: row["value"][key] for key in ("difference", "low", "high")})
    assert again["average"].low == pytest.approx(found["average"].low)  # two equal pairs say nothing new


def test_a_comparison_shows_metrics_and_no_p_of_numbers(runs, capsys):
    rows = grid(run_command(capsys, "compare", *runs)[1])
    assert rows["STS-B (Pearson and Spearman)"][5:] == ["–", "–", "–"] and rows["CoLA (Matthews)"][0] == "40"
    assert len(rows["Task"]) == 8


def test_predictions_that_are_not_those_that_are_counted_are_refused(runs, capsys, edit_json):
    for task, key, wrong, fact in [
        ("stsb", "parsed", "2.5", "parsed is '2.5'"),
        ("stsb", "answer", True, "answer is True"),
        ("stsb", "parsed", float("nan"), "parsed is nan"),
        ("cola", "parsed", 1, "parsed is 1"),
        ("mrpc", "parsed", None, "parsed is None"),
        ("stsb", "parsed", 100.0, "Pearson and Spearman 0."),
    ]:
        path, lines = (
            runs[1] / "predictions" / f"{task}.jsonl",
            lines_of(TASKS[[t["name"] for t in TASKS].index(task)], 0.5),
        )
        whole = path.read_text()
        lines[2][key] = wrong
        write_lines(path, lines)
        assert_mistakes(capsys, "compare", [([*runs], fact), ([*runs], str(path))])
        path.write_text(whole)
    for labels, fact in (
        ([*LABELS, "third"], "mrpc: Accuracy and F1 needs two labels"),
        (5, "labels is 5"),
        ([5], "labels[0] is 5"),
    ):
        tasks = [task | {"labels": labels} if task["name"] == "mrpc" else task for task in TASKS]
        for run in runs:
            edit_json(run / "results.json", task_set={"tasks": tasks})
        assert_mistakes(
            capsys, "compare", [([*runs, "--tasks", "mrpc"], fact), ([*runs], str(runs[0] / "results.json"))]
        )
    for run in runs:
        edit_json(run / "results.json", task_set={"tasks": TASKS})
    edit_json(runs[1] / "results.json", tasks={"cola": measure("accuracy", lines_of(TASKS[1], 0.5)).to_json()})
    assert_mistakes(capsys, "compare", [([*runs], "cola by matthews and accuracy")])


def test_a_figure_and_a_studys_table_say_the_metric_of_each_task(runs):
    study = load_run(runs[0])
    (drawing,), (table, *_) = draw(study), study_tables(study)
    headings = ["SST-2", "CoLA (Matthews)", "MRPC (Accuracy and F1)", "STS-B (Pearson and Spearman)", "Average"]
    assert table.header[-5:] == headings and table.rows[0][-2:] == ["–", "–"]
    titles = [panel.get_title() for panel in drawing.figure.axes]
    assert titles[:3] == ["SST-2", "CoLA\n(Matthews)", "MRPC\n(Accuracy and F1)"] and drawing.title == "Results"
    assert "Matthews, Pearson and Spearman times 100" in drawing.caption


def test_delta_m_is_relative_to_single_task_results(tmp_path, capsys):
    # Published values of MTLoRA with rank 64 and of single-task models on PASCAL-Context.
    metrics = {"semseg": "miou", "parts": "miou", "sal": "saliency_miou", "normals": "mean_angle"}
    values = {"semseg": 0.6790, "parts": 0.5984, "sal": 0.6540, "normals": 16.60}
    single = {"semseg": 0.6721, "parts": 0.6193, "sal": 0.6235, "normals": 17.97}
    tasks = [{"name": name, "id": index} for index, name in enumerate(metrics)]

    def write(name, found, **changes):
        found = {task: {"metric": metrics[task], "value": value, "stderr": 0.01, "n": 9} for task, value in found}
        results = {"schema": 2, "name": name, "tasks": found, "data": dict.fromkeys(metrics, "data")}
        results |= {"task_set": {"tasks": [task for task in tasks if task["name"] in found]}} | changes
        path = tmp_path / name / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(results))
        return path

    together = write("mtlora", values.items())
    alone = [str(write(f"{name} alone", [(name, value)])) for name, value in single.items()]
    out = run_command(capsys, "table", together, "--baselines", ",".join(alone))[1]
    rows = grid(out)
    assert rows["Method"][-1] == "Delta_m, %" and rows["mtlora"][-1] == "+2.54"
    assert "lower is better" in out and "normals normals alone" in out
    (record,) = csv.DictReader(
        io.StringIO(run_command(capsys, "table", together, "--baselines", ",".join(alone), "--format", "csv")[1])
    )
    assert float(record["delta_m"]) == pytest.approx(2.54185, abs=1e-5)
    part = write("part", [pair for pair in values.items() if pair[0] != "sal"], task_set={"tasks": tasks})
    rows = grid(run_command(capsys, "table", together, part, "--baselines", ",".join(alone))[1])
    assert (rows["mtlora"][-1], rows["part"][-1]) == ("+2.54", "–")
    other = write("other", [("normals", 17.97)], data={"normals": "another"})
    assert (
        "not on the test data of every row: normals"
        in run_command(capsys, "table", together, "--baselines", ",".join([*alone[:3], str(other)]))[1]
    )
    fewer = write("fewer", [("normals", 17.97)], settings={"dtype": "float32"})
    value = json.loads(fewer.read_text())
    value["tasks"]["normals"]["n"] = 3  # the same test set, of which fewer were asked
    fewer.write_text(json.dumps(value))
    assert (
        "not on the test data of every row: normals"
        in run_command(capsys, "table", together, "--baselines", ",".join([*alone[:3], str(fewer)]))[1]
    )
    rmse = {"normals": {"metric": "rmse", "value": 17.97, "stderr": 0.01, "n": 9}}
    mistakes = [
        (alone[:3], "no result of normals"),
        ([*alone, alone[0]], "semseg, as another of --baselines"),
        ([*alone[:3], str(write("rmse", [("normals", 0)], tasks=rmse))], "measures normals by mean_angle and"),
        ([*alone[:3], str(write("zero", [("normals", 0)]))], "needs baselines above 0"),
    ]
    mistakes = [([together, "--baselines", ",".join(given)], fact) for given, fact in mistakes]
    over_a_baseline = [together, "--baselines", ",".join(alone), "--output", alone[0]]
    mistakes.append((over_a_baseline, "would be lost"))
    # A metric of a later version: nothing says whether more of it is better.
    later = {"normals": {"metric": "ndcg", "value": 0.5, "stderr": 0.01, "n": 9}}
    ours, theirs = (str(write(name, [("normals", 0)], tasks=later)) for name in ("ours", "theirs"))
    mistakes.append(([ours, "--baselines", theirs], "not ndcg of normals"))
    assert_mistakes(capsys, "table", mistakes)
