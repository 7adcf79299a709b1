"""Pictures show the numbers they are given, whole and legible, and are the same bytes every time."""

import dataclasses
import itertools
import json
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from report_records import TUNED, run_command
from synthetic_study import analysis, log_text, write_study

from mtl_lora.report.figures.draw import pictures, pictures_of_all
from mtl_lora.report.figures.picture import COLOURS, GREY, LINES, MARKERS, look
from mtl_lora.report.read_folder import read_one
from mtl_lora.report.study import Run, Scores, Value
from mtl_lora.report.training_records import Log

OF_A_STUDY = ["accuracy", "transfer", "training_loss", "mixture_mtl_lora", "similarity_mtl_lora"]
OF_A_STUDY += ["similarity_by_module_mtl_lora"]
LONG = {f"task_{index}": f"A task with a long name, {index}" for index in range(14)}


@pytest.fixture(scope="module")
def study(study_folder):
    return read_one(study_folder)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A study whose names are long and whose tasks are many."""
    methods = {"LoRA of a rank that is equal in weights": "lora", "MTL-LoRA": "mtl_lora"}
    folder = write_study(tmp_path_factory.mktemp("crowded"), seeds=(0,), blocks=12, tasks=LONG, methods=methods)
    return read_one(folder)


def named(study, name):
    """A study's picture by name."""
    return next(picture for picture in pictures(study) if picture.name == name)


def texts(panel) -> list[str]:
    return [text.get_text() for text in panel.texts]


# ---- which there are, and as what files ----


def test_the_command_draws_what_a_study_holds_and_names_the_files(study_folder, tmp_path, capsys):
    code, out, err = run_command(capsys, "figures", study_folder, "--output", tmp_path, "--format", "svg")
    assert (code, err) == (0, "")
    assert out.splitlines() == [str(tmp_path / f"{name}.svg") for name in OF_A_STUDY]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.svg" for name in OF_A_STUDY)
    for path in tmp_path.iterdir():
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))  # noqa: S314 - written just now
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.find("{*}title").text


def test_a_training_and_an_evaluation_are_drawn_from_what_they_hold(write, tmp_path, random, capsys):
    run = tmp_path / "training"
    run.mkdir()
    (run / "train_log.jsonl").write_text(log_text(random, 0.5))
    (run / "adapter_analysis.json").write_text(json.dumps(analysis(random, "lora", blocks=1)))
    evaluation = write(TUNED)
    assert run_command(capsys, "figures", run, "--format", "png")[:2] == (0, f"{run / 'figures/training_loss.png'}\n")
    assert run_command(capsys, "figures", evaluation / "results.json", "--format", "png")[0] == 0
    assert [path.name for path in (evaluation / "figures").iterdir()] == ["accuracy.png"]


def test_a_study_and_a_run_together_have_different_names(study_folder, write):
    names = [picture.name for picture in pictures_of_all([study_folder, write(TUNED, "tuned")])]
    assert names == [*(f"synthetic_{name}" for name in OF_A_STUDY), "mtl_lora_accuracy"]


def test_every_mistake_ends_in_one_sentence(study_folder, write, tmp_path, random, capsys, monkeypatch):
    evaluation, lora = write(TUNED), tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_analysis.json").write_text(json.dumps(analysis(random, "lora", blocks=1)))
    (tmp_path / "file").write_text("")
    for arguments, complaint in [
        ([], "RUN"),
        ([tmp_path / "missing"], "there is no folder"),
        ([tmp_path], "holds none of"),
        ([lora], "there is nothing to draw in"),
        ([evaluation, study_folder], "pass --output DIR"),
        ([evaluation, "--format", "pdf"], "it must be svg or png"),
        ([evaluation, "--format", "svg,"], "it must be svg or png"),
        ([evaluation, "--output", tmp_path / "file"], "can not be written"),
    ]:
        code, out, err = run_command(capsys, "figures", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and complaint in err, (arguments, err)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'mtl-lora[report]'" in run_command(capsys, "figures", evaluation)[2]
    assert not (evaluation / "figures").exists()


@pytest.mark.parametrize("style", ["svg", "png"])
def test_a_picture_is_the_same_bytes_whatever_the_day_and_the_users_settings(study, style, monkeypatch):
    picture = named(study, "accuracy")
    first = picture.render(style)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 23)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    assert picture.render(style) == first
    assert matplotlib.rcParams["font.size"] == 23


# ---- legible ----


@pytest.mark.parametrize("which", ["study", "crowded"])
def test_nothing_is_cut_off_and_no_labels_lie_on_each_other(which, request):
    for picture in pictures(request.getfixturevalue(which)):
        if picture.name.startswith("similarity_by_module") and which == "crowded":
            continue  # laid out as the other similarity is
        with picture.drawn() as figure:
            figure.draw_without_rendering()
            box, whole = figure.get_tightbbox(), figure.bbox_inches
            assert box.x0 >= -0.02 and box.y0 >= -0.02, picture.name
            assert box.x1 <= whole.width + 0.02 and box.y1 <= whole.height + 0.02, picture.name
            for panel in figure.axes:
                labels = [label for label in panel.get_yticklabels() if label.get_text() and label.get_visible()]
                assert_apart(labels, picture.name)
            for panel, block in itertools.product(figure.axes, [*figure.legends, figure._suptitle]):
                assert not panel.get_tightbbox().overlaps(block.get_window_extent()), (picture.name, block)


def assert_apart(artists, name: str) -> None:
    """No two of the artists overlap."""
    boxes = [artist.get_window_extent().padded(-0.5) for artist in artists]
    for (one, a), (other, b) in itertools.combinations(zip(artists, boxes, strict=True), 2):
        assert not a.overlaps(b), (name, one, other)


def test_what_is_compared_differs_in_more_than_colour():
    looks = [look(index) for index in range(len(COLOURS))]
    for key in ("color", "marker", "linestyle"):
        assert len({str(entry[key]) for entry in looks}) == len(COLOURS) == len(MARKERS) == len(LINES)
    more = [look(index) for index in range(3 * len(COLOURS))]
    assert len({(entry["color"], entry["marker"]) for entry in more}) == len(more)
    luminances = [np.dot(matplotlib.colors.to_rgb(colour), [0.2126, 0.7152, 0.0722]) for colour in COLOURS]
    assert max(luminances) < 0.7  # none is lost on white


# ---- the numbers ----


def test_accuracy_is_drawn_where_it_is_with_interval_and_baseline(study):
    with named(study, "accuracy").drawn() as figure:
        panels = {panel.get_title(): panel for panel in figure.axes}
        assert list(panels) == ["CR", "SST-5", "AG <News> & more", "Average"]
        for title, task in [("CR", "cr"), ("Average", None)]:
            for index, experiment in enumerate(study.experiments):
                value = experiment.scores.average if task is None else experiment.scores.tasks[task]
                lines = [line for line in panels[title].lines if set(line.get_ydata()) == {index}]
                drawn = [tuple(line.get_xdata()) for line in lines]
                assert (100 * value.mean,) in drawn
                assert (100 * max(value.low, 0), 100 * min(value.high, 1)) in drawn
        (baseline,) = [line for line in panels["CR"].lines if line.get_linestyle() == "--"]
        assert baseline.get_xdata()[0] == 100 * study.majority["cr"]
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()][1:] == ["LoRA", "MTL-LoRA"]
    caption = named(study, "accuracy").caption
    assert "interval of the mean over seeds" in caption and "one standard error" in caption


def test_an_experiment_has_one_colour_in_all_pictures_and_a_model_without_training_none(study):
    with named(study, "training_loss").drawn() as figure:
        losses = [line.get_color() for line in figure.axes[0].lines]
    with named(study, "accuracy").drawn() as figure:
        accuracies = [
            next(line.get_color() for line in figure.axes[0].lines if set(line.get_ydata()) == {index})
            for index in range(len(study.experiments))
        ]
    assert accuracies[1:] == losses and accuracies[0] == GREY


def test_loss_is_the_running_mean_of_each_seed_and_the_mean_over_seeds(study):
    with named(study, "training_loss").drawn() as figure:
        assert [panel.get_title() for panel in figure.axes] == ["CR", "SST-5", "AG <News> & more", "All tasks"]
        for panel, task in ((figure.axes[0], "cr"), (figure.axes[3], "")):
            for line, experiment in zip(panel.lines, study.experiments[1:], strict=True):
                curves = [run.log.losses[task] for run in experiment.runs]
                steps = list(curves[0])
                window = len(steps) // 20
                expected = [
                    np.mean([np.mean(list(curve.values())[max(0, end - window) : end]) for curve in curves])
                    for end in range(1, len(steps) + 1)
                ]
                assert list(line.get_xdata()) == steps
                assert line.get_ydata() == pytest.approx(expected)
        assert [text.get_text() for text in figure.legends[0].texts] == ["LoRA", "MTL-LoRA"]


def test_loss_of_a_task_that_some_steps_lack_is_drawn_over_all_steps_of_its_seeds(study):
    experiment = study.experiments[1]
    curves = [{10: 4.0, 20: 2.0, 30: 1.0}, {10: 2.0, 30: 2.0}]
    runs = tuple(Run(seed, Log({"cr": curve, "": {}})) for seed, curve in enumerate(curves))
    changed = dataclasses.replace(study, experiments=(dataclasses.replace(experiment, runs=runs),))
    with named(changed, "training_loss").drawn() as figure:
        (line,) = figure.axes[0].lines
        assert list(line.get_xdata()) == [10, 20, 30]
        assert list(line.get_ydata()) == [3.0, 2.0, 1.5]


def test_mixture_has_a_row_a_layer_and_the_weights_of_a_task_side_by_side(study):
    found = study.experiments[2].runs[0].analysis
    with named(study, "mixture_mtl_lora").drawn() as figure:
        panels = {panel.get_title(): panel for panel in figure.axes if panel.images}
        assert list(panels) == ["q_proj", "k_proj", "v_proj", "o_proj"]
        image = panels["k_proj"].images[0].get_array()
        assert image.shape == (2, 3 * 3)
        assert list(image[1]) == pytest.approx(np.ravel(found.mixture["model.layers.1.self_attn.k_proj"]).tolist())
        assert [label.get_text() for label in panels["q_proj"].get_xticklabels()] == [
            study.title(t) for t in found.tasks
        ]
        assert [label.get_text() for label in panels["q_proj"].get_yticklabels()] == ["0", "1"]
    assert "seed 0" in named(study, "mixture_mtl_lora").title


def test_similarity_writes_the_mean_over_seeds_and_leaves_the_undefined_empty(study):
    experiment = study.experiments[2]
    first, second = (run.analysis for run in experiment.runs)
    key = "update_similarity"
    holed = [[None if (row, column) == (0, 1) else 0.5 for column in range(3)] for row in range(3)]
    both = [dataclasses.replace(a, similarities={key: matrix}) for a, matrix in ((first, holed), (second, holed))]
    both[1].similarities[key][2][2] = -0.001
    runs = tuple(dataclasses.replace(run, analysis=a) for run, a in zip(experiment.runs, both, strict=True))
    changed = dataclasses.replace(study, experiments=(dataclasses.replace(experiment, runs=runs),))
    with named(changed, "similarity_mtl_lora").drawn() as figure:
        assert texts(figure.axes[0]) == ["0.50", "", *["0.50"] * 6, "0.00"]
    with named(study, "similarity_mtl_lora").drawn() as figure:
        cells = texts(figure.axes[2])
        mean = np.mean([a.similarities[key] for a in (first, second)], axis=0)
        assert cells == [f"{value:.2f}".replace("-", "−") for value in mean.ravel()]


def test_many_tasks_have_colours_alone_and_the_caption_says_so(crowded):
    picture = named(crowded, "similarity_mtl_lora")
    with picture.drawn() as figure:
        assert not any(texts(panel) for panel in figure.axes)
    assert "up to 12 tasks" in picture.caption


def test_transfer_writes_difference_and_interval_bold_where_it_leaves_out_zero(study):
    rows = {"cr": Value(0.0123, 0.004, 0.0301), "sst5": Value(-0.02, -0.05, 0.01), "agnews": Value(-0.0004)}
    row = Scores("LoRA", "rank 2", rows, None)
    with named(dataclasses.replace(study, transfer=(row,)), "transfer").drawn() as figure:
        panel = figure.axes[0]
        assert texts(panel) == ["+1.2\n+0.4 to +3.0", "−2.0\n−5.0 to +1.0", "+0.0", ""]
        assert [text.get_fontweight() for text in panel.texts] == ["bold", "normal", "normal", "normal"]
        assert [label.get_text() for label in panel.get_yticklabels()] == ["rank 2: LoRA"]
        low, high = panel.collections[0].get_clim()
        assert -low == high == 2.0  # zero is the middle of the colours
