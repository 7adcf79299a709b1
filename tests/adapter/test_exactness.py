"""Every method computes its formula: forward and all gradients against slow references, for every kind of input."""

from pathlib import Path

import pytest
import torch
from reference import layers as reference
from reference.cases import CASES, TOLERANCES, Case, compare, make_layer
from reference.layers import assert_near
from reference.tiny import FACTORED, METHODS, TASKS, adapter_config
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mtl_lora import UserError, route
from mtl_lora.adapter.layer import layer_class

ORIGINAL = Path(reference.__file__).parent / "original_layers.safetensors"


def check(case: Case, **changes) -> None:
    """Compare a layer with its formula."""
    for name, (actual, expected) in compare(case, **changes).items():
        assert_near(actual, expected, TOLERANCES[case.dtype], name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_its_formula(case):
    check(case)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        *((method, {"alpha": 0.5}) for method in METHODS),
        *((method, {"use_rslora": True}) for method in METHODS),
        *((method, {"rank": 1, "num_experts": 1}) for method in METHODS),
        *((method, {"num_B": number}) for method in ("multilora", "mtl_lora", "hydralora") for number in (1, 5)),
        ("mtl_lora", {"temperature": 0.1}),
        ("moelora", {"rank": 8, "num_experts": 4}),
        ("moelora", {"rank": 3, "num_experts": 3}),
        ("moelora", {"task_embedding_dim": 1}),
    ],
    ids=str,
)
def test_layer_follows_every_setting(method, change):
    check(Case(method), **change)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_follows_the_seed_and_stops_at_evaluation(method):
    layer = make_layer(method, nn.Linear(12, 10).double(), dropout=0.5)
    x = torch.randn(4, 6, 12, dtype=torch.float64)

    def run(seed):
        torch.manual_seed(seed)
        with route.use(torch.tensor([0, 1, 2, 3])):
            return layer(x)

    layer.train()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("method", ["lora", "dora", "multilora", "hydralora"])
def test_methods_without_task_weights_need_neither_tasks_nor_a_route(method):
    layer = make_layer(method, nn.Linear(12, 10).double(), tasks=[])
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    config = adapter_config(method, num_B=2)
    expected = reference.forward(x, torch.zeros(3), layer.weight, layer.bias, layer.adapter_parameters(), config)
    assert_near(layer(x), expected, 1e-12, "y")
    assert not layer.needs_task_ids


@pytest.mark.parametrize("method", ["moelora", "mtl_lora", "mtl_lora_diagonal"])
def test_methods_with_task_weights_need_a_route(method):
    layer = make_layer(method, nn.Linear(12, 10))
    assert layer.needs_task_ids
    with pytest.raises(UserError, match="needs task ids"):
        layer(torch.randn(3, 4, 12))


def test_norm_of_dora_is_a_constant_in_the_backward_pass():
    torch.manual_seed(0)
    layer = make_layer("dora", nn.Linear(12, 10).double())
    x = torch.randn(3, 12, dtype=torch.float64)
    layer(x).sum().backward()
    A, B, m = (weight.detach().requires_grad_(True) for weight in (layer.lora_A, layer.lora_B, layer.lora_magnitude))
    adapted = layer.weight + layer.scale * B @ A
    # With a norm that is differentiated too, A and B get another gradient, and m the same.
    nn.functional.linear(x, m[:, None] * adapted / adapted.norm(dim=1, keepdim=True), layer.bias).sum().backward()
    assert_near(layer.lora_magnitude.grad, m.grad, 1e-12, "the gradient of m")
    assert (layer.lora_A.grad - A.grad).abs().max() > 0.01
    assert (layer.lora_B.grad - B.grad).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dora_keeps_a_row_of_zeros(dtype):
    base = nn.Linear(12, 10, bias=False).to(dtype)
    base.weight.data[4] = 0
    layer = layer_class("dora")(base, adapter_config("dora"))
    x = torch.randn(3, 12, dtype=dtype)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.sum().backward()
    for name, weight in layer.adapter_parameters().items():
        assert weight.grad.isfinite().all(), name
    assert torch.equal(layer.merged_weight(), base.weight)


@pytest.mark.parametrize("change", ["trained", "pruned", "cast", "widened"])
def test_dora_follows_a_base_weight_that_changes(change):
    torch.manual_seed(0)
    layer = make_layer("dora", nn.Linear(64, 10).to(torch.float32 if change == "widened" else torch.float64))
    if change == "trained":
        with torch.no_grad():
            layer.base_layer.weight += torch.randn_like(layer.base_layer.weight)
    elif change == "pruned":
        layer.base_layer.weight.data[:, ::2] = 0
    elif change == "cast":
        layer.base_layer.bfloat16().double()
    else:
        layer.double()
    x = torch.randn(3, 64, dtype=torch.float64)
    assert_near(layer(x), nn.functional.linear(x, layer.merged_weight(), layer.bias), 1e-12, "the output")


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_dora_sees_a_small_weight_beside_a_large_bias(size):
    torch.manual_seed(0)
    base = nn.Linear(64, 10).bfloat16()
    base.bias.data.fill_(size)
    layer = make_layer("dora", base)
    norm = (base.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    assert_near(layer.norm(), norm, 5e-3, "the norm")


def test_norm_of_dora_is_exact_inside_autocast():
    torch.manual_seed(0)
    layer = make_layer("dora", nn.Linear(256, 64))
    weight = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(layer.norm(), weight.norm(dim=1), 1e-6, "the norm")


@pytest.mark.parametrize("method", METHODS)
def test_conv1d_is_adapted_as_the_linear_layer_it_is(method):
    torch.manual_seed(0)
    linear, conv = nn.Linear(12, 10).double(), Conv1D(10, 12).double()
    conv.weight.data.copy_(linear.weight.T)
    conv.bias.data.copy_(linear.bias)
    x, task_ids = torch.randn(4, 5, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    layers = [make_layer(method, base) for base in (linear, conv)]
    with route.use(task_ids):
        one, other = (layer(x) for layer in layers)
    assert_near(other, one, 1e-13, "y")
    if method in FACTORED:
        for task in TASKS:
            assert_near(layers[1].merged_weight(task), layers[0].merged_weight(task), 1e-13, task)


# ---- the original implementation ----


def original_weights(label: str) -> dict[str, torch.Tensor]:
    """One layer's weights, its output and its gradients under the original's names."""
    return {
        name.removeprefix(f"{label}."): value
        for name, value in load_file(ORIGINAL).items()
        if name.startswith(f"{label}.")
    }


def ours(label: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's weights (or their gradients) in this library's names and shapes."""
    if label == "moelora":
        experts = range(4)
        return {
            "lora_A": torch.cat([weights[f"lora_A.loraA.{i}.weight"] for i in experts]),
            "lora_B": torch.cat([weights[f"lora_B.loraB.{i}.weight"] for i in experts], dim=1),
            # The original's table has one row more than there are tasks.
            "lora_task_embedding": weights["lora_task_embedding.weight"][:3],
            "lora_gate": weights["lora_gate.GateL.weight"],
        }
    stacked_B = torch.cat(list(weights["lora_B"]), dim=1)
    if label == "multilora":
        lora_A = torch.cat(list(weights["lora_A"]))
        return {"lora_A": lora_A, "lora_B": stacked_B, "lora_scaling": weights["lora_scaling"]}
    return {
        "lora_A": weights["lora_A"][0],
        "lora_lambda": weights["lora_lambdas"],
        "lora_w": weights["lora_B_w"],
        "lora_B": stacked_B,
    }


@pytest.mark.parametrize(
    ("label", "settings", "tolerance"),
    [
        # The original takes the softmax of MTL-LoRA in float32.
        ("mtl_lora", {"num_B": 3, "temperature": 0.5}, 1e-6),
        ("mtl_lora_diagonal", {"num_B": 2, "temperature": 0.1}, 1e-6),
        ("moelora", {"num_experts": 4, "task_embedding_dim": 6}, 1e-12),
        ("multilora", {"num_B": 3}, 1e-12),
    ],
)
def test_layer_equals_the_original_implementation(label, settings, tolerance):
    shared, weights = load_file(ORIGINAL), original_weights(label)
    base = nn.Linear(12, 10, bias=False).double()
    base.weight.data.copy_(shared["W"])
    config = adapter_config(label, **{"rank": 8, "alpha": 16, "tasks": TASKS[:3], **settings})
    layer = layer_class(config.method)(base, config)
    own = ours(label, weights)
    assert own.keys() == layer.adapter_parameters().keys()
    with torch.no_grad():
        for name, value in own.items():
            assert value.shape == layer.get_parameter(name).shape, name
            layer.get_parameter(name).copy_(value)
    x = shared["x"].requires_grad_(True)
    with route.use(shared["task_ids"]):
        y = layer(x)
    y.backward(shared["grad_y"])
    assert_near(y, weights["y"], tolerance, "y")
    assert_near(x.grad, weights["grad.x"], tolerance, "the gradient of x")
    gradients = {name.removeprefix("grad."): value for name, value in weights.items() if name.startswith("grad.")}
    for name, expected in ours(label, gradients).items():
        assert_near(layer.get_parameter(name).grad, expected, tolerance, f"the gradient of {name}")
