"""Trainings on images and texts: as a plain loop, resumed, by recipes, and with batches of one task."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import datasets
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_text_cases import DIM, GRID, PICTURES, TASKS
from launches import curve, weights
from shared import PROJECT
from transformers import AutoTokenizer, set_seed

import mtl_lora
from mtl_lora import UserError
from mtl_lora.base_model import BaseModel
from mtl_lora.cli import parse
from mtl_lora.image_text import model as visual
from mtl_lora.image_text.config import EvalConfig, TrainConfig
from mtl_lora.image_text.data import Encoder, training_rows
from mtl_lora.image_text.model import VisualConfig
from mtl_lora.image_text.train import ImageTextRun
from mtl_lora.training.sampler import LengthGroupedBatchSampler, RoundRobinSampler

STEPS = 20


# ---- a plain loop ----


def answer_of(record: dict, index: int, seed: int, epoch: int) -> tuple[str, float]:
    """The answer that is learned from a record in an epoch, and its soft score."""
    if "answer" in record:
        return record["answer"], 1.0
    draw = random.Random(f"{seed} {epoch} {index}")
    (answer,) = draw.choices(list(record["answers"]), list(record["answers"].values()))
    return answer, record["answers"][answer]


def one_example(model, tokenizer, record: dict, answer: str, features: torch.Tensor) -> torch.Tensor:
    """The cross-entropies of the tokens of one example's answer, by a forward of its own."""
    task = next(task for task in TASKS if task["name"] == record["task"])
    prompt = task["prompt"].replace("{text}", record.get("text", ""))
    common = {"features": features[None], "task_ids": [record["task"]]}
    if model.config.is_encoder_decoder:
        target = torch.tensor(tokenizer(answer)["input_ids"])
        start = torch.tensor([model.config.decoder_start_token_id])
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        logits = model(input_ids=ids[None], decoder_input_ids=torch.cat([start, target[:-1]])[None], **common).logits[0]
    else:
        ids = torch.tensor(tokenizer(prompt)["input_ids"])
        target = torch.tensor([*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id])
        logits = model(input_ids=torch.cat([ids, target])[None], **common).logits[0, -len(target) - 1 : -1]
    return F.cross_entropy(logits, target, reduction="none")


def plain_losses(config: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of every step and the weights after the last, of a loop that knows neither system nor Trainer.

    It takes the same batches; records and features are read as they stand, the tokenizer encodes by itself, and every
    example is a forward of its own.
    """
    tasks = config.read_tasks()
    set_seed(config.seed)
    images = VisualConfig(dim=DIM, grid=GRID, pool=config.pool, images=config.images)
    model = visual.with_images(BaseModel(config.base_model, kind="text_generator").load("fp64"), images).train()
    mtl_lora.inject(model, visual.in_language_model(config.adapter_config(tasks), model))
    with open(config.data_path) as opened:
        records = json.load(opened)
    with h5py.File(config.features[0]) as opened:
        features = {name: torch.tensor(group["features"][()]) for name, group in opened.items()}
    tokenizer, names = AutoTokenizer.from_pretrained(config.base_model), tasks.names
    ids = np.array([names.index(record["task"]) for record in records])
    captions = [record["answer"] for record in records if record["task"] == "caption"]
    starts = [" ", 1] if not model.config.is_encoder_decoder else ["", 0]  # what an answer has besides the tokenizer's
    mean = np.mean([len(tokenizer(starts[0] + each)["input_ids"]) + starts[1] for each in captions])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    if config.task_batches == "round_robin":
        sampler = RoundRobinSampler(ids, config.batch_sizes(tasks), config.seed)
    else:
        counted = training_rows(config.data_path, Encoder(tokenizer, model.config, 64, tasks), config.cache_dir)
        lengths = np.array(counted["length"]) + np.array(counted["image_count"]) * images.tokens
        sampler = LengthGroupedBatchSampler(lengths, ids, config.batch_size, config.seed)
    found = []
    while len(found) < STEPS:
        epoch = len(found) // len(sampler)
        sampler.set_epoch(epoch)
        for indices in list(sampler)[: STEPS - len(found)]:
            total = weight = 0.0
            for index in indices:
                record = records[index]
                answer, score = answer_of(record, index, config.seed, epoch)
                shown = record["image"] if isinstance(record["image"], list) else [record["image"]]
                losses = one_example(model, tokenizer, record, answer, torch.stack([features[name] for name in shown]))
                share = len(losses) / mean if record["task"] == "caption" else 1.0
                total, weight = total + score * share * losses.mean(), weight + share
            loss = total / weight
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
    return found, {
        name.replace(".base_layer", ""): each for name, each in model.named_parameters() if each.requires_grad
    }


def test_rows_of_one_and_two_images_keep_to_the_token_budget():
    """A batch is padded to its longest text and to its most pictures, whichever rows have them."""
    generator = np.random.default_rng(0)
    columns = {
        "length": generator.integers(8, 60, 300),
        "image_count": generator.integers(1, 3, 300),
        "task_id": np.zeros(300, int),
    }
    columns = {name: values.tolist() for name, values in columns.items()}
    run = ImageTextRun.__new__(ImageTextRun)
    run.config, run.images = TrainConfig(token_budget=1024), VisualConfig(dim=4, grid=7, pool=7, images=2)
    run.train = datasets.Dataset.from_dict(columns)
    lengths, _ = run.plan(None)
    sampler = LengthGroupedBatchSampler(lengths, np.zeros(300, int), 8, 0, token_budget=1024)
    texts, pictures = np.array(columns["length"]), np.array(columns["image_count"])
    sizes = [len(rows) * (texts[rows].max() + pictures[rows].max() * 49) for rows in sampler]
    assert run.images.tokens == 49 and max(sizes) <= 1024 < 2 * max(sizes)
    assert (run._lengths(run.train) == texts + 49 * pictures).all()  # of rows by themselves


def test_defaults_are_those_of_the_original():
    found = {each.name: each.default for each in dataclasses.fields(TrainConfig)}
    assert (found["learning_rate"], found["warmup_ratio"]) == (1e-3, 0.03)


@pytest.mark.slow(6)
@pytest.mark.parametrize("kind", ["bart", "causal"])
def test_twenty_losses_equal_those_of_a_plain_loop(kind, train, settings, still, request):
    flags = {
        "base_model": still(request.getfixturevalue(kind)),
        "dtype": "fp64",
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": STEPS,
    }
    if kind == "bart":
        flags |= {"task_batches": "round_robin", "task_batch_sizes": ["vqa=3", "caption=5"]}
    folder = train("run", **flags)
    expected, trained = plain_losses(TrainConfig(**settings("run", **flags)))
    assert curve(folder) == pytest.approx(expected, rel=0, abs=1e-6)
    saved = weights(folder)
    assert saved.keys() - trained.keys() == {"visual_embedding.object_order"}
    for name, weight in trained.items():
        torch.testing.assert_close(
            saved[name], weight.detach(), rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    record = json.loads((folder / "run.json").read_text())
    assert record["mean_answer_tokens"].keys() == {"caption"}


# ---- resume, recipes ----


def test_held_out_questions_keep_their_answers_from_epoch_to_epoch(train):
    still = {"learning_rate": 1e-12, "lora_dropout": 0.0, "batch_size": 4, "warmup_ratio": 0.0}
    folder = train("run", max_steps=9, save_step=3, val_set_size=6, **still)
    found = curve(folder, "eval_loss")
    assert len(found) == 3 and found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.slow
def test_a_run_with_dropout_and_drawn_answers_resumes_bit_for_bit_with_its_own_features(
    train, settings, pictures, tmp_path
):
    flags = {"lora_dropout": 0.1, "max_steps": 10, "save_step": 4, "val_set_size": 6}  # six steps an epoch
    folder = train("run", **flags)
    again = train("again", **flags, resume_from_checkpoint=str(folder / "checkpoint-8"))  # in the second epoch
    assert curve(again) == curve(folder)[8:]
    whole, resumed = weights(folder), weights(again)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    model = mtl_lora.load(folder / "checkpoint-8")
    assert model.visual_embedding.config.pool == 2
    assert TrainConfig(**settings("run")).count() == mtl_lora.trainable_parameters(model)
    with h5py.File(shutil.copy(pictures / "features.h5", tmp_path / "other.h5"), "r+") as opened:
        opened[f"{PICTURES[0]}/features"][...] += 1
    other = flags | {"features": [str(tmp_path / "other.h5")]}
    with pytest.raises(UserError, match="the features"):
        train("run", **other, resume_from_checkpoint=str(folder / "checkpoint-4"))


def called_with(tmp_path, script: str, *arguments: str, **environment: str) -> list[str]:
    """The arguments with which a recipe starts Python."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"VENV": "", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | environment
    command = ["bash", str(PROJECT / "script" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


WITH_NORMS = {"modules_to_save": ["*.bias", "*layer_norm.weight", "*layernorm_embedding.weight"]}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "vlbart_mlora.sh",
            {"num_B": 2, "temperature": 0.8, "batch_size": 512, "warmup_ratio": 0.03, "lora_dropout": 0, **WITH_NORMS},
        ),
        (
            "vlbart_lora.sh",
            {"lora_dropout": 0.1, "batch_size": 500, "warmup_ratio": 0.1, "modules_to_save": ["*.bias"]},
        ),
        ("vlbart_dora.sh", {"lora_dropout": 0, "batch_size": 300, "warmup_ratio": 0.1, **WITH_NORMS}),
    ],
)
def test_a_recipe_has_the_originals_settings(script, expected, tmp_path):
    tasks = [*TASKS, {"name": "gqa", "id": 3}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    places = {"TASKS_FILE": str(tmp_path / "tasks.json"), "DATASETS": "/sets"}
    door, *flags = called_with(tmp_path, script, "64", "16", **places)
    assert Path(door).name == "finetune.py"
    place = flags.index("--system")
    config = parse(TrainConfig, flags[:place] + flags[place + 2 :], "")
    common = {"lora_r": 64, "lora_alpha": 16, "num_epochs": 20, "max_grad_norm": 5, "weight_decay": 0.01, "seed": 9595}
    common |= {
        "dtype": "fp32",
        "learning_rate": 1e-3,
        "pool": 6,
        "lora_target_modules": ["q_proj", "v_proj"],
        "deepspeed": None,
    }
    expected = common | expected
    assert {name: getattr(config, name) for name in expected} == expected
    b = config.batch_size
    sizes = {"vqa": b, "nlvr": b * 20 // 60, "caption": b * 50 // 60, "gqa": b * 100 // 60}
    assert config.batch_sizes(config.task_set()) == sizes
    assert config.features[2] == "/sets/GQA/clip_features/data_clip_RN101_att"

    halves = called_with(tmp_path, script, "64", "16", **places, ACCUMULATION="2", BATCH_SIZE="120")
    assert "gqa=100,nlvr=20,caption=50" in halves and "60" in halves


@pytest.mark.parametrize(("environment", "beams"), [({}, 1), ({"BEAMS": "5"}, 5)])
def test_the_evaluation_of_a_recipe_has_beams_as_a_setting(environment, beams, tmp_path):
    _, *flags = called_with(tmp_path, "vlbart_eval.sh", "run", "out", "--limit", "3", **environment)
    config = parse(EvalConfig, flags, "")
    expected = {"checkpoint": "run", "output_dir": "out", "num_beams": beams, "official": True, "limit": 3}
    assert {name: getattr(config, name) for name in expected} == expected


# ---- batches of one task ----


def test_a_step_of_one_task_takes_each_example_once_an_epoch():
    ids = np.array([0] * 13 + [1] * 4 + [3] * 9)
    sizes = {"a": 4, "b": 8, "none": 5, "c": 3}
    one = RoundRobinSampler(ids, sizes, seed=7)
    first = [sorted(step) for step in one]
    assert sorted(index for step in first for index in step) == list(range(len(ids)))
    assert len(one) == 4 + 1 + 3
    assert sorted((int(ids[step[0]]), len(step)) for step in first) == sorted(
        [(0, 4)] * 3 + [(0, 1), (1, 4)] + [(3, 3)] * 3
    )
    assert all(len({int(ids[index]) for index in step}) == 1 for step in first)
    assert [sorted(step) for step in RoundRobinSampler(ids, sizes, seed=7)] == first
    one.set_epoch(1)
    second = [sorted(step) for step in one]
    assert second != first and sorted(map(len, second)) == sorted(map(len, first))
    orders = {tuple(int(ids[step[0]]) for step in one) for epoch in range(5) if not one.set_epoch(epoch)}
    assert len(orders) == 5, "tasks alternate at random"

    half = {"a": 2, "b": 2, "none": 2, "c": 1}
    whole = RoundRobinSampler(ids, {name: 2 * size for name, size in half.items()}, seed=7)
    halves = [RoundRobinSampler(ids, half, seed=7, world_size=2, rank=rank) for rank in (0, 1)]
    together = [a + b for a, b in zip(*halves, strict=True)]
    assert [sorted(step) for step in whole if len(step) > 1] == [sorted(step) for step in together]
    assert "left out" not in str(whole) and "; 2 of 26 examples left out" in str(halves[0])
    with pytest.raises(UserError, match=r"^4 training examples of b are too few.* 5 x 1 "):
        RoundRobinSampler(ids, sizes, seed=7, accumulation=5)
