"""Figures show the numbers they are given, whole and legible, and are the same bytes every time."""

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from report_cases import TUNED, assert_mistakes, changed, run_command
from synthetic_study import analysis, log_text, write_study

from mtl_lora.estimates import Difference, Estimate
from mtl_lora.report.figures import COLOURS, FORMATS, LINES, MARKERS, _numbered, draw, look, write_figures
from mtl_lora.report.load import Study, Summary, Transfer, analysis_of, load_studies, log_of

OF_A_STUDY = ["accuracy", "transfer", "training_loss", "mixture_mtl_lora", "similarity_mtl_lora"]
TASKS = {"cr": "CR", "sst5": "SST-5"}
LONG = {f"task_{index}": f"A task with a long name, {index}" for index in range(13)}


@pytest.fixture(scope="module")
def study(study_folder):
    return Study.load(study_folder)


@pytest.fixture(scope="module")
def drawings(study):
    """By name, a study's figures."""
    return {drawing.name: drawing for drawing in draw(study)}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """By name, the figures of a study whose names are long and whose tasks are many."""
    methods = {"lora": "LoRA of a rank that is equal in weights", "mtl_lora": "MTL-LoRA"}
    folder = write_study(tmp_path_factory.mktemp("crowded"), LONG, methods, seeds=(0,), blocks=3)
    return {drawing.name: drawing for drawing in draw(Study.load(folder))}


def panels_of(drawing) -> dict:
    return {panel.get_title(): panel for panel in drawing.figure.axes if panel.get_title()}


def texts(panel) -> list[str]:
    return [text.get_text() for text in panel.texts]


# ---- which there are, and as what files ----


@pytest.mark.slow(1)
def test_a_study_has_a_figure_of_everything_that_it_holds(drawings):
    assert list(drawings) == OF_A_STUDY


@pytest.mark.slow
def test_a_training_and_an_evaluation_are_drawn_from_what_they_hold(write, tmp_path, random, capsys):
    run = tmp_path / "training"
    run.mkdir()
    (run / "train_log.jsonl").write_text(log_text(random, TASKS))
    (run / "adapter_analysis.json").write_text(json.dumps(analysis(random, "lora", TASKS, blocks=1)))
    evaluation = write(TUNED)
    assert run_command(capsys, "figures", run, "--format", "png")[:2] == (0, f"{run / 'figures/training_loss.png'}\n")
    assert run_command(capsys, "figures", evaluation / "results.json", "--format", "png")[0] == 0
    assert [path.name for path in (evaluation / "figures").iterdir()] == ["accuracy.png"]


@pytest.mark.slow(1)
def test_two_studies_and_runs_have_different_names(write, tmp_path, capsys):
    """A study that was collected has no logs and analyses: accuracy and transfer are left."""
    folders = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        folder = write_study(tmp_path / name, TASKS, {"lora": "LoRA"}, seeds=(0,))
        value = json.loads((folder / "study.json").read_text())
        for experiment in value["experiments"]:
            experiment["runs"] = [run | {"log": None, "analysis": None} for run in experiment["runs"]]
        (folder / "study.json").write_text(json.dumps(value | {"name": name, "transfer": None}))
        folders.append(folder)
    output = tmp_path / "figures"
    run = write(TUNED, "tuned")
    code, out, _ = run_command(capsys, "figures", *folders, run, "--output", output, "--format", "svg")
    assert code == 0
    names = ["one_accuracy", "other_accuracy", "mtl_lora_accuracy"]
    assert out.splitlines() == [str(output / f"{name}.svg") for name in names]


@pytest.mark.slow(1)
def test_figures_that_are_shared_are_without_those_of_adapters(study_folder, tmp_path):
    found = write_figures([str(study_folder)], str(tmp_path / "figures"), ["png"], analyses=False)
    assert [path.stem for path in found] == OF_A_STUDY[:3]


def test_a_figure_of_runs_says_where_their_questions_differ(write):
    same = [write(TUNED, "one"), write(TUNED, "other")]
    fewer = write(TUNED, "fewer")
    value = json.loads((fewer / "results.json").read_text())
    for task in value["tasks"].values():
        task["n"] += 1
    (fewer / "results.json").write_text(json.dumps(value))
    beams = [write(changed(TUNED, settings={"mode": "score", "num_beams": beams}), f"beams{beams}") for beams in (1, 4)]
    for folders, said in ((same, False), ([same[0], fewer], True), (beams, True)):
        (study,) = load_studies(folders)
        (drawing,) = draw(study)
        assert ("The runs differ in their questions" in drawing.caption) == said


def test_a_name_with_a_number_is_not_given_twice():
    assert _numbered(["glue", "glue_2", "glue", "glue"]) == ["glue", "glue_2", "glue_3", "glue_4"]


@pytest.mark.slow(1)
def test_studies_of_one_name_do_not_replace_each_others_figures(tmp_path, capsys):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    folders = [write_study(tmp_path / name, TASKS, {"lora": "LoRA"}, seeds=(0,)) for name in ("here", "there")]
    code, out, _ = run_command(capsys, "figures", *folders, "--output", tmp_path / "figures", "--format", "svg")
    assert code == 0 and len({*out.splitlines()}) == len(out.splitlines())
    accuracy = sorted(line.rpartition("/")[2] for line in out.splitlines() if "accuracy" in line)
    assert len(accuracy) == 2 and accuracy[0] != accuracy[1]


def test_every_mistake_ends_in_one_sentence(write, tmp_path, random, capsys, monkeypatch):
    evaluation, lora = write(TUNED), tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_analysis.json").write_text(json.dumps(analysis(random, "lora", TASKS, blocks=1)))
    (tmp_path / "file").write_text("")
    mistakes = [
        ([], "runs"),
        ([tmp_path / "missing"], "missing"),
        ([tmp_path], "study.json"),
        ([lora], str(lora)),
        ([evaluation, evaluation], "--output"),
        ([evaluation, "--format", "pdf"], "pdf"),
        ([evaluation, "--format", "svg,"], "svg"),
        ([evaluation, "--format", "svg", "--output", tmp_path / "file"], str(tmp_path / "file")),
    ]
    assert_mistakes(capsys, "figures", mistakes)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "[report]" in run_command(capsys, "figures", evaluation)[2]
    assert not (evaluation / "figures").exists()


@pytest.mark.slow(1)
def test_a_figure_is_the_same_bytes_whatever_the_day_and_the_users_settings(study, monkeypatch):
    base = study.experiments[0]
    base = dataclasses.replace(base, summary=Summary({"cr": base.summary.tasks["cr"]}))
    single = dataclasses.replace(study, transfer=[], experiments=[base])
    first = [draw(single)[0].render(style) for style in FORMATS]
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 23)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert [draw(single)[0].render(style) for style in FORMATS] == first
    assert matplotlib.rcParams["font.size"] == 23


# ---- legible ----


@pytest.mark.slow
def test_nothing_is_cut_off_and_no_labels_lie_on_each_other(drawings, crowded):
    # The figures of few tasks have more room than the crowded ones, but for those with numbers in their cells.
    few = ("transfer", "similarity_mtl_lora")
    found = {name: crowded[name] for name in ("accuracy", "training_loss", "mixture_mtl_lora", "similarity_mtl_lora")}
    for name, drawing in [*((name, drawings[name]) for name in few), *found.items()]:
        figure = drawing.figure
        figure.draw_without_rendering()
        box, whole = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 >= -0.02 and box.y0 >= -0.02, name
        assert box.x1 <= whole.width + 0.02 and box.y1 <= whole.height + 0.02, name
        for panel in figure.axes:
            labels = [label for label in panel.get_yticklabels() if label.get_text() and label.get_visible()]
            boxes = [label.get_window_extent().padded(-0.5) for label in labels]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2)), name
        blocks = [block.get_window_extent() for block in (*figure.legends, figure._suptitle, figure._supxlabel)]
        for panel in (panel.get_tightbbox() for panel in figure.axes):
            assert not any(panel.overlaps(block) for block in blocks), name


def test_what_is_compared_differs_in_more_than_colour():
    looks = [look(index) for index in range(len(COLOURS))]
    for key in ("color", "marker", "linestyle"):
        assert len({str(entry[key]) for entry in looks}) == len(COLOURS) == len(MARKERS) == len(LINES)
    more = [look(index) for index in range(3 * len(COLOURS))]
    assert len({(entry["color"], entry["marker"]) for entry in more}) == len(more)
    luminances = [np.dot(matplotlib.colors.to_rgb(colour), [0.2126, 0.7152, 0.0722]) for colour in COLOURS]
    assert max(luminances) < 0.7  # none is lost on white


# ---- the numbers ----


def test_accuracy_is_drawn_where_it_is_with_interval_and_majority_class(study, drawings):
    panels = panels_of(drawings["accuracy"])
    assert list(panels) == ["CR", "SST-5", "AG <News> & more", "Average"]
    for title, task in [("CR", "cr"), ("Average", None)]:
        for experiment, bar in zip(study.experiments, panels[title].containers, strict=True):
            value, (segment,) = experiment.estimate(task), bar.lines[2][0].get_segments()
            assert bar.lines[0].get_xdata()[0] == 100 * value.mean
            assert segment[:, 0].tolist() == pytest.approx([100 * value.low, 100 * value.high])
    (majority,) = [line for line in panels["CR"].lines if line.get_linestyle() == "--"]
    assert majority.get_xdata()[0] == 100 * study.majority["cr"]
    assert [label.get_text() for label in panels["CR"].get_yticklabels()][1:] == ["LoRA", "MTL-LoRA"]


@pytest.mark.slow(1)
def test_an_interval_far_wider_than_what_is_compared_is_cut(study):
    *others, last = study.experiments
    mean = last.summary.average.mean
    summary = dataclasses.replace(last.summary, average=Estimate(mean, 0.2, mean - 3, mean + 3))
    wide = dataclasses.replace(study, experiments=[*others, dataclasses.replace(last, summary=summary)])
    panel = panels_of(draw(wide)[0])["Average"]
    points = [bar.lines[0].get_xdata()[0] for bar in panel.containers]
    low, high = panel.get_xlim()
    assert low < min(points) and max(points) < high and high - low < 150


@pytest.mark.slow(1)
def test_intervals_of_two_seeds_do_not_reach_beyond_what_a_metric_can_be(study):
    def wide(experiment):
        cr = experiment.summary.tasks["cr"]
        tasks = experiment.summary.tasks | {"cr": Estimate(cr.mean, 0.2, cr.mean - 3, cr.mean + 3)}
        return dataclasses.replace(experiment, summary=dataclasses.replace(experiment.summary, tasks=tasks))

    drawn = draw(dataclasses.replace(study, experiments=[*map(wide, study.experiments)]))[0]
    low, high = panels_of(drawn)["CR"].get_xlim()
    assert -5 < low < 0 and 100 < high < 105


def test_an_experiment_has_one_colour_in_all_figures(drawings):
    losses = [line.get_color() for line in panels_of(drawings["training_loss"])["CR"].lines]
    accuracies = [bar.lines[0].get_color() for bar in panels_of(drawings["accuracy"])["CR"].containers]
    assert accuracies[1:] == losses and len(set(accuracies)) == 3


def test_loss_is_the_running_mean_of_each_seed_and_the_mean_over_seeds(study, drawings):
    panels = panels_of(drawings["training_loss"])
    assert list(panels) == ["CR", "SST-5", "AG <News> & more", "All tasks"]
    for title, task in (("CR", "cr"), ("All tasks", "")):
        for line, experiment in zip(panels[title].lines, study.experiments[1:], strict=True):
            curves = [log_of(study, run)[task] for run in experiment.runs]
            window = len(curves[0]) // 20
            expected = [
                np.mean([np.mean(list(curve.values())[max(0, end - window) : end]) for curve in curves])
                for end in range(1, len(curves[0]) + 1)
            ]
            assert list(line.get_xdata()) == list(curves[0])
            assert list(line.get_ydata()) == pytest.approx(expected)
    assert [text.get_text() for text in drawings["training_loss"].figure.legends[0].texts] == ["LoRA", "MTL-LoRA"]


def test_loss_of_a_task_that_some_steps_lack_is_drawn_over_all_steps_of_its_seeds(study, tmp_path):
    (experiment,) = study.experiments[1:2]
    runs = []
    for seed, curve in enumerate(({10: 4.0, 20: 2.0, 30: 1.0}, {10: 2.0, 30: 2.0})):
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("".join(json.dumps({"step": step, "loss/cr": loss}) + "\n" for step, loss in curve.items()))
        runs.append(dataclasses.replace(experiment.runs[0], seed=seed, log=str(path), analysis=None))
    changed = dataclasses.replace(study, experiments=[dataclasses.replace(experiment, runs=runs)], transfer=[])
    (drawing,) = [drawing for drawing in draw(changed) if drawing.name == "training_loss"]
    (line,), (band,) = panels_of(drawing)["CR"].lines, panels_of(drawing)["CR"].collections
    assert list(line.get_xdata()) == [10, 20, 30]
    assert list(line.get_ydata()) == [3.0, 2.0, 1.5]
    corners = band.get_paths()[0].vertices
    ends = [(min(here), max(here)) for here in (corners[corners[:, 0] == step, 1] for step in (10, 20, 30))]
    assert ends == [(2.0, 4.0), (2.0, 2.0), (1.0, 2.0)]


def test_mixture_has_a_row_a_layer_and_the_weights_of_a_task_side_by_side(study, drawings):
    found = analysis_of(study, study.experiments[2].runs[0])
    panels = panels_of(drawings["mixture_mtl_lora"])
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert list(panels) == [f"{name}{which}" for name in modules for which in ("", ", change from the start")]
    image = panels["k_proj"].images[0].get_array()
    assert image.shape == (2, 3 * 3)
    assert list(image[1]) == pytest.approx(np.ravel(found.mixture["model.layers.1.self_attn.k_proj"]).tolist())
    start = found.mixture_at_start["model.layers.1.self_attn.k_proj"]
    moved = panels["k_proj, change from the start"].images[0].get_array()[1]
    assert list(moved) == pytest.approx(
        (np.ravel(found.mixture["model.layers.1.self_attn.k_proj"]) - np.ravel(start)).tolist()
    )
    pair = [np.ravel(list(each.values())) for each in (found.mixture, found.mixture_at_start)]
    assert f"{np.corrcoef(*pair)[0, 1]:.3f}" in drawings["mixture_mtl_lora"].caption
    titles = [study.task_set.title(task) for task in found.tasks]
    assert [label.get_text() for label in panels["q_proj"].get_xticklabels()] == titles
    assert "seed 0" in drawings["mixture_mtl_lora"].title


@pytest.mark.slow(1)
def test_weights_that_are_all_alike_are_no_mixture_to_draw(study, drawings, tmp_path):
    folder = shutil.copytree(Path(study.path).parent, tmp_path / "study")
    for path in folder.rglob("adapter_analysis.json"):
        value = json.loads(path.read_text())
        for key in ("mixture", "mixture_at_start"):
            if value.get(key):
                value[key] = {name: [[1.0] for _ in rows] for name, rows in value[key].items()}
        path.write_text(json.dumps(value))
    assert not [drawing.name for drawing in draw(Study.load(folder)) if drawing.name.startswith("mixture")]


@pytest.mark.slow(1)
@pytest.mark.filterwarnings("error:invalid value")
def test_an_equal_start_has_no_correlation_with_the_trained_mixture(study, tmp_path):
    folder = shutil.copytree(Path(study.path).parent, tmp_path / "study")
    for path in folder.rglob("adapter_analysis.json"):
        value = json.loads(path.read_text())
        if start := value.get("mixture_at_start"):
            value["mixture_at_start"] = {name: [[0.333333] * len(row) for row in rows] for name, rows in start.items()}
            path.write_text(json.dumps(value))
    captions = [each.caption for each in draw(Study.load(folder)) if each.name.startswith("mixture")]
    assert captions and not any("Correlation" in caption for caption in captions)


@pytest.mark.slow(1)
def test_names_stand_in_figures_as_they_are_and_apart(study, write, tmp_path, capsys):
    long = [dataclasses.replace(each, name="a" * 60 + str(number)) for number, each in enumerate(study.experiments)]
    (accuracy,) = (each for each in draw(dataclasses.replace(study, experiments=long)) if each.name == "accuracy")
    labels = [label.get_text() for label in panels_of(accuracy)["CR"].get_yticklabels()]
    assert len({*labels}) == len(long) and all(label.startswith("aaaa") for label in labels)
    for letter in "ab":
        (tmp_path / f"run_{letter}").mkdir()
    runs = [write(TUNED, f"run_{letter}/{'checkpoint' * 4}") for letter in "ab"]
    (accuracy,) = draw(*load_studies(runs))
    labels = [label.get_text() for label in next(iter(panels_of(accuracy).values())).get_yticklabels()]
    assert all(f"run_{letter}" in label for letter, label in zip("ab", labels, strict=True))
    runs = [write({**TUNED, "name": name}, f"run{len(name)}") for name in (r"$\frac$ of r", "costs $5 and $6")]
    assert run_command(capsys, "figures", *runs, "--output", tmp_path / "figures", "--format", "svg")[0] == 0


def test_a_figure_whose_start_is_unknown_says_so(study, drawings, tmp_path):
    run = study.experiments[2].runs[0]
    value = json.loads((study.path.parent / run.analysis).read_text())
    (tmp_path / "old.json").write_text(json.dumps({key: value[key] for key in value if "start" not in key}))
    run = dataclasses.replace(run, analysis=str(tmp_path / "old.json"), log=None)
    changed = dataclasses.replace(study.experiments[2], runs=[run])
    found = {drawing.name: drawing for drawing in draw(dataclasses.replace(study, experiments=[changed], transfer=[]))}
    for name in ("mixture_mtl_lora", "similarity_mtl_lora"):
        assert "was not kept" in found[name].caption and "was not kept" not in drawings[name].caption
        assert not [title for title in panels_of(found[name]) if "start" in title]
        assert [title for title in panels_of(drawings[name]) if "start" in title]


@pytest.mark.slow(1)
def test_similarity_writes_the_mean_over_seeds_and_leaves_the_undefined_empty(study, drawings, tmp_path):
    analyses = [analysis_of(study, run) for run in study.experiments[2].runs]
    mean = np.mean([each.update_similarity for each in analyses], axis=0)
    cells = texts(panels_of(drawings["similarity_mtl_lora"])["update s Bₜ Aₜ"])
    assert cells == [f"{value:.2f}".replace("-", "−") for value in mean.ravel()]

    holed = [[None if (row, column) == (0, 1) else 0.5 for column in range(3)] for row in range(3)]
    holed[2][2] = -0.001
    value = json.loads((study.path.parent / study.experiments[2].runs[0].analysis).read_text())
    value |= {key: None for key in value if "similarity" in key} | {"update_similarity": holed}
    (tmp_path / "analysis.json").write_text(json.dumps(value))
    run = dataclasses.replace(study.experiments[2].runs[0], analysis=str(tmp_path / "analysis.json"), log=None)
    changed = dataclasses.replace(study.experiments[2], runs=[run])
    found = {drawing.name: drawing for drawing in draw(dataclasses.replace(study, experiments=[changed], transfer=[]))}
    (panel,) = panels_of(found["similarity_mtl_lora"]).values()
    assert texts(panel) == ["0.50", "", *["0.50"] * 6, "0.00"]


@pytest.mark.slow(1)
def test_many_tasks_have_colours_alone_and_the_caption_says_so(crowded):
    drawing = crowded["similarity_mtl_lora"]
    assert not any(texts(panel) for panel in drawing.figure.axes) and "up to 12 tasks" in drawing.caption


@pytest.mark.parametrize(
    ("over_seeds", "weight"),
    [(None, "bold"), (Estimate(0.0123, 0.01, 0.001, 0.02), "bold"), (Estimate(0.0123, 0.01, -0.01, 0.03), "normal")],
)
def test_transfer_writes_difference_and_interval_bold_where_all_intervals_leave_out_zero(study, over_seeds, weight):
    tasks = {"cr": Difference(0.0123, 0.004, 0.0301), "sst5": Difference(-0.02, -0.05, 0.01)}
    row = Transfer(group="rank 2", experiment="LoRA", tasks=tasks | {"agnews": Difference(-0.0004)})
    row = dataclasses.replace(row, over_seeds=over_seeds and Summary({"cr": over_seeds}))
    base = study.experiments[:1]
    _, drawing = draw(dataclasses.replace(study, transfer=[row], experiments=base))
    panel = drawing.figure.axes[0]
    assert texts(panel) == ["+1.2\n+0.4 to +3.0", "−2.0\n−5.0 to +1.0", "−0.0", ""]
    assert [text.get_fontweight() for text in panel.texts] == [weight, "normal", "normal", "normal"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["rank 2: LoRA"]
    low, high = panel.collections[0].get_clim()
    assert -low == high == 2.0  # zero is the middle of the colours


def test_tasks_of_several_units_have_no_figure_of_transfer(study):
    def with_units(run):
        return dataclasses.replace(
            run, tasks=run.tasks | {"cr": dataclasses.replace(run.tasks["cr"], metric="depth_rmse")}
        )

    first = study.experiments[0]
    other = dataclasses.replace(first, runs=[with_units(run) for run in first.runs])
    units = dataclasses.replace(study, experiments=[other])
    assert "transfer" not in {drawing.name for drawing in draw(units)}
