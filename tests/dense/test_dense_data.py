import collections
import dataclasses
import json

import numpy as np
import pytest
import torch
from dense_cases import TASKS, make_folder, make_nyud, make_pascal, write_npy, write_png, write_text
from PIL import Image

from mtl_lora.dense.data import AUGMENTATIONS, MEAN, STD, DenseDataset, Warp, image_tensor, label_tensor, pixels_of
from mtl_lora.dense.examples import Images
from mtl_lora.dense.layouts import GROUP_OF_PART, NORMALS_CLASSES, Layout, boundaries, thin
from mtl_lora.dense.pictures import picture_of
from mtl_lora.dense.tasks import KINDS, Task, TaskSet, shipped
from mtl_lora.dense.train import Collator
from mtl_lora.errors import UserError

SEMANTIC, DEPTH, NORMALS = (
    Task("t", 0, kind="semantic", classes=4),
    Task("t", 0, kind="depth"),
    Task("t", 0, kind="normals"),
)


def test_a_loss_weight_of_1_is_written_where_it_is_not_the_kinds():
    tasks = TaskSet((Task("edges", 0, kind="edges", weight=1.0), Task("depth", 1, kind="depth")))
    assert TaskSet.from_json(tasks.to_json()) == tasks and tasks["edges"].weight == 1


def test_shipped_tasks_have_the_outputs_weights_and_metrics_of_the_paper():
    found = {task.name: (task.outputs, task.weight, task.metric_name) for task in shipped("pascal")}
    assert found == {
        "semseg": (21, 1, "miou"),
        "human_parts": (7, 2, "miou"),
        "sal": (1, 5, "saliency_miou"),
        "normals": (3, 10, "mean_angle"),
    }
    assert [(task.name, task.outputs) for task in shipped("nyud")] == [("semseg", 40), ("depth", 1), ("normals", 3)]
    weights = {"semantic": 1, "parts": 2, "saliency": 5, "edges": 50, "normals": 10, "depth": 1}
    assert {name: kind.weight for name, kind in KINDS.items()} == weights
    assert TaskSet.from_json(shipped("scenes").to_json()) == shipped("scenes")
    assert shipped("pascal").only(["normals", "sal"]).describe() == "sal 0, normals 1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "flow"}, "kind 'flow'"),
        ({"kind": ["semantic"]}, r"kind \['semantic'\]"),
        ({"kind": "semantic"}, "0 classes"),
        ({"kind": "depth", "classes": 3}, "no classes"),
        ({"kind": "semantic", "classes": 3, "labels": ["a", "b"]}, "3 classes and 2 labels"),
        ({"kind": "depth", "metric": "miou"}, "depth_rmse"),
        *[({"kind": "depth", "weight": weight}, "weight") for weight in (0, -1, True, "2", float("inf"), 10**400)],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_task_that_cannot_be_is_named(fields, words):
    with pytest.raises(UserError, match=f"task 't' .*{words}"):
        Task("t", 0, **fields)


# ---- the layouts, read back ----


def test_pascal_is_read_as_the_original_reads_it(tmp_path):
    edge = {"name": "edge", "id": 4, "kind": "edges"}
    tasks = TaskSet.from_json([*shipped("pascal").to_json()["tasks"], edge])
    data = DenseDataset(make_pascal(tmp_path), "train", tasks)
    task, (first, second) = tasks, data.ids
    left = np.arange(6) < 3
    assert (data.label(task["semseg"], second, (4, 6)) == np.where(left, 15, 255)).all()
    parts = data.label(task["human_parts"], first, (4, 6))
    assert parts[:, 0].tolist() == [1, 0, 0, 6] and not parts[:, 3:].any()
    assert (data.label(task["human_parts"], second, (4, 6)) == 255).all()  # parts of a horse are none of a person
    assert (data.label(task["sal"], first, (4, 6)) == left).all()  # 128 / 255 is above a half, 127 / 255 is not
    normals = data.label(task["normals"], first, (4, 6))
    direction = np.array([1.0, 2 * 127 / 255 - 1, -0.6])
    assert np.allclose(normals[:, :3], direction / np.linalg.norm(direction), atol=1e-6)
    assert not normals[:, 3:].any()  # the sky has no normals that count
    edges = data.label(task["edge"], first, (4, 6))
    assert edges[:, 2].tolist() == [0, 1, 1, 1] and edges.sum() == 3  # of both sides of the change one is left
    assert [item["id"] for item in DenseDataset(tmp_path, "test", size=8)] == ["2008_000002"]
    assert DenseDataset(tmp_path, "train", augmentation="auto").augmentation is AUGMENTATIONS["pascal"]
    write_png(tmp_path / "semseg" / "VOC12" / f"{second}.png", np.full((4, 6), 7))  # is taken where both are there
    assert (data.label(task["semseg"], second, (4, 6)) == 7).all()


def test_boundaries_are_between_all_of_several_hundred_classes():
    assert boundaries(np.repeat([[28, 28 + 256]], 3, axis=0)).any() and not boundaries(np.full((3, 2), 28)).any()


def test_normals_of_pascal_count_in_classes_that_nyu_has_too():
    assert {284, 440, 158, 427, 135} <= set(NORMALS_CLASSES)  # the last is the envelope, after the engine
    assert not {207, 360, 2, 187, 134} & set(NORMALS_CLASSES)
    assert len(NORMALS_CLASSES) == len(set(NORMALS_CLASSES)) == 170 and sum(NORMALS_CLASSES) == 37556


def test_parts_of_a_person_are_in_the_groups_that_their_names_say():
    labels = shipped("pascal")["human_parts"].labels
    groups = {"neck": "torso", "torso": "torso", "uarm": "upper arm", "larm": "lower arm", "hand": "lower arm"}
    groups |= {"uleg": "upper leg", "lleg": "lower leg", "foot": "lower leg"}
    named = {part: next((groups[end] for end in groups if part.endswith(end)), "head") for part in GROUP_OF_PART}
    assert {part: labels[group] for part, group in GROUP_OF_PART.items()} == named
    assert len(named) == 24 and list(named.values()).count("head") == 10


def test_nyud_is_read_as_the_original_reads_it(tmp_path):
    data = DenseDataset(make_nyud(tmp_path), "train", size=8)
    assert DenseDataset(tmp_path, "train", augmentation="auto").augmentation is AUGMENTATIONS["nyud"]
    item = data[0]
    labels = item["labels"]
    assert labels["semseg"][::2, 0].tolist() == [255, 0, 39, 6]
    assert set(labels["depth"][0, :, 7].tolist()) == {2.5} and (labels["depth"][0, :, 0] == 255).all()
    assert torch.allclose(labels["normals"][:, 4, 7], torch.tensor([0, -0.6, -0.8]))
    assert (labels["normals"][:, :, 0] == 255).all()
    assert item["image"].shape == (3, 8, 8)
    mean, deviation = 0.485, 0.229
    assert item["image"][0, 0, 0].item() == pytest.approx((40 / 255 - mean) / deviation, abs=0.02)


def test_thinned_lines_are_those_of_scikit_image():
    rows = ["111111111", "111111111", "111111111", "000111000", "000111000", "000111100", "000000110", "110000011"]
    mask = np.array([list(map(int, row)) for row in rows])
    found = ["".join(map(str, row)) for row in thin(mask).astype(int)]
    thinned = ["000000000", "011001110", "000110000", "000010000", "000010000", "000001000", "000000100", "110000011"]
    assert found == thinned


def test_a_thinned_ring_stays_around_its_hole():
    """Beside the hole the smaller of Guo and Hall's two counts is 4, above the 3 of their second condition."""
    ring = np.pad(np.ones((5, 5)), 1)
    ring[3, 3] = 0
    assert np.argwhere(thin(ring)).tolist() == [[2, 3], [3, 2], [3, 4], [4, 3]]


def test_batch_says_how_much_of_each_task_is_labelled(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "far" / "1.npy").unlink()
    write_png(tmp_path / "things" / "2.png", np.full((8, 8), 255))
    data = DenseDataset(tmp_path, "train", size=8, missing_labels=True)
    batch = Collator(data)([data[0], data[1]])
    assert batch["loss_weight"].tolist() == [64, 128, 64, 3 * 128]
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes == {
        "pixel_values": (2, 3, 8, 8),
        "things": (2, 8, 8),
        "front": (2, 1, 8, 8),
        "far": (2, 1, 8, 8),
        "normal": (2, 3, 8, 8),
        "loss_weight": (4,),
    }


# ---- geometry ----


@pytest.mark.parametrize("warp", [Warp(True), Warp(False, 20.0), Warp(True, -15.0, 1.2), Warp(False, 90.0, 0.8)])
def test_normals_turn_with_the_image(warp):
    """The depth of a smooth surface, after the warp, has the gradient that the warped normals say."""
    size = 65
    y, x = np.mgrid[:size, :size] - 32.0
    depth = 60 + 0.3 * x - 0.2 * y + 0.004 * x * y + 0.002 * x**2
    slope = np.stack([0.3 + 0.004 * y + 0.004 * x, -0.2 + 0.004 * x, -np.ones_like(x)], axis=-1)
    normals = (slope / np.linalg.norm(slope, axis=-1, keepdims=True)).astype(np.float32)
    turned = label_tensor(normals, NORMALS, warp, size)[:, 20:45, 20:45]
    # The surface itself is resampled at the same places; its steps are as many pixels of the result as the scale says.
    grid = warp.grid((size, size), size).double()
    there = torch.from_numpy(depth)[None, None]
    moved = torch.nn.functional.grid_sample(there, grid, mode="bilinear", align_corners=False)[0, 0]
    along_y, along_x = torch.gradient(moved)
    found = torch.stack([along_x, along_y])[:, 20:45, 20:45] * warp.scale
    assert torch.allclose(-turned[:2] / turned[2], found.float(), atol=0.02)


def test_scale_brings_nearer_and_rotation_goes_against_the_clock():
    depth = np.full((5, 5), 4.0, np.float32)
    assert (label_tensor(depth, DEPTH, Warp(scale=2.0), 5) == 2.0).all()
    classes = np.zeros((5, 5), np.uint8)
    classes[2, 4] = 3  # at the right
    assert label_tensor(classes, SEMANTIC, Warp(angle=90.0), 5)[0, 2] == 3  # is at the top
    assert label_tensor(classes, SEMANTIC, Warp(flip=True), 5)[2, 0] == 3
    smaller = label_tensor(classes, SEMANTIC, Warp(scale=0.5), 5)
    assert (smaller[[0, 4]] == 255).all() and smaller[2, 3] == 3  # what lies outside has no label


@pytest.mark.parametrize("warp", [Warp(angle=20.0), Warp(True, -30.0, 1.25)])
def test_an_image_that_is_no_square_is_turned_before_it_is_stretched(warp):
    """In the image's own pixels the rows and columns of the result stay perpendicular, and as far apart as before."""
    height, width, size = 30, 60, 12
    places = warp.grid((height, width), size)[0] * torch.tensor([width / 2, height / 2])
    right, down = places[0, 1] - places[0, 0], places[1, 0] - places[0, 0]
    assert (right @ down).item() == pytest.approx(0, abs=1e-4)
    expected = [width / size / warp.scale, height / size / warp.scale]
    assert [right.norm().item(), down.norm().item()] == pytest.approx(expected, rel=1e-5)


def test_what_lies_outside_of_a_map_has_no_label_to_the_pixel():
    smaller = label_tensor(np.zeros((80, 80), np.uint8), SEMANTIC, Warp(scale=0.5), 80)
    assert (smaller[20:60, 20:60] == 0).all() and (smaller == 0).sum() == 40 * 40


def test_a_reduced_image_is_turned_as_the_whole_one_with_its_maps():
    warp, reduced = Warp(angle=30.0), np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    expected = warp.grid((8, 16), 8)
    pixels = torch.from_numpy(reduced).float().permute(2, 0, 1)[None]
    there = torch.nn.functional.grid_sample(pixels, expected, "bicubic", "border", align_corners=False).clamp(0, 255)
    found = image_tensor(reduced, warp, 8, shape=(8, 16)) * torch.tensor(STD)[:, None, None]
    found = 255 * (found + torch.tensor(MEAN)[:, None, None])
    inside = (expected[0].abs() < 1).all(dim=-1)
    torch.testing.assert_close(found[:, inside], there[0][:, inside], rtol=0, atol=1e-3)


def test_image_and_labels_of_any_size_stay_on_each_other(tmp_path):
    """A disc drawn into the image and into the labels is at the same place in both, whatever was drawn."""
    make_folder(tmp_path, count=4, size=64)
    data = DenseDataset(tmp_path, "train", size=24, augmentation="pascal")
    for epoch in range(5):
        item = data.item(0, epoch)
        labels = item["labels"]["things"]
        red = item["image"][0] > 0.5
        agree = (red == (labels == 2))[labels != 255].float().mean()
        assert agree > 0.95 and 0.02 < red.float().mean() < 0.5


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    make_folder(tmp_path, count=4)
    options = {"size": 8, "augmentation": "pascal"}
    data, other = DenseDataset(tmp_path, "train", **options), DenseDataset(tmp_path, "train", **options)
    other.set_epoch(3)
    _, there = other[0], other[1]
    data.set_epoch(3)
    assert torch.equal(data[1]["image"], there["image"]) and not torch.equal(data.item(1, 4)["image"], there["image"])
    draws = [AUGMENTATIONS["nyud"].draw(0, 0, index) for index in range(60)]
    scales = collections.Counter(draw.scale for draw in draws)
    assert set(scales) == {1.0, 1.2, 1.5} and min(scales.values()) > 14, "each as often as the others"
    assert {draw.flip for draw in draws} == {True, False}
    assert draws != [AUGMENTATIONS["nyud"].draw(1, 0, index) for index in range(60)]
    turned = [AUGMENTATIONS["pascal"].draw(0, 0, index) for index in range(60)]
    assert min(draw.angle for draw in turned) < -15 and max(draw.angle for draw in turned) <= 20
    assert min(draw.scale for draw in turned) >= 0.75 and 1.2 < max(draw.scale for draw in turned) <= 1.25
    assert len({draw.scale for draw in turned}) == 60 and sum(draw.flip for draw in turned) in range(20, 41)


# ---- what is wrong ----


def test_every_missing_file_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "things" / "1.png").unlink()
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(UserError) as caught:
        DenseDataset(tmp_path, "train", size=8)
    assert "things/1.png" in str(caught.value) and "images/2.png" in str(caught.value)
    for index in (1, 2):
        (tmp_path / "things" / f"{index}.png").unlink(missing_ok=True)
    write_png(tmp_path / "images" / "2.png", np.ones((8, 8, 3)))
    with pytest.raises(UserError, match=r"things/1\.png, things/2\.png"):  # a task without any label
        DenseDataset(tmp_path, "train", size=8, missing_labels=True)


def save_archive(path) -> None:
    with path.open("wb") as opened:
        np.savez(opened, depth=np.ones((8, 8)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: write_png(root / "things" / "1.png", np.full((8, 8), 3)), r"things/1\.png holds 3; .* 0 to 2"),
        (lambda root: write_png(root / "things" / "1.png", np.ones((8, 7))), r"things/1\.png .*\(8, 7\).*\(8, 8\)"),
        (lambda root: write_png(root / "things" / "1.png", np.ones((8, 8, 3))), r"things/1\.png .*mode RGB"),
        (lambda root: write_text(root / "things" / "1.png", "x"), r"things/1\.png cannot be read"),
        (lambda root: write_npy(root / "far" / "1.npy", np.full((8, 8), 300.0)), r"far/1\.npy .*300"),
        (lambda root: write_npy(root / "far" / "1.npy", np.full((8, 8), -1.0)), r"far/1\.npy .*-1"),
        (lambda root: write_npy(root / "far" / "1.npy", np.full((8, 8), np.nan)), r"far/1\.npy .*finite"),
        (lambda root: write_text(root / "far" / "1.npy", "x"), r"far/1\.npy cannot be read"),
        (lambda root: save_archive(root / "far" / "1.npy"), r"far/1\.npy cannot be read .*archive"),
        (lambda root: write_text(root / "far" / "1.npy", "PK\x03\x04"), r"far/1\.npy cannot be read"),
        (
            lambda root: write_png(root / "images" / "1.jpg", np.ones((8, 8, 3))),
            r"1\.png and 1\.jpg are for the same image",
        ),
        (
            lambda root: [
                write_npy(path, (np.load(path) + 1) / 2) for path in [root / "normal" / f"{i}.npy" for i in (1, 2)]
            ],
            r"normal/1\.npy holds normals of length 0\.",
        ),
        (lambda root: write_npy(root / "normal" / "1.npy", np.full((8, 8, 3), 100)), r"normal/1\.npy .*length 173"),
        (
            lambda root: [write_png(root / "front" / f"{i}.png", 255 * (np.eye(8) > 0)) for i in (1, 2)],
            "front .* write 1",
        ),
        (
            lambda root: [
                (root / "tasks.json").write_text(json.dumps([{**TASKS[0], "classes": 2}])),
                *(write_png(root / "things" / f"{i}.png", 255 * np.eye(8)) for i in (1, 2)),
            ],
            "things .* write 1",
        ),
        (
            lambda root: [write_png(root / "things" / f"{i}.png", np.full((8, 8), 255)) for i in (1, 2)],
            "no image of train .* label of things",
        ),
        (
            lambda root: [
                write_npy(root / folder / f"{i}.npy", np.zeros(shape))
                for i in (1, 2)
                for folder, shape in (("far", (8, 8)), ("normal", (8, 8, 3)))
            ],
            "no image of train .* label of far, normal",
        ),
        (lambda root: write_text(root / "train.txt", "1", "1"), r"train\.txt names 1 twice"),
        (lambda root: write_text(root / "train.txt", "1", "../1"), r"train\.txt names \.\./1, which is outside"),
        (lambda root: write_text(root / "train.txt", "1", "/1"), r"train\.txt names /1, which is outside"),
        (lambda root: write_text(root / "train.txt"), r"train\.txt names no image"),
        (lambda root: (root / "train.txt").unlink(), r"train\.txt"),
        (lambda root: (root / "tasks.json").unlink(), "none of tasks.json"),
        (lambda root: (root / "tasks.json").write_text(json.dumps([{**TASKS[0], "kind": "x"}])), "kind 'x'"),
    ],
)
def test_file_that_is_wrong_is_named_before_anything_begins(tmp_path, spoil, words):
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        DenseDataset(tmp_path, "train", size=8)


def test_an_image_that_is_to_be_turned_is_refused_for_its_maps_may_lie_otherwise(tmp_path):
    make_folder(tmp_path)
    exif = Image.Exif()
    path = DenseDataset(tmp_path, "train", size=8).layout.image("1")
    for orientation in range(9):  # from 2 on they are to be turned or mirrored
        exif[0x0112] = orientation
        Image.open(path).copy().save(path, exif=exif)
        if orientation < 2:
            assert len(DenseDataset(tmp_path, "train", size=8)) == 2
            continue
        with pytest.raises(UserError, match=f"{path.name} has EXIF data"):
            DenseDataset(tmp_path, "train", size=8)


def test_pixels_without_a_label_are_those_that_the_documents_say(tmp_path):
    make_folder(tmp_path)
    for index in (1, 2):
        far, normal = (np.load(tmp_path / task / f"{index}.npy") for task in ("far", "normal"))
        far[0], normal[0] = 255, 255
        write_npy(tmp_path / "far" / f"{index}.npy", far)
        if index == 1:
            write_npy(tmp_path / "normal" / "1.npy", normal)
        else:
            (tmp_path / "normal" / "2.npy").unlink()
            values = np.round((normal + 1) * 127.5)
            for row, value in enumerate((0, 255, 127)):
                values[row] = value
            write_png(tmp_path / "normal" / "2.png", values)
        write_npy(tmp_path / "front" / f"{index}.npy", np.eye(8, dtype=bool))
        (tmp_path / "front" / f"{index}.png").unlink()
    first, second = DenseDataset(tmp_path, "train", size=8)
    for row, blank in ((first, 1), (second, 3)):
        unlabelled = (row["labels"]["normal"] == 255).all(dim=0)
        assert unlabelled[:blank].all() and not unlabelled[blank:].any()
        assert (row["labels"]["far"][0, 0] == 255).all() and not (row["labels"]["far"][0, 1:] == 255).any()
        assert row["labels"]["front"].sum() == 8


@pytest.mark.parametrize(("width", "size"), [(97, 8), (64, 8), (1345, 112)])
def test_a_reduced_image_stays_on_its_labels(width, size):
    """An edge at three quarters of the width stands there in what is left of the image."""
    image = np.zeros((width, width, 3), np.uint8)
    image[:, width * 3 // 4 :] = 255
    pixels, shape = pixels_of(Image.fromarray(image), size)
    assert shape == (width, width) and 2 * size > pixels.shape[1] >= size
    dark = (255 - pixels[0, :, 0].astype(float)).sum() / 255
    assert dark / pixels.shape[1] == pytest.approx((width * 3 // 4) / width, abs=0.004)


def test_labels_of_several_files_may_be_missing_for_some_images(tmp_path):
    make_pascal(tmp_path, train=2)
    data = DenseDataset(tmp_path, "train")
    normals = next(task for task in data.tasks if task.kind == "normals")
    paths = data.layout.paths(normals, data.ids[1])
    assert len(paths) > 1
    for path in paths[::-1]:
        path.unlink()
        with pytest.raises(UserError, match=f"lacks .*{path.name}"):  # any of them
            DenseDataset(tmp_path, "train", data.tasks.only(["normals"]))
    data = DenseDataset(tmp_path, "train", missing_labels=True)
    assert [(row["labels"]["normals"] == 255).all().item() for row in data] == [False, True]


def test_task_that_a_layout_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"PASCAL_MT.*depth"):
        DenseDataset(make_pascal(tmp_path), "train", shipped("nyud"))
    assert issubclass(type(DenseDataset(tmp_path, "train").layout), Layout)


def test_classes_in_another_order_than_the_folders_are_refused(tmp_path):
    things = {"name": "things", "id": 0, "kind": "semantic", "labels": ["sky", "road", "car"]}
    make_folder(tmp_path, tasks=[things])
    assert len(DenseDataset(tmp_path, "train", TaskSet.from_json([things]))) == 2
    unnamed = {**things, "labels": [], "classes": 3}
    assert len(DenseDataset(tmp_path, "train", TaskSet.from_json([unnamed]))) == 2
    for change in ({"labels": ["Sky", "Road", "automobile"]}, {"kind": "parts"}):
        assert len(DenseDataset(tmp_path, "train", TaskSet.from_json([{**things, **change}]))) == 2
    depth = {"name": "things", "id": 0, "kind": "saliency"}
    order = {**things, "labels": ["road", "sky", "car"]}
    moved = {**things, "labels": ["tree", "sky", "car"]}
    wrong = [(order, "0 is 'sky' there"), (moved, "1 is 'road' there"), (depth, "as semantic")]
    for task, words in [*wrong, ({**unnamed, "classes": 4}, "with 3 ")]:
        with pytest.raises(UserError, match=words):
            DenseDataset(tmp_path, "train", TaskSet.from_json([task]))


def test_a_rare_second_class_beside_void_pixels_may_come_late(tmp_path):
    make_folder(tmp_path, 20, tasks=[{**TASKS[0], "classes": 2}])
    for index in range(20):
        write_png(tmp_path / "things" / f"{index}.png", 255 * np.eye(8) if index < 19 else np.eye(8))
    assert len(DenseDataset(tmp_path, "train", size=8)) == 19
    for index in range(1, 20):  # no void pixel, and the map of an image that has none is void alone
        write_png(tmp_path / "things" / f"{index}.png", np.eye(8) if index == 19 else np.zeros((8, 8)))
    (tmp_path / "things" / "1.png").unlink()
    assert len(DenseDataset(tmp_path, "train", size=8, missing_labels=True)) == 19


def test_image_without_a_valid_pixel_of_a_task_is_masked(tmp_path):
    make_folder(tmp_path)
    write_npy(tmp_path / "normal" / "1.npy", np.zeros((8, 8, 3)))
    write_npy(tmp_path / "far" / "1.npy", np.zeros((8, 8)))
    labels = DenseDataset(tmp_path, "train", size=8)[0]["labels"]
    assert (labels["normal"] == 255).all() and (labels["far"] == 255).all()


def test_label_of_a_task_may_come_late(tmp_path):
    make_folder(tmp_path, count=21)
    for index in range(1, 20):
        write_png(tmp_path / "things" / f"{index}.png", np.full((8, 8), 255))
    assert (DenseDataset(tmp_path, "train", size=8)[19]["labels"]["things"] != 255).all()


def test_digest_follows_the_images_and_the_labels_of_the_task(tmp_path):
    data = DenseDataset(make_folder(tmp_path), "test", size=8)
    before = {task.name: data.sha256(task) for task in data.tasks}
    write_png(tmp_path / "things" / "0.png", np.ones((8, 8)))
    now = DenseDataset(tmp_path, "test", size=8)
    changed = {task.name for task in data.tasks if now.sha256(task) != before[task.name]}
    assert changed == {"things"}
    larger = DenseDataset(tmp_path, "test", size=16)
    assert not {larger.sha256(task) for task in data.tasks} & {now.sha256(task) for task in data.tasks}
    (things,) = (task for task in data.tasks if task.name == "things")
    assert now.sha256(dataclasses.replace(things, classes=things.classes + 1)) != now.sha256(things)


def test_every_colour_is_scaled_by_imagenets_mean_and_deviation():
    found = image_tensor(np.full((4, 4, 3), 255, np.uint8), Warp(), 4)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert found[:, 1, 2].tolist() == pytest.approx(expected, rel=1e-5)


def test_an_id_may_hold_a_space(tmp_path):
    write_text(make_folder(tmp_path) / "train.txt", "1 a ", "", "2")
    for folder in ("images", "things", "front", "far", "normal"):
        (path,) = (tmp_path / folder).glob("1.*")
        path.rename(path.with_stem("1 a"))
    assert DenseDataset(tmp_path, "train", size=8).ids == ["1 a", "2"]


def test_an_image_is_enlarged_by_a_cubic_that_stays_within_its_colours():
    image = np.random.default_rng(0).integers(0, 2, (6, 5, 3), np.uint8) * 255
    found = image_tensor(image, Warp(), 12)
    pixels = torch.from_numpy(image).float().permute(2, 0, 1)[None]
    cubic = torch.nn.functional.interpolate(pixels, (12, 12), mode="bicubic", align_corners=False)[0]
    assert cubic.min() < -20 and cubic.max() > 275
    expected = (cubic.clamp(0, 255) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_normals_that_cancel_each_other_are_no_label():
    normals = np.zeros((1, 2, 3), np.float32)
    normals[0, :, 0] = 1, -1
    found = label_tensor(normals, NORMALS, Warp(), 3)[:, 1]
    assert found.T.tolist() == [[1, 0, 0], [255] * 3, [-1, 0, 0]]


def test_what_is_transparent_is_white():
    assert (pixels_of(Image.new("RGBA", (8, 8)), 8)[0] == 255).all()


def test_depth_is_no_picture(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "far" / "1.npy").unlink()
    write_png(tmp_path / "far" / "1.png", np.ones((8, 8)))
    with pytest.raises(UserError, match=r"lacks far/1\.npy"):
        DenseDataset(tmp_path, "train", size=8)


def test_an_image_is_reduced_by_its_shorter_side():
    assert pixels_of(Image.new("RGB", (64, 8)), 8)[0].shape == (8, 64, 3)
    assert pixels_of(Image.new("RGB", (64, 16)), 8)[0].shape == (8, 32, 3)
    assert pixels_of(Image.new("RGB", (35, 16)), 8)[0].shape == (8, 17, 3)  # no column is of half a pixel


def test_what_lies_outside_of_an_image_is_black():
    found = image_tensor(np.full((8, 8, 3), 255, np.uint8), Warp(scale=0.5), 8)
    black = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    assert found[:, 0, 0].tolist() == pytest.approx(black) == found[:, 4, 7].tolist()
    assert found[0, 4, 4].item() == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)


def test_colours_say_what_a_map_holds_and_black_is_no_label():
    towards_right_down = [[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [255.0, 255.0, 255.0]]
    colours = [[127, 127, 255], [255, 127, 127], [127, 255, 127], [0, 0, 0]]
    assert picture_of(NORMALS, np.array([towards_right_down])).tolist() == [colours]
    near_far_none = np.array([[1.0, 3.0, 255.0]])
    assert picture_of(DEPTH, near_far_none, (1.0, 3.0))[0, :, 0].tolist() == [255, 40, 0]
    salient = Task("t", 0, kind="saliency")
    assert picture_of(salient, np.array([[1.0, 0.0, 255.0]]))[0, :, 0].tolist() == [255, 40, 0]
    classes = picture_of(SEMANTIC, np.array([[0, 1, 3, 255]]))[0].tolist()
    assert classes[0] == [70, 70, 70] and classes[3] == [0, 0, 0] and len({*map(tuple, classes)}) == 4


def test_a_map_may_have_a_third_axis_of_one_channel(tmp_path):
    make_folder(tmp_path)
    before = DenseDataset(tmp_path, "train", size=8)[0]["labels"]["far"]
    write_npy(tmp_path / "far" / "1.npy", np.load(tmp_path / "far" / "1.npy")[..., None])
    assert torch.equal(DenseDataset(tmp_path, "train", size=8)[0]["labels"]["far"], before)


def test_normals_of_another_size_than_their_classes_are_named(tmp_path):
    data = DenseDataset(make_pascal(tmp_path), "train")
    write_png(tmp_path / "normals_distill" / f"{data.ids[0]}.png", np.full((4, 5, 3), 255))
    with pytest.raises(UserError, match=r"\.png is \(4, 5\) high and wide, but .*\.mat is \(4, 6\)"):
        data[0]


def test_a_study_reads_the_list_of_the_split(tmp_path):
    images = Images(TaskSet.from_json(TASKS))
    assert images.files(make_folder(tmp_path)) == [tmp_path / "train.txt"]
    assert images.files(tmp_path, ["things"]) == [tmp_path / "test.txt"]
    assert images.training(tmp_path, tmp_path, 0).records == dict.fromkeys(("things", "front", "far", "normal"), 2)
    assert images.questions(tmp_path, tmp_path, ["far"], 0).records == {"far": 1}
