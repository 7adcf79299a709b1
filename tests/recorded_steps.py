"""Steps that are recorded as CUDA graphs: what their tests share."""

import contextlib

import pytest
import torch
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


@contextlib.contextmanager
def as_it_is(monkeypatch: pytest.MonkeyPatch):
    """A block in which steps that would be recorded run as they are."""
    with monkeypatch.context() as changed:
        changed.setattr(cuda_graphs.GraphedSteps, "__call__", lambda self, batch, total: self.step(batch, total))
        yield


def replays(monkeypatch: pytest.MonkeyPatch) -> list:
    """A list that gets an entry for every step that is replayed from now on."""
    replayed, replay = [], cuda_graphs._Recorded.replay
    monkeypatch.setattr(cuda_graphs._Recorded, "replay", lambda *args: replayed.append(1) or replay(*args))
    return replayed
