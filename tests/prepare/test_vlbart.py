"""The reader of VL-Adapter's data folder, on a made-up folder of its layout."""

import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from mtl_lora.image_text.examples import load_examples
from mtl_lora.image_text.features import FeatureStore
from mtl_lora.image_text.tasks import VLBART, TaskSet
from mtl_lora.image_text.vlbart import Source, read_gqa

COCO = "COCO_{}2014_{:012d}"


def question(number: int, image: str, label: dict, **fields) -> dict:
    return {"question_id": number, "img_id": image, "sent": f"question {number}?", "label": label, **fields}


def statement(part: str, fields: str, label: int) -> dict:
    stem = f"{part}-{fields.rsplit('-', 1)[0]}"
    sides = {f"img{side}": f"{stem}-img{side}" for side in (0, 1)}
    return {"identifier": f"{part}-{fields}", "uid": fields, "sent": f"text {fields[-1]}", "label": label, **sides}


FILES = {
    "vqa/karpathy_train.json": [
        question(1, COCO.format("train", 1), {"yes": 1, "maybe": 0.3}, answer_type="yes/no"),
        question(2, COCO.format("val", 2), {}),
    ],
    "vqa/karpathy_val.json": [question(3, COCO.format("val", 3), {"two": 0.6}, answer_type="number")],
    "vqa/karpathy_test.json": [
        {key if key != "sent" else "question": value for key, value in question(4, COCO.format("val", 4), {}).items()}
    ],
    "vqa/v2_mscoco_val2014_annotations.json": {
        "annotations": [
            {"question_id": number, "answers": [{"answer": answer} for answer in ["two", "2", " "] + ["a few"] * 7]}
            for number in (2, 3, 4)
        ]
    },
    "GQA/train.json": [question(1, "107", {"left": 1.0})],
    "GQA/valid.json": [question(number, str(200 + number % 20), {"red": 1.0}) for number in range(40)],
    "GQA/testdev.json": [question(9, "n16", {"yes": 1.0})],
    "nlvr/train.json": [statement("train", "10-0-0", 1), statement("train", "10-1-0", 0)],
    "nlvr/valid.json": [statement("dev", "5-0-1", 1)],
    "nlvr/test.json": [statement("test1", "7-0-0", 0), statement("test1", "7-1-0", 1), statement("test1", "7-0-1", 1)],
    "COCO/dataset_coco.json": {
        "images": [
            {
                "filename": f"{COCO.format(*image)}.jpg",
                "split": split,
                "sentences": [{"raw": "A  cat."}, {"raw": "Cats"}],
            }
            for image, split in (
                (("train", 1), "train"),
                (("val", 2), "restval"),
                (("val", 3), "val"),
                (("val", 4), "test"),
            )
        ]
    },
}
IMAGES = {
    "COCO": [COCO.format("train", 1), *(COCO.format("val", number) for number in (2, 3, 4))],
    "VG": ["107", *map(str, range(200, 220))],
    "GQA": ["n16"],
    "nlvr": [
        f"{stem}-img{side}"
        for stem in ("train-10-0", "train-10-1", "dev-5-0", "test1-7-0", "test1-7-1")
        for side in (0, 1)
    ],
}


@pytest.fixture
def world(tmp_path):
    """The folder, and where to write."""
    source, output = tmp_path / "datasets", tmp_path / "out"
    for name, value in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(json.dumps(value))
    for folder, images in IMAGES.items():
        features = source / folder / "clip_features" / "data_clip_RN101_att"
        features.mkdir(parents=True)
        for image in images:
            with h5py.File(features / f"{image}.h5", "w") as opened:
                opened.create_dataset(f"{image}/features", data=np.zeros((4, 3), np.float16))
    return SimpleNamespace(set=["vlbart"], source=source, output=output, flags={"--output_dir": output})


def test_four_tasks_become_examples_that_training_reads_with_features(run, world):
    printed = run()
    tasks = TaskSet.load(world.output / "tasks.json")
    assert tasks == VLBART
    store = FeatureStore(printed.split("--features ")[1].strip().split(","))
    read = load_examples(world.output / "train.json", tasks)
    sets = {"train": json.loads((world.output / "train.json").read_text())}
    for part in ("dev", "test"):
        sets[part] = []
        for name in tasks.names:
            path = world.output / part / name / "test.json"
            read += load_examples(path, tasks, closed=True)
            sets[part] += json.loads(path.read_text())
    store.check(image for example in read for image in example.images)
    assert (len(store), store.grid, store.dim) == (36, 2, 3)

    vqa = {part: [example for example in found if example["task"] == "vqa"] for part, found in sets.items()}
    answers = ["two", "2", " "] + ["a few"] * 7
    assert vqa == {
        "train": [
            {
                "task": "vqa",
                "image": COCO.format("train", 1),
                "text": "question 1?",
                "answers": {"yes": 1, "maybe": 0.3},
                "kind": "yes/no",
            },
            {"task": "vqa", "image": COCO.format("val", 2), "text": "question 2?", "answers": {}},
        ],
        "dev": [
            {
                "task": "vqa",
                "image": COCO.format("val", 3),
                "text": "question 3?",
                "answers": {"two": 0.6},
                "annotators": answers,
                "kind": "number",
            }
        ],
        "test": [
            {
                "task": "vqa",
                "image": COCO.format("val", 4),
                "text": "question 4?",
                "answers": {"two": 1 / 3, "2": 1 / 3, "a few": 1.0},
                "annotators": answers,
            }
        ],
    }
    gqa = {part: [example for example in found if example["task"] == "gqa"] for part, found in sets.items()}
    dev = {example["image"] for example in gqa["dev"]}
    assert len(dev) == 2 and len(gqa["dev"]) == 4 and not dev & {example["image"] for example in gqa["train"]}
    assert len(gqa["train"]) == 1 + 36 and gqa["test"] == [
        {"task": "gqa", "image": "n16", "text": "question 9?", "answers": {"yes": 1.0}}
    ]
    nlvr = [example for example in sets["test"] if example["task"] == "nlvr"]
    assert nlvr[1] == {
        "task": "nlvr",
        "image": ["test1-7-1-img0", "test1-7-1-img1"],
        "text": "text 0",
        "answer": "true",
        "group": "test1-7-0",
    }
    assert [example["group"] for example in nlvr] == ["test1-7-0", "test1-7-0", "test1-7-1"]
    captions = {part: [example for example in found if example["task"] == "caption"] for part, found in sets.items()}
    assert [(each["image"][5:8], each["answer"]) for each in captions["train"]] == [
        ("tra", "A cat."),
        ("tra", "Cats"),
        ("val", "A cat."),
        ("val", "Cats"),
    ]
    assert captions["test"] == [{"task": "caption", "image": COCO.format("val", 4), "answers": ["A cat.", "Cats"]}]


def test_some_tasks_need_their_own_files_alone(run, world):
    (world.source / "COCO" / "dataset_coco.json").unlink()
    (world.source / "vqa" / "karpathy_val.json").unlink()
    run("--tasks", "nlvr,gqa", "--limit", 1)
    tasks = TaskSet.load(world.output / "tasks.json")
    assert [(task.name, task.id) for task in tasks] == [("gqa", 0), ("nlvr", 1)]
    train = load_examples(world.output / "train.json", tasks)
    assert [len({each.images for each in train if each.task_id == task_id}) for task_id in (0, 1)] == [1, 1]


def test_an_empty_list_of_tasks_is_all(run, world):
    run("--tasks=")
    assert len(TaskSet.load(world.output / "tasks.json").names) == 4


def test_every_missing_or_malformed_file_is_named_at_once(refused, world):
    source = world.source

    def change(name: str, value: object) -> None:
        (source / name).write_text(json.dumps(value))

    (source / "vqa" / "karpathy_train.json").unlink()
    change("vqa/karpathy_val.json", [question(3, COCO.format("val", 3), {"two": 1.5})])
    change("vqa/karpathy_test.json", [question(5, COCO.format("val", 4), {})])
    change("GQA/train.json", {"a": 1})
    (source / "GQA" / "valid.json").write_text("[")
    change("GQA/testdev.json", [question(9, "n16", {}), {"img_id": "n16"}])
    change(
        "nlvr/train.json",
        [{**statement("train", "10-0-0", 1), "label": 2}, {**statement("train", "10-0-0", 1), "sent": " "}],
    )
    change("COCO/dataset_coco.json", {"images": [{"filename": "a.jpg", "split": "train", "sentences": []}]})
    for number in (0, 1):
        (source / "nlvr" / "clip_features" / "data_clip_RN101_att" / f"test1-7-{number}-img1.h5").unlink()
    sentence = refused()
    for words in (
        "vqa/karpathy_train.json: it is missing",
        "vqa/karpathy_val.json: example 0: the score of 'two' is 1.5",
        "vqa/karpathy_test.json: the question 5 has no answers in vqa/v2_mscoco_val2014_annotations.json",
        "GQA/train.json: it must hold a JSON list",
        "valid.json is not JSON",
        "GQA/testdev.json: example 0 has no answer with a score above 0; remove the example from the test set "
        "(the first of 2)",
        "must be 0 or 1, not 2",
        "COCO/dataset_coco.json: ",
        "image 0 must have filename, split and sentences",
        "nlvr/clip_features/data_clip_RN101_att: test1-7-0-img1.h5 is missing (the first of 2)",
    ):
        assert words in sentence


def test_two_hundred_images_of_gqas_valid_are_its_dev_set(tmp_path):
    sizes = {"train": 1, "valid": 2100, "testdev": 1}
    for part, count in sizes.items():
        path = tmp_path / "GQA" / f"{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([question(number, f"{part}{number}", {"a": 1.0}) for number in range(count)]))
    found = {part: len(examples) for part, examples in read_gqa(Source(tmp_path)).items()}
    assert found == {"train": 1901, "dev": 200, "test": 1}
