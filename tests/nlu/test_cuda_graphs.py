"""Steps that are recorded as CUDA graphs: the same training, and nothing where there is no GPU."""

import contextlib
import json
import shutil

import pytest
import torch
from launches import curve, weights
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import mtl_lora
from mtl_lora.adapter import routing
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.nlu import model as encoders
from mtl_lora.nlu.config import TrainConfig
from mtl_lora.nlu.train import EncoderRun
from mtl_lora.training import cuda_graphs

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
METHODS = ("mtl_lora", "lora", "dora", "multilora", "moelora", "hydralora", "none")


class OnMeta(TorchDispatchMode):
    """Counts operations and refuses those of a tensor of numbers: meta tensors have none, as those of a graph."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        tensors = [each for each in _pytree.tree_leaves((args, kwargs, found)) if isinstance(each, torch.Tensor)]
        assert all(each.is_meta for each in tensors), f"{operation} moves between the device and the CPU"
        self.count += 1
        return found


@pytest.mark.parametrize("method", METHODS)
def test_a_step_neither_waits_for_the_device_nor_copies_to_it(method, settings, monkeypatch):
    config = TrainConfig(**settings("run", adapter_name=method, lora_r=8, lora_dropout=0.1))
    tasks = config.task_set()
    model = encoders.structure(BaseModel(config.base_model, kind=encoders.KIND), tasks)
    mtl_lora.inject(model, encoders.in_encoder(config.adapter_config(tasks), model)).train()
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # as it is while a stream records
    monkeypatch.setattr(routing.Route, "_resolved", lambda route, _: route.task_ids)  # checked on the device by CUDA
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    losses = encoders.TaskLosses(tasks)
    losses.is_regression = losses.is_regression.to("meta")
    ids = torch.zeros(6, 16, dtype=torch.long, device="meta")
    batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ids)
    batch |= {"task_ids": ids[:, 0], "targets": ids[:, 0].double()}
    with OnMeta() as counted:
        found, _, _ = losses(model, batch)
        found.sum().backward()
    assert counted.count > 100
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_replayed_steps_train_the_same_weights(method, dropout, train, encoder, still, monkeypatch):
    base = encoder if dropout else still(encoder)
    flags = {"base_model": base, "adapter_name": method, "lora_r": 8, "lora_dropout": dropout, "max_steps": 16}
    flags |= {"val_set_size": 9, "save_step": 5, "dtype": "fp64"}
    with monkeypatch.context() as as_it_is:  # of the same padded batches, whose dropout masks have their shape
        as_it_is.setattr(cuda_graphs.GraphedSteps, "__call__", lambda self, batch, total: self.step(batch, total))
        plain = train("plain", **flags, cuda_graphs=True)
    replayed, replay = [], cuda_graphs._Recorded.replay
    monkeypatch.setattr(cuda_graphs._Recorded, "replay", lambda *args: replayed.append(1) or replay(*args))
    graphs = train("graphs", **flags, cuda_graphs=True)
    assert len(replayed) >= 8
    assert curve(graphs) == pytest.approx(curve(plain), rel=1e-9)
    assert curve(graphs, "eval_loss") == pytest.approx(curve(plain, "eval_loss"), rel=1e-9)
    expected, found = weights(plain), weights(graphs)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")


@gpu
def test_a_training_of_recorded_steps_resumes(train, encoder):
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
    run = EncoderRun(TrainConfig(**settings("run", base_model=str(folder), cuda_graphs=True)))
    with pytest.raises(UserError, match=r"layerdrop.*no --cuda_graphs"):
        run.structure()


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
