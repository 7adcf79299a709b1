"""Steps that are recorded as CUDA graphs: what their tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launches import curve, weights
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from mtl_lora.adapter import routing
from mtl_lora.training import cuda_graphs

METHODS = ("mtl_lora", "lora", "dora", "multilora", "moelora", "hydralora", "none")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class OnMeta(TorchDispatchMode):
    """Counts operations and refuses those of a tensor of numbers: meta tensors have none, as those of a graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.count = 0
        monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # as it is while a stream records
        monkeypatch.setattr(routing.Route, "_resolved", lambda route, _: route.task_ids)  # CUDA checks on the device
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        tensors = [each for each in _pytree.tree_leaves((args, kwargs, found)) if isinstance(each, torch.Tensor)]
        assert all(each.is_meta for each in tensors), f"{operation} moves between the device and the CPU"
        self.count += 1
        return found


def assert_stays_on_device(model: nn.Module, losses: Callable, batch: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where an operation of a step on the meta device reads from it or copies to it, or a weight has no gradient.

    losses: as of ``MultiTaskTrainer``.
    """
    with OnMeta(monkeypatch) as counted:
        found, ones, _ = losses(model, batch)
        (found * ones).sum().backward()
    assert counted.count > 100
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def assert_replays_train_alike(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, replays: int, **flags
) -> None:
    """Fail where a training with at least so many replayed steps is not the one whose steps run as they are.

    train: the fixture; flags: besides those that both trainings share. They have the same padded batches, whose dropout
    masks have their shape.
    """
    flags |= {"lora_r": 8, "max_steps": 16, "val_set_size": 9, "save_step": 5, "dtype": "fp64", "cuda_graphs": True}
    with monkeypatch.context() as as_it_is:
        as_it_is.setattr(cuda_graphs.GraphedSteps, "__call__", lambda self, batch, total: self.step(batch, total))
        plain = train("plain", **flags)
    replayed, replay = [], cuda_graphs._Recorded.replay
    monkeypatch.setattr(cuda_graphs._Recorded, "replay", lambda *args: replayed.append(1) or replay(*args))
    graphs = train("graphs", **flags)
    assert len(replayed) >= replays
    for key in ("loss", "eval_loss"):
        assert curve(graphs, key) == pytest.approx(curve(plain, key), rel=1e-9), key
    expected, found = weights(plain), weights(graphs)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")
