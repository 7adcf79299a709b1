"""The table of cases in which a layer is compared with its formula, and the comparison."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from unittest import mock

import torch
from reference import layers as reference
from reference.tiny import METHODS, TASKS, adapter_config, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtl_lora import route
from mtl_lora.adapter import layer as base_module
from mtl_lora.adapter import routing
from mtl_lora.adapter.layer import layer_class

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
IDS = ("one task", "mixed batch", "per token")
# Of the largest magnitude of what is compared.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 4e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and one batch. Sizes are odd and differ, so that no transposed or wrongly flattened axis fits."""

    method: str
    dtype: torch.dtype = torch.float64
    ids: str = "mixed batch"
    dropout: bool = False
    checkpointing: bool = False
    leading: tuple[int, ...] = (3, 5)
    in_features: int = 12
    out_features: int = 10
    bias: bool = True

    def __str__(self):
        shape = "x".join(map(str, (*self.leading, self.in_features, self.out_features)))
        switches = [name for name in ("dropout", "checkpointing", "bias") if getattr(self, name)]
        return "-".join([self.method, str(self.dtype).removeprefix("torch."), self.ids, shape, *switches])


# Whether the formula is right shows in float64, in every combination; whether the dtypes are handled, in a few.
SWITCHES = list(itertools.product((False, True), (False, True)))
SHAPES = [
    ("one task", (5,), 7, 5),
    ("mixed batch", (5,), 5, 7),
    ("per token", (1, 7), 5, 7),
    ("mixed batch", (1, 7), 7, 5),
]
SHAPES += [("one task", (2, 3, 4), 7, 12), ("mixed batch", (2, 3, 4), 7, 12), ("per token", (2, 3, 4), 12, 7)]
CASES = [
    case
    for method in METHODS
    for case in (
        *(Case(method, torch.float64, ids, *switches) for ids in IDS for switches in SWITCHES),
        *(Case(method, dtype, "mixed batch", *switches) for dtype in DTYPES[1:] for switches in SWITCHES),
        *(Case(method, dtype, "per token", dropout=True) for dtype in DTYPES[1:]),
        *(
            Case(method, ids=ids, leading=leading, in_features=k, out_features=d, bias=bool(index % 2))
            for index, (ids, leading, k, d) in enumerate(SHAPES)
        ),
        Case(method, bias=False),
    )
]


def make_layer(method: str, base: nn.Linear, **changes) -> nn.Module:
    """An adapter layer with random weights around ``base``."""
    config = adapter_config(method, **{"num_B": 2, **changes})
    return randomise(layer_class(config.method)(base.requires_grad_(False), config))


def make_batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., k) and task ids of a case."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*case.leading, case.in_features, generator=generator, dtype=torch.float64).to(case.dtype)
    shape = case.leading[:2] if case.ids == "per token" else case.leading[:1]
    if case.ids == "one task":
        return x, torch.full(shape, 2)
    return x, torch.randint(0, len(TASKS), shape, generator=generator)


@contextlib.contextmanager
def recorded_masks() -> Iterator[list[torch.Tensor]]:
    """What every dropout inside the block multiplied its input with."""
    masks, dropout = [], base_module.dropout

    def recording(x, p):
        dropped = dropout(x, p)
        masks.append((dropped != 0).double() / (1 - p))
        return dropped

    with mock.patch.object(base_module, "dropout", recording):
        yield masks


def compare(case: Case, **changes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a layer computes and what its formula says, on the same numbers: y, and the gradient of x and each weight.

    With dropout the layer runs in training mode, and the formula is given the mask that it drew. The backward pass
    runs under another batch's route and seed, which checkpointing must not read.
    """
    torch.manual_seed(0)
    base = nn.Linear(case.in_features, case.out_features, bias=case.bias).to(case.dtype)
    layer = make_layer(case.method, base, dropout=0.25 * case.dropout, **changes).train(case.dropout)
    x, task_ids = make_batch(case)
    x.requires_grad_(True)
    runs = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    with route.use(task_ids), recorded_masks() as masks:
        if case.checkpointing:
            y = checkpoint(layer, x, use_reentrant=False, context_fn=routing.checkpoint_context)
        else:
            y = layer(x)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(case.dtype)
    torch.manual_seed(1)
    with route.use((task_ids + 1) % len(TASKS)):
        y.backward(grad_y)
    assert len(runs) == 1 + case.checkpointing
    assert len(masks) == case.dropout
    assert y.dtype == x.grad.dtype == case.dtype
    assert all(weight.grad is None for weight in base.parameters())

    exact_x = x.detach().double().requires_grad_(True)
    exact = {name: weight.detach().double().requires_grad_(True) for name, weight in layer.adapter_parameters().items()}
    bias = base.bias.double() if case.bias else None
    mask = masks[0].reshape(x.shape) if masks else None
    config = adapter_config(case.method, **{"num_B": 2, **changes})
    expected = reference.forward(exact_x, task_ids, base.weight.double(), bias, exact, config, mask)
    expected.backward(grad_y.double())
    compared = {"y": (y, expected), "the gradient of x": (x.grad, exact_x.grad)}
    for name, weight in layer.adapter_parameters().items():
        compared[f"the gradient of {name}"] = (weight.grad, exact[name].grad)
    return compared
