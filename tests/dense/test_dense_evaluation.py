"""The whole path on folders in the real layouts: train, evaluate, resume, compare, predict."""

import math
import shutil

import numpy as np
import pytest
import torch
from dense_cases import make_folder, make_nyud, make_pascal, make_swin, write_npy, write_png
from PIL import Image

import mtl_lora
from mtl_lora import UserError, cli
from mtl_lora.dense import Predictor
from mtl_lora.dense import evaluate as evaluation
from mtl_lora.dense.config import EvalConfig, TrainConfig
from mtl_lora.dense.pictures import map_of
from mtl_lora.dense.tasks import Task
from mtl_lora.dense.train import Collator
from mtl_lora.metrics import METRICS
from mtl_lora.report.compare import compare
from mtl_lora.results import Results
from mtl_lora.training.run import train as run

COUNT, SIZE = 5, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four training images and, of those, three to test."""
    root = make_folder(tmp_path_factory.mktemp("dense") / "data", COUNT, SIZE)
    (root / "test.txt").write_text("1\n0\n2\n")
    return root


@pytest.fixture(scope="module")
def trained(no_old_objects, made_once, folder, tmp_path_factory):
    """A checkpoint of a few steps of all four tasks."""
    base = str(made_once("tiny_swin", make_swin))
    path = tmp_path_factory.mktemp("dense_trained") / "run"
    train(base, folder, path)
    return path


def train(base, data, path, **changes):
    settings = {"image_size": SIZE, "dtype": "fp32", "lora_r": 2, "batch_size": 2, "max_steps": 6, "save_step": 0}
    settings |= {"learning_rate": 1e-2, "warmup_ratio": 0.0, "augmentation": "none"} | changes
    run(TrainConfig(base_model=base, data_path=str(data), output_dir=str(path), **settings))


def evaluated(trained, folder, output, **flags):
    settings = {"data_dir": str(folder), "output_dir": str(output), "batch_size": 2, **flags}
    found = evaluation.run(EvalConfig(checkpoint=str(trained), **settings))
    return found.get("maps")


@pytest.mark.slow(1)
def test_results_are_those_of_the_maps_that_are_saved(trained, folder, tmp_path):
    """Worked out again from the files of the maps and of the labels, pixel by pixel."""
    results = evaluated(trained, folder, tmp_path, save_maps=True, sheet=2, official=True)
    found = {name: [] for name in ("things", "far", "normal")}
    for id in ("1", "0", "2"):
        for name, kept in found.items():
            suffix = "png" if name == "things" else "npy"
            pair = [tmp_path / "maps" / name / f"{id}.{suffix}", folder / name / f"{id}.{suffix}"]
            kept.append([np.array(Image.open(path)) if suffix == "png" else np.load(path) for path in pair])
    given, wanted = (np.array(side) for side in zip(*found["things"], strict=True))
    overlap = [((given == c) & (wanted == c)).sum() / max(((given == c) | (wanted == c)).sum(), 1) for c in range(3)]
    assert results.tasks["things"].value == pytest.approx(np.mean(overlap), abs=1e-12)
    given, wanted = (np.array(side) for side in zip(*found["far"], strict=True))
    assert results.tasks["far"].value == pytest.approx(np.sqrt(((given - wanted) ** 2).mean()), rel=1e-5)
    given, wanted = (np.array(side, np.float64) for side in zip(*found["normal"], strict=True))
    angles = np.degrees(np.arccos(np.clip((given * wanted).sum(axis=-1), -1, 1)))
    assert results.tasks["normal"].value == pytest.approx(angles.mean(), abs=1e-3)
    assert results.tasks["normal"].others["rmse_angle"].value == pytest.approx(np.sqrt((angles**2).mean()), abs=1e-3)
    assert results.tasks["normal"].measured["official"]["rmse"] == results.tasks["normal"].value
    printed = EvalConfig(checkpoint=str(trained), official=True).closing_lines({"maps": results})
    assert f"things as the original prints it: mIoU {100 * results.tasks['things'].value:.4f}" in printed
    assert (results.system, results.average) == ("dense", None)  # of degrees and percent there is no mean
    assert results.trainable.adapter > 0 and results.settings["image_size"] == SIZE
    assert Results.load(tmp_path).to_json() == results.to_json()
    width, height = Image.open(tmp_path / "sheet.png").size
    assert (width, height) == (5 * (SIZE + 4) + 4, 4 * (SIZE + 16) + 4)


@pytest.mark.slow
def test_evaluation_resumes_and_does_not_depend_on_the_batch(trained, folder, tmp_path, monkeypatch):
    whole = evaluated(trained, folder, tmp_path / "whole", batch_size=3)
    answer, left = evaluation.Evaluator.answer, [1]

    def stop(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return answer(*arguments)

    monkeypatch.setattr(evaluation.Evaluator, "answer", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluated(trained, folder, tmp_path / "cut", batch_size=1)
    monkeypatch.setattr(evaluation.Evaluator, "answer", answer)
    seen, maps = [], evaluation.Evaluator.maps

    def counted(evaluator, images):
        seen.append(len(images))
        return maps(evaluator, images)

    monkeypatch.setattr(evaluation.Evaluator, "maps", counted)
    cut = evaluated(trained, folder, tmp_path / "cut", batch_size=1)
    assert sum(seen) == 2  # of three images
    for name, task in whole.tasks.items():
        assert cut.tasks[name].value == pytest.approx(task.value, rel=1e-4, abs=1e-6)
    seen.clear()
    evaluated(trained, folder, tmp_path / "cut", batch_size=1)
    assert not seen
    evaluated(trained, folder, tmp_path / "cut", batch_size=1, save_maps=True)
    assert sum(seen) == 3  # what was answered has no maps


@pytest.mark.slow
def test_maps_of_another_model_are_not_kept(trained, folder, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    evaluated(trained, folder, tmp_path / "out", save_maps=True, sheet=1)
    evaluator = Predictor(other).evaluator
    evaluator.load()
    model = evaluator.model
    before = np.load(tmp_path / "out" / "maps" / "far" / "0.npy")
    with torch.no_grad():
        for layer in mtl_lora.adapter_layers(model).values():
            for weight in layer.adapter_parameters().values():
                weight.add_(0.3)
    mtl_lora.save(model, other)
    evaluated(other, folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "sheet.png").exists()
    evaluated(other, folder, tmp_path / "out", save_maps=True)
    assert not np.array_equal(np.load(tmp_path / "out" / "maps" / "far" / "0.npy"), before)


@pytest.mark.slow
def test_two_evaluations_compare_by_task_and_tables_say_the_units(trained, folder, tmp_path, capsys):
    evaluated(trained, folder, tmp_path / "a", name="first")
    evaluated(trained, folder, tmp_path / "b", name="second", dtype="fp64")
    capsys.readouterr()
    cli.main(["report", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    found = capsys.readouterr().out
    assert "in degrees, lower is better" in found
    assert not [line for line in found.splitlines() if line.startswith("| Average")]  # of degrees and percent
    cli.main(["report", "table", str(tmp_path / "a"), str(tmp_path / "b")])
    rows = capsys.readouterr().out
    angle = Results.load(tmp_path / "a").tasks["normal"].value
    assert f"{angle:.3f}" in rows and "Average" not in rows
    cli.main(["report", "details", str(tmp_path / "a")])
    rows = capsys.readouterr().out
    assert f"{angle:.3f}" in rows and "Majority class" not in rows and "Answers given" not in rows
    other = shutil.copytree(folder, tmp_path / "other")
    write_npy(other / "far" / "0.npy", np.full((SIZE, SIZE), 2.0, np.float32))
    found = evaluated(trained, other, tmp_path / "c", tasks=["far", "things"])
    with pytest.raises(UserError, match="test data of far are not the same"):
        compare(Results.load(tmp_path / "a"), found)


# What a model says at every pixel -> what must come out of an evaluation. Images of 4 x 6 are shown at 16 x 16, so that
# a row of a label is 4 rows, and the left half is 8 columns.
PASCAL = {
    # The left half has the classes 15, 15, 12 and none: two rows of three are found, and no other class of 21.
    "semseg": ({15: 9.0}, {"miou": 2 / 3 / 21, "miou_present": 2 / 3 / 2}),
    # Head and foot are a quarter of the image, the rest is background, of 7 classes.
    "human_parts": ({0: 9.0}, {"miou": 3 / 4 / 7, "miou_present": 3 / 4 / 3}),
    # A half is salient: below one half everything is taken, with a precision of 1/2.
    "sal": ({0: 0.0}, {"saliency_miou": 1 / 2, "max_f": 2 / 3}),
    # (1, 0, 0) against (1, -1 / 255, -0.6), where the person is.
    "normals": ({0: 2.0}, {"mean_angle": math.degrees(math.atan(math.hypot(1 / 255, 0.6)))}),
}
NYUD = {
    # Rows without a label, of class 0, 39 and 6: of three rows one is found.
    "semseg": ({39: 9.0}, {"miou": 1 / 3 / 40, "miou_present": 1 / 3 / 3}),
    # 2 against 2.5 in one image and 5 in the other.
    "depth": ({0: 2.0}, {"depth_rmse": math.sqrt((0.5**2 + 3**2) / 2)}),
    # (0, 0, -1) against (0, -0.6, -0.8) in one image and itself in the other.
    "normals": (
        {2: -3.0},
        {"mean_angle": math.degrees(math.acos(0.8)) / 2, "rmse_angle": math.degrees(math.acos(0.8)) / math.sqrt(2)},
    ),
}


@pytest.mark.parametrize(("make", "wanted"), [(make_pascal, PASCAL), (make_nyud, NYUD)], ids=["pascal", "nyud"])
@pytest.mark.slow
def test_real_layouts_go_the_whole_way(made_once, tmp_path, monkeypatch, make, wanted):
    """Trained, stopped half way, resumed bit for bit, and evaluated to values that were worked out by hand."""
    base, data = str(made_once("tiny_swin", make_swin)), make(tmp_path / "data", train=3, test=2)
    if make is make_pascal:
        for path in (data / "semseg" / "pascal-context").glob("*.png"):
            write_png(path, np.where(np.arange(6) < 3, [[15], [15], [12], [255]], 255))
    else:
        write_npy(data / "depth" / "4.npy", np.where(np.arange(6) > 0, 5.0, 0.0) * np.ones((4, 1)))
        write_npy(data / "normals" / "4.npy", np.where(np.arange(6)[:, None] > 0, [0, 0, -1], 0) * np.ones((4, 1, 1)))
    flags = {"augmentation": "auto", "batch_size": 3, "max_steps": 4, "save_step": 2, "lora_dropout": 0.1}
    train(base, data, tmp_path / "whole", **flags)
    collate, batches = Collator.__call__, iter(range(3))

    def stop(*arguments):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return collate(*arguments)

    monkeypatch.setattr(Collator, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        train(base, data, tmp_path / "run", **flags)
    monkeypatch.setattr(Collator, "__call__", collate)
    assert not (tmp_path / "run/mtl_lora.safetensors").exists()
    train(base, data, tmp_path / "run", **flags, resume_from_checkpoint="True")
    assert (tmp_path / "run/mtl_lora.safetensors").read_bytes() == (
        tmp_path / "whole/mtl_lora.safetensors"
    ).read_bytes()
    model = mtl_lora.load(tmp_path / "run", dtype="fp32")
    with torch.no_grad():  # every pixel gets the same outputs
        for name, decoder in zip(wanted, model.decoders, strict=True):
            decoder.output.weight.zero_()
            decoder.output.bias.zero_()
            for channel, value in wanted[name][0].items():
                decoder.output.bias[channel] = value
    mtl_lora.save(model, tmp_path / "constant")
    results = evaluated(tmp_path / "constant", data, tmp_path / "results")
    assert list(results.tasks) == list(wanted)
    for name, task in results.tasks.items():
        found = {task.metric: task.value} | {metric: other.value for metric, other in task.others.items()}
        assert {metric: found[metric] for metric in wanted[name][1]} == pytest.approx(wanted[name][1], rel=1e-5), name
        assert (task.n, task.measured["unlabelled"]) == (2, 0)


@pytest.mark.slow(1)
def test_prediction_writes_maps_at_the_size_of_each_image(trained, tmp_path, capsys):
    inputs = tmp_path / "in"
    inputs.mkdir()
    draw = np.random.default_rng(0)
    for name, shape in (("a", (20, 30, 3)), ("b", (40, 17, 3))):
        Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)).save(inputs / f"{name}.png")
    Image.open(inputs / "a.png").save(inputs / "c.tif")
    command = ["predict", "--checkpoint", str(trained), "--input", str(inputs), "--output", str(tmp_path / "out")]
    cli.main(command)
    found = Predictor(trained).predict([inputs / "a.png", Image.open(inputs / "b.png")])
    assert found[0]["things"].shape == (20, 30) and found[1]["normal"].shape == (40, 17, 3)
    assert (np.array(Image.open(tmp_path / "out/things/a.png")) == found[0]["things"]).all()
    assert (np.array(Image.open(tmp_path / "out/things/c.png")) == found[0]["things"]).all()
    assert np.allclose(np.load(tmp_path / "out/normal/b.npy"), found[1]["normal"], atol=1e-6)
    assert np.abs(np.array(Image.open(tmp_path / "out/front/a.png")) / 255 - found[0]["front"]).max() < 0.003
    alone = Predictor(trained, batch_size=1).predict(path for path in [inputs / "b.png"])[0]
    assert all(np.allclose(alone[name], found[1][name], atol=1e-5) for name in alone)
    turned, exif = Image.open(inputs / "a.png"), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    turned.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for upright in Predictor(trained).predict([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")]):
        assert all(np.array_equal(upright[name], found[0][name]) for name in found[0])
    assert Image.open(tmp_path / "out/sheet.png").size[1] == 3 * (SIZE + 16) + 4
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "--overwrite" in capsys.readouterr().err
    wide = Image.fromarray(np.full((9, 9), 4000, np.uint16))
    wide.save(tmp_path / "in" / "z.png")
    (tmp_path / "in" / "y.jpg").write_text("no image")
    for check in ([], ["--check"]):  # all at once, before the first is answered
        with pytest.raises(SystemExit):
            cli.main([*command, "--overwrite", *check])
        said = capsys.readouterr().err
        assert "y.jpg is not an image" in said and "z.png has more than 8 bits" in said
    for image in (wide, tmp_path / "in" / "z.png"):
        with pytest.raises(UserError, match="8 bits"):
            Predictor(trained).predict([image])
    with pytest.raises(UserError, match="a list of images"):
        Predictor(trained).predict(inputs / "a.png")


@pytest.mark.slow(1)
def test_maps_are_saved_at_the_size_of_their_images(trained, folder, tmp_path):
    evaluated(trained, folder, tmp_path, image_size=8, tasks=["things"], limit=1, save_maps=True)
    assert Image.open(tmp_path / "maps/things/1.png").size == (SIZE, SIZE)


def test_the_split_and_what_may_be_missing_are_what_the_flags_say(trained, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "far" / "2.npy").unlink()

    def asked(**flags) -> dict[str, int]:
        config = EvalConfig(checkpoint=str(trained), data_dir=str(data), output_dir=str(tmp_path / "out"), **flags)
        return evaluation.Evaluator(config).ask().sizes

    assert asked(split="train", tasks=["things"]) == {"things": 4} and asked(tasks=["things"]) == {"things": 3}
    with pytest.raises(UserError, match=r"lacks far/2\.npy of test; --missing_labels"):
        asked(tasks=["far"])
    assert asked(tasks=["far"], missing_labels=True) == {"far": 3}


def test_an_image_or_a_label_that_was_replaced_is_answered_again():
    question = evaluation.Question(Task("t", 0, kind="depth"), 3, "label", "image")
    line = question.line([1.5, 2.0])
    assert question.answered_by(line) and not question.answered_by(None)
    for changed in ({"answer": "other"}, {"prompt_sha256": "other"}, {"counts": [None]}, {"counts": None}):
        assert not question.answered_by(line | changed)


def test_a_map_has_the_likeliest_class_whatever_the_sign_of_its_scores():
    scores = torch.tensor([[[-1.0, -3.0, -9.0]], [[-2.0, -2.5, -8.0]], [[-4.0, -4.0, -7.0]]])
    assert map_of(Task("t", 0, kind="parts", classes=3), scores).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"tasks": ["flow"]}, "no task 'flow'"),
        ({"data_dir": "/nowhere"}, "/nowhere"),
        ({"cutoff_len": 5}, "cutoff_len has no effect"),
        ({"split": "dev"}, "split must be one of"),
    ],
)
def test_flag_that_cannot_be_is_named(trained, folder, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        evaluated(trained, folder, tmp_path, **flags)


@pytest.mark.slow(1)
def test_task_without_any_label_is_named_and_nothing_is_written(trained, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for id in "012":
        write_npy(data / "far" / f"{id}.npy", np.zeros((SIZE, SIZE)))
    with pytest.raises(UserError, match="label of far"):
        evaluated(trained, data, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    results = evaluated(trained, data, tmp_path / "out", tasks=["things", "front"])
    assert set(results.tasks) == {"things", "front"}


@pytest.mark.slow(1)
def test_every_metric_of_a_kind_is_measured(trained, folder, tmp_path):
    results = evaluated(trained, folder, tmp_path)
    for task in results.tasks.values():
        assert {task.metric, *task.others} <= METRICS.keys()
    assert set(results.tasks["front"].others) == {"max_f"} and set(results.tasks["things"].others) == {"miou_present"}
