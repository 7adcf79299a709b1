"""The whole path on a folder in VL-Adapter's layout: prepare, train MTL-LoRA on a tiny random BART until it knows its
examples by their pictures, stopped half way and resumed, evaluate as the original, and all four metrics against values
worked out by hand."""

import json
import math
import shutil
from pathlib import Path

import h5py
import pytest
import torch
from good_inputs import run, write
from image_text_cases import make_bart
from launches import curve, weights

from mtl_lora.results import Results

pytestmark = pytest.mark.slow(10)
STEPS = 56
FEATURES = "clip_features/data_clip_RN101_att"
COLORS = ["red", "blue", "green", "two"]
SIDES = ["left", "right"]
CAPTIONS = ["a red dog on the box", "the blue ball is left", "three green box on right", "two dog on the right"]
# Of each the references: beside others, alone, in another order, and none of its words.
REFERENCES = [[CAPTIONS[0], "what is what"], [CAPTIONS[1]], ["right on box green three"], ["what a ball"]]
PAIRS = [(0, 1), (1, 0), (2, 3), (3, 2)]


def coco(number: int) -> str:
    return f"COCO_val2014_{number:012d}"


def vqa(number: int, answers: dict) -> dict:
    return {"question_id": number, "img_id": coco(number), "sent": "what is on the box?", "label": answers}


def gqa(number: int, answer: str) -> dict:
    return {"question_id": number, "img_id": str(number), "sent": "is the dog left or right?", "label": {answer: 1.0}}


def nlvr(part: str, index: int, label: int) -> dict:
    sides = {f"img{side}": f"train-{number}-0-img{side}" for side, number in enumerate(PAIRS[index])}
    text = ["the left is red.", "the right is blue."][index // 2]
    return {"identifier": f"{part}-{index // 2}-{index % 2}-0", "sent": text, "label": label, **sides}


# What four people of ten say is right. Officially all is lost where they all write a capital or a word for a number.
PEOPLE = [["red"] * 3 + ["rose"] * 7, ["blue."] * 5 + ["azure"] * 5, ["Green"] * 10, ["two"] * 10]
OFFICIAL = [0.9, 1.0, 0.0, 0.0]
FILES = {
    "vqa/karpathy_train.json": [vqa(number, {answer: 1}) for number, answer in enumerate(COLORS)],
    "vqa/karpathy_val.json": [vqa(0, {"red": 1})],
    "vqa/karpathy_test.json": [vqa(number, {answer: 1}) for number, answer in enumerate(COLORS)],
    "vqa/v2_mscoco_val2014_annotations.json": {
        "annotations": [
            {"question_id": number, "answers": [{"answer": answer} for answer in answers]}
            for number, answers in enumerate(PEOPLE)
        ]
    },
    "GQA/train.json": [gqa(number, side) for number, side in enumerate(SIDES)],
    "GQA/valid.json": [gqa(number, side) for number, side in enumerate(SIDES)],
    "GQA/testdev.json": [gqa(0, "left"), gqa(1, "Right")],  # compared as they are written: the second is wrong
    "nlvr/train.json": [nlvr("train", index, index % 2) for index in range(4)],
    "nlvr/valid.json": [nlvr("dev", 0, 0)],
    "nlvr/test.json": [nlvr("test1", index, label) for index, label in enumerate([0, 1, 0, 0])],  # the last is wrong
    "COCO/dataset_coco.json": {
        "images": [
            {"filename": f"{coco(number % 4)}.jpg", "split": split, "sentences": [{"raw": text} for text in texts]}
            for split in ("train", "val", "test")
            for number, texts in enumerate([[text] for text in CAPTIONS] if split == "train" else REFERENCES)
        ]
    },
}
IMAGES = {
    "COCO": [coco(number) for number in range(4)],
    "VG": ["0", "1"],
    "GQA": ["2"],
    "nlvr": [f"train-{number}-0-img{side}" for number in range(4) for side in (0, 1)],
}


@pytest.fixture(scope="module")
def learned(cache_dir, tmp_path_factory) -> Path:
    """A folder with the prepared sets in ``sets``, a training in ``whole``, and in ``run`` the same one, resumed from
    what a kill half way would have left."""
    root = tmp_path_factory.mktemp("original")
    (root / "bart").mkdir()
    make_bart(root / "bart", width=48, spread=0.2, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    for name, value in FILES.items():
        write(root / "datasets" / name, value)
    for folder, images in IMAGES.items():
        (root / "datasets" / folder / FEATURES).mkdir(parents=True)
        for image in images:
            with h5py.File(root / "datasets" / folder / FEATURES / f"{image}.h5", "w") as opened:
                features = torch.randn(49, 8, generator=generator).half().numpy()
                opened.create_group(image)["features"] = features
    done = run(["prepare", "vlbart", f"--source={root / 'datasets'}", f"--output_dir={root / 'sets'}"])
    assert done.code == 0, done.err
    features = done.out.split("--features ")[1].strip()
    flags = ["--system=image_text", f"--base_model={root / 'bart'}", f"--data_path={root / 'sets' / 'train.json'}"]
    flags += [f"--tasks_file={root / 'sets' / 'tasks.json'}", f"--features={features}", "--pool=3"]
    flags += [f"--cache_dir={cache_dir}", "--dtype=fp32", f"--save_step={STEPS // 2}", "--logging_steps=1"]
    flags += ["--batch_size=16", f"--max_steps={STEPS}", "--learning_rate=1e-2"]
    flags += ["--adapter_name=mtl_lora", "--lora_r=8", "--num_B=2", "--temperature=0.8", "--lora_dropout=0.01"]
    flags += ["--lora_target_modules=q_proj,k_proj,v_proj,out_proj,fc1,fc2"]
    flags += ["--modules_to_save=*.bias,*layer_norm.weight,*layernorm_embedding.weight"]
    done = run(["train", *flags, f"--output_dir={root / 'whole'}"])
    assert done.code == 0, done.err
    shutil.copytree(root / "whole", root / "run")
    shutil.rmtree(root / "run" / f"checkpoint-{STEPS}")
    (root / "run" / "mtl_lora.safetensors").unlink()
    done = run(["train", *flags, f"--output_dir={root / 'run'}", "--resume_from_checkpoint=True"])
    assert done.code == 0, done.err
    return root


def evaluated(learned: Path, name: str, *flags: str) -> Results:
    flags = [f"--data_dir={learned / 'sets' / 'test'}", f"--output_dir={learned / name}", "--dtype=fp32", *flags]
    done = run(["evaluate", f"--checkpoint={learned / 'run'}", *flags])
    assert done.code == 0, done.err
    return Results.load(learned / name)


def test_a_run_that_was_stopped_ends_as_the_whole_one_bit_for_bit(learned):
    whole, resumed = weights(learned / "whole"), weights(learned / "run")
    assert whole.keys() == resumed.keys() and any("lambda" in name for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert curve(learned / "run")[-STEPS // 2 :] == curve(learned / "whole")[STEPS // 2 :]


def test_all_four_metrics_are_those_worked_out_by_hand(learned):
    found = evaluated(learned, "official", "--official", "--caption_tokenizer=simple").tasks
    lines = (learned / "official" / "predictions" / "vqa.jsonl").read_text().splitlines()
    assert [json.loads(line)["parsed"] for line in lines] == COLORS
    assert found["vqa"].value == pytest.approx(sum(OFFICIAL) / 4)
    assert found["vqa"].metric == "vqa_accuracy_official"
    assert found["gqa"].value == 0.5 and found["gqa"].n == 2
    assert (found["nlvr"].value, found["nlvr"].majority) == (0.75, 0.75)
    assert found["nlvr"].others["consistency"].value == 0.5
    caption = found["caption"]
    assert caption.measured["tokenizer"] == "simple"
    # Of CIDEr each caption has 10 times the mean, over references and n = 1 to 4, of a cosine: 1 and 0 of two
    # references, 1 of the only one, 1 for single words alone, 0.
    assert caption.value == pytest.approx((10 / 2 + 10 + 10 / 4 + 0) / 4)
    # Words, pairs, triples and fours that the references have, of all; no caption is shorter than its references.
    right, said = (6 + 5 + 5, 5 + 4, 4 + 3, 3 + 2), (6 + 3 * 5, 5 + 3 * 4, 4 + 3 * 3, 3 + 3 * 2)
    assert caption.others["bleu4"].value == pytest.approx((math.prod(right) / math.prod(said)) ** (1 / 4))


def test_what_was_learned_is_in_the_pictures(learned):
    own, other, none = (
        evaluated(learned, name, "--tasks=vqa,gqa", *flags)
        for name, flags in {"own": [], "other": ["--shuffle_images"], "none": ["--no_images"]}.items()
    )
    parsed = {}
    for name in ("own", "other", "none"):
        lines = (learned / name / "predictions" / "vqa.jsonl").read_text().splitlines()
        parsed[name] = [json.loads(line)["parsed"] for line in lines]
    assert parsed["own"] == COLORS and sorted(parsed["other"]) == sorted(COLORS)
    assert not any(map(str.__eq__, parsed["own"], parsed["other"])), "each question is shown another picture"
    assert len(set(parsed["none"])) == 1, "without pictures all questions are the same"
    assert own.average.value > max(other.average.value, none.average.value)
    assert math.isclose(own.tasks["vqa"].value, sum(OFFICIAL) / 4)
