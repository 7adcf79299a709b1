"""Every method computes its formula: forward and all gradients against slow references, for every kind of input."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from reference import layers as reference
from reference.layers import assert_near
from reference.tiny import METHODS, TASKS, adapted_llama, adapter_config, randomise, tiny_llama, tokens
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mtl_lora
from mtl_lora import UserError, route
from mtl_lora.adapter.inject import layer_class

ORIGINAL = Path(reference.__file__).parent / "original_layers.safetensors"


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and one batch. ids: one task, one a row, or one a token."""

    method: str
    ids: str
    leading: tuple[int, ...]
    in_features: int
    out_features: int
    bias: bool

    def __str__(self):
        shape = "x".join(map(str, self.leading))
        return f"{self.method}-{self.ids}-{shape}-{self.in_features}to{self.out_features}{'-bias' * self.bias}"


# Leading sizes and features are odd and differ, so that no transposed or wrongly flattened axis fits by accident.
SHAPES = [((5,), 7, 5), ((5, 7), 12, 10), ((3, 4), 5, 7), ((2, 3, 4), 7, 12)]
CASES = [
    Case(method, ids, leading, k, d, bias)
    for method, ids, (leading, k, d), bias in itertools.product(
        METHODS, ["one task", "row ids", "token ids"], SHAPES, [False, True]
    )
    if ids != "token ids" or len(leading) > 1
]
MIXED = [case for case in CASES if case.ids == "row ids" and case.leading == (5, 7)]


def make_layer(method: str, base: nn.Linear, **changes) -> nn.Module:
    """An adapter layer with random weights around ``base``."""
    config = adapter_config(method, **{"num_B": 2, **changes})
    return randomise(layer_class(method)(base.requires_grad_(False), config))


def make_batch(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and task ids of a case."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*case.leading, case.in_features, generator=generator, dtype=torch.float64).to(dtype)
    shape = case.leading[:2] if case.ids == "token ids" else case.leading[:1]
    if case.ids == "one task":
        return x, torch.full(shape, 2)
    return x, torch.randint(0, len(TASKS), shape, generator=generator)


def check(case: Case, dtype: torch.dtype, tolerance: float, monkeypatch=None, **changes) -> None:
    """Compare a layer with the reference on the same numbers: output, gradient of x and of every adapter weight.

    With ``monkeypatch`` the layer runs in training mode and the reference is given the mask it drew.
    """
    torch.manual_seed(0)
    base = nn.Linear(case.in_features, case.out_features, bias=case.bias).to(dtype)
    layer = make_layer(case.method, base, **changes).train(monkeypatch is not None)
    x, task_ids = make_batch(case, dtype)
    x.requires_grad_(True)
    masks = record_masks(monkeypatch) if monkeypatch else []
    with route.use(task_ids):
        y = layer(x)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    y.backward(grad_y)

    exact_x = x.detach().double().requires_grad_(True)
    exact = {name: weight.detach().double().requires_grad_(True) for name, weight in layer.adapter_parameters().items()}
    bias = base.bias.double() if case.bias else None
    mask = masks[0].reshape(x.shape) if monkeypatch else None
    config = adapter_config(case.method, **{"num_B": 2, **changes})
    expected = reference.forward(exact_x, task_ids, base.weight.double(), bias, exact, config, mask)
    expected.backward(grad_y.double())

    assert y.dtype == dtype
    assert_near(y, expected, tolerance, "y")
    assert_near(x.grad, exact_x.grad, tolerance, "the gradient of x")
    for name, weight in layer.adapter_parameters().items():
        assert_near(weight.grad, exact[name].grad, tolerance, f"the gradient of {name}")
    assert all(weight.grad is None for weight in base.parameters())


def record_masks(monkeypatch) -> list[torch.Tensor]:
    """Note what the layer's dropout multiplied its input with."""
    masks = []
    dropout = torch.nn.functional.dropout

    def recording(x, p, training):
        dropped = dropout(x, p, training)
        masks.append((dropped != 0).double() / (1 - p))
        return dropped

    monkeypatch.setattr("mtl_lora.adapter.base.F.dropout", recording)
    return masks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_its_formula_in_float64(case):
    check(case, torch.float64, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("case", MIXED, ids=str)
def test_layer_equals_its_formula_in_lower_precision(case, dtype, tolerance):
    check(case, dtype, tolerance)


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_dropout_falls_on_the_trained_path_alone(case, monkeypatch):
    check(case, torch.float64, 1e-10, monkeypatch, dropout=0.25)


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


@pytest.mark.parametrize(
    "change", [{"temperature": 0.1}, {"num_B": 1}, {"num_B": 5}, {"rank": 1}, {"alpha": 0.5}], ids=str
)
def test_mtl_lora_follows_every_setting(change):
    check(Case("mtl_lora", "row ids", (5, 7), 12, 10, False), torch.float64, 1e-10, **change)


def test_lora_needs_neither_tasks_nor_a_route():
    layer = make_layer("lora", nn.Linear(12, 10).double(), tasks=[])
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    expected = reference.forward(
        x, torch.zeros(3), layer.weight, layer.bias, layer.adapter_parameters(), adapter_config("lora")
    )
    assert_near(layer(x), expected, 1e-10, "y")


def test_mtl_lora_equals_the_original_implementation():
    original = load_file(ORIGINAL)
    weights = {
        name.removeprefix("mtl_lora."): value for name, value in original.items() if name.startswith("mtl_lora.")
    }
    base = nn.Linear(12, 10, bias=False).double()
    base.weight.data.copy_(original["W"])
    config = adapter_config(rank=8, alpha=16, num_B=3, temperature=0.5, tasks=TASKS[:3])
    layer = layer_class("mtl_lora")(base, config)
    with torch.no_grad():
        for name, value in ours(weights).items():
            layer.get_parameter(name).copy_(value)
    x = original["x"].requires_grad_(True)
    with route.use(original["task_ids"]):
        y = layer(x)
    y.backward(original["grad_y"])
    # The original takes the softmax in float32.
    assert_near(y, weights["y"], 1e-6, "y")
    assert_near(x.grad, weights["grad.x"], 1e-6, "the gradient of x")
    gradients = {name.removeprefix("grad."): value for name, value in weights.items() if name.startswith("grad.")}
    for name, expected in ours(gradients).items():
        assert_near(layer.get_parameter(name).grad, expected, 1e-6, f"the gradient of {name}")


def ours(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's weights (or their gradients) in this library's names and shapes."""
    return {
        "lora_A": weights["lora_A"][0],
        "lora_lambda": weights["lora_lambdas"],
        "lora_w": weights["lora_B_w"],
        "lora_B": torch.cat(list(weights["lora_B"]), dim=1),
    }


# ---- on a model ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapter_leaves_output_and_base_bit_for_bit(method, dtype):
    model = tiny_llama(dtype)
    input_ids = tokens(5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(input_ids=input_ids).logits
    # Dropout on the trained path is nothing to the base, so training mode must agree too.
    mtl_lora.inject(model, adapter_config(method, dropout=0.5)).train()
    with route.use(torch.tensor([0, 1, 2, 3, 0])):
        assert torch.equal(model(input_ids=input_ids).logits, expected)
    after = {name.replace(".base.", "."): weight for name, weight in model.state_dict().items()}
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_weights_alone_are_trained_and_are_float32(method, dtype):
    model = mtl_lora.inject(tiny_llama(dtype), adapter_config(method))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    layers = mtl_lora.adapter_layers(model)
    assert len(layers) == 8
    assert trained.keys() == {f"{name}.{key}" for name, layer in layers.items() for key in layer.adapter_parameters()}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}


def test_training_moves_no_base_weight():
    model = adapted_llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with route.use(torch.tensor([0, 1, 2, 3])):
        model(input_ids=tokens(4)).logits.square().mean().backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name


def test_up_projections_part_at_the_first_step():
    torch.manual_seed(5)
    model = mtl_lora.inject(tiny_llama(), adapter_config(num_B=3, temperature=0.1))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    with route.use(torch.tensor([0, 1, 2, 3])):
        model(input_ids=tokens(4)).logits.square().mean().backward()
    optimizer.step()
    for name, layer in mtl_lora.adapter_layers(model).items():
        for one, other in itertools.combinations(layer.lora_B.detach().split(layer.rank, dim=1), 2):
            assert (one - other).abs().max() > 0.5 * one.abs().max(), name


def test_mtl_lora_starts_as_the_paper_says():
    torch.manual_seed(6)
    config = adapter_config(rank=8, num_B=3, tasks=[f"task{index}" for index in range(200)])
    layer = layer_class("mtl_lora")(nn.Linear(50, 10), config)
    assert torch.equal(layer.lora_lambda, torch.eye(8).expand(200, 8, 8))
    assert not layer.lora_B.any()
    for parameter, inputs in ((layer.lora_A, 50), (layer.lora_w, 3)):
        bound = inputs**-0.5  # kaiming_uniform with a = sqrt 5 is U(-1/sqrt(inputs), 1/sqrt(inputs))
        assert parameter.abs().max() <= bound
        assert parameter.max() > 0.9 * bound
        assert parameter.min() < -0.9 * bound


@pytest.mark.parametrize("method", METHODS)
def test_factors_equal_the_layer_for_each_task(method):
    layer = make_layer(method, nn.Linear(12, 10).double())
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    for index, task in enumerate(TASKS):
        A, B, scale = layer.factors(task)
        assert (A.shape, B.shape) == ((3, 12), (10, 3))
        with route.use(torch.full((3,), index)):
            assert_near(nn.functional.linear(x, layer.weight + scale * B @ A, layer.bias), layer(x), 1e-12, task)
        assert torch.equal(layer.factors(index).delta(), layer.factors(task).delta())


def test_tasks_of_mtl_lora_differ():
    layer = make_layer("mtl_lora", nn.Linear(12, 10).double())
    for one, other in itertools.combinations(TASKS, 2):
        assert (layer.factors(one).delta() - layer.factors(other).delta()).abs().max() > 0.01


@pytest.mark.parametrize("task", ["oceans", 4, -1, True, None], ids=str)
def test_factors_of_an_unknown_task_list_the_tasks(task):
    layer = make_layer("mtl_lora", nn.Linear(12, 10))
    with pytest.raises(UserError, match=rf"no task {task!r}.*tides 0, maps 1, birds 2, rivers 3"):
        layer.factors(task)


@pytest.mark.parametrize("method", METHODS)
def test_merge_leaves_plain_linear_layers_with_the_same_logits(method):
    model = adapted_llama(method)
    names = list(mtl_lora.adapter_layers(model))
    input_ids = tokens(3)
    for index, task in enumerate(TASKS):
        with route.use(torch.full((3,), index)):
            expected = model(input_ids=input_ids).logits
        merged = mtl_lora.merge(copy.deepcopy(model), task)
        assert not mtl_lora.adapter_layers(merged)
        assert {type(merged.get_submodule(name)) for name in names} == {nn.Linear}
        assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
        assert_near(merged(input_ids=input_ids).logits, expected, 1e-12, task)


def test_merge_keeps_the_base_dtype():
    model = mtl_lora.merge(adapted_llama(dtype=torch.bfloat16), "maps")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_merge_for_an_unknown_task_leaves_the_model_as_it_was():
    model = adapted_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UserError, match="no task 'oceans'"):
        mtl_lora.merge(model, "oceans")
    assert len(mtl_lora.adapter_layers(model)) == 8
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_merge_without_an_adapter_says_so():
    with pytest.raises(UserError, match="no adapter to merge"):
        mtl_lora.merge(tiny_llama(), "maps")


@pytest.mark.parametrize(("method", "expected"), [("mtl_lora", 16_845_824), ("lora", 8_388_608)])
def test_llama_2_7b_trains_the_published_number_of_weights(method, expected):
    sizes = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(sizes)
    tasks = [f"task{index}" for index in range(8)]
    mtl_lora.inject(model, mtl_lora.AdapterConfig(method=method, rank=8, num_B=3, tasks=tasks))
    assert mtl_lora.trainable_parameters(model) == (expected, 6_738_415_616 + expected)
