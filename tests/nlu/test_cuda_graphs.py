"""Steps that are recorded as CUDA graphs: the same training, and nothing where there is no GPU."""

import contextlib
import json
import shutil

import pytest
import torch
from launches import curve, weights
from recorded_steps import METHODS, assert_replays_train_alike, assert_stays_on_device, gpu
from shared import start

import mtl_lora
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.nlu import model as encoders
from mtl_lora.nlu.config import TrainConfig
from mtl_lora.training import cuda_graphs


@pytest.mark.parametrize("method", METHODS)
def test_a_step_neither_waits_for_the_device_nor_copies_to_it(method, settings, monkeypatch):
    config = TrainConfig(**settings("run", adapter_name=method, lora_r=8, lora_dropout=0.1))
    tasks = config.task_set()
    model = encoders.structure(BaseModel(config.base_model, kind="encoder"), tasks)
    mtl_lora.inject(model, encoders.in_encoder(config.adapter_config(tasks), model)).train()
    losses = encoders.TaskLosses(tasks)
    losses.is_regression = losses.is_regression.to("meta")
    ids = torch.zeros(6, 16, dtype=torch.long, device="meta")
    batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
    batch |= {"task_ids": ids[:, 0], "targets": ids[:, 0].double()}
    assert_stays_on_device(model, losses, batch, monkeypatch)


@gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_replayed_steps_train_the_same_weights(method, dropout, train, encoder, still, monkeypatch):
    base = encoder if dropout else still(encoder)
    flags = {"base_model": base, "adapter_name": method, "lora_dropout": dropout}
    assert_replays_train_alike(train, monkeypatch, replays=8, **flags)


@gpu
def test_a_training_of_recorded_steps_resumes(train):
    flags = {"max_steps": 12, "save_step": 6, "dtype": "fp64", "cuda_graphs": True}
    folder = train("run", **flags)
    again = train("again", **flags, resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert curve(again) == pytest.approx(curve(folder)[6:], rel=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_nothing_is_recorded_and_no_batch_is_longer(train, capsys):
    one, other = weights(train("plain")), weights(train("graphs", cuda_graphs=True))
    assert "--cuda_graphs has no effect here" in capsys.readouterr().err
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepspeed", "config/zero2.json"),
        ("use_gradient_checkpointing", True),
        ("load_in_4bit", True),
        ("token_budget", 512),
        ("gradient_accumulation_steps", 2),
    ],
)
def test_what_cannot_be_recorded_is_refused(settings, name, value):
    with pytest.raises(UserError, match=f"cuda_graphs must be off with --{name}"):
        TrainConfig(**settings("run", cuda_graphs=True, **{name: value}))


def test_an_encoder_that_leaves_out_layers_at_random_is_refused(settings, encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layerdrop": 0.1}))
    with pytest.raises(UserError, match=r"layerdrop.*leave out --cuda_graphs"):
        start("nlu", settings("run", base_model=str(folder), cuda_graphs=True))


def test_what_stops_a_recording_is_said_by_its_first_error(monkeypatch):
    @contextlib.contextmanager
    def recording(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("the end of a recording that has failed")

    def step(batch, total):
        raise RuntimeError("this waits for the device\nand more")

    names = {"graph": recording, "CUDAGraph": object, "Stream": object, "graph_pool_handle": object}
    for name, stand_in in names.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    steps = cuda_graphs.GraphedSteps(step, [])
    with pytest.raises(UserError, match=r"\(this waits for the device\); train without --cuda_graphs"):
        cuda_graphs._Recorded(steps, {}, torch.zeros(()))
