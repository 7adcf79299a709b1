"""A layer's plain low-rank factors, the merged model and the routed model are the same for every method and task."""

import copy
import itertools

import pytest
import torch
from reference.cases import make_layer
from reference.layers import assert_near
from reference.tiny import FACTORED, TASKS, adapted_llama, tiny_llama, tokens
from torch import nn

import mtl_lora
from mtl_lora import UserError, route

# The width of the factors at rank r with two up-projections.
WIDTHS = {"lora": 3, "dora": 3, "multilora": 2 * 3, "moelora": 6, "mtl_lora": 3, "mtl_lora_diagonal": 3}
PER_TASK = ["moelora", "mtl_lora", "mtl_lora_diagonal"]


@pytest.mark.parametrize("method", FACTORED)
def test_factors_equal_the_layer_for_each_task(method):
    layer = make_layer(method, nn.Linear(12, 10).double())
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    for index, task in enumerate(TASKS):
        A, B, scale = factors = layer.factors(task)
        assert (A.shape, B.shape) == ((WIDTHS[method], 12), (10, WIDTHS[method]))
        weight = layer.weight + scale * B @ A
        assert (factors.magnitude is not None) == (method == "dora")
        if factors.magnitude is not None:
            weight = (factors.magnitude / weight.norm(dim=1))[:, None] * weight
        with route.use(torch.full((3,), index)):
            assert_near(nn.functional.linear(x, weight, layer.bias), layer(x), 1e-13, task)
        assert_near(layer.merged_weight(task), weight, 1e-13, task)
        assert torch.equal(layer.factors(index).delta(), factors.delta())


@pytest.mark.parametrize("method", FACTORED)
def test_tasks_differ_where_the_method_has_weights_of_their_own(method):
    layer = make_layer(method, nn.Linear(12, 10).double())
    for one, other in itertools.combinations(TASKS, 2):
        difference = (layer.factors(one).delta() - layer.factors(other).delta()).abs().max()
        assert difference > 0.01 if method in PER_TASK else difference == 0


@pytest.mark.parametrize("task", ["oceans", 4, -1, True], ids=str)
@pytest.mark.parametrize("method", FACTORED)
def test_factors_of_an_unknown_task_list_the_tasks(method, task):
    layer = make_layer(method, nn.Linear(12, 10))
    with pytest.raises(UserError, match=rf"no task {task!r}.*tides 0, maps 1, birds 2, rivers 3"):
        layer.factors(task)


@pytest.mark.parametrize("method", FACTORED)
def test_factors_without_a_task_are_there_where_all_tasks_share_them(method):
    layer = make_layer(method, nn.Linear(12, 10))
    if method in PER_TASK:
        with pytest.raises(UserError, match="no task None"):
            layer.factors()
    else:
        assert torch.equal(layer.factors().delta(), layer.factors("maps").delta())


@pytest.mark.parametrize("method", FACTORED)
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
        assert_near(merged(input_ids=input_ids).logits, expected, 1e-10, task)


@pytest.mark.parametrize("method", FACTORED)
def test_merge_sums_in_float32_and_rounds_once(method):
    layer = make_layer(method, nn.Linear(12, 10).bfloat16())
    A, B, scale = factors = layer.factors("maps")
    weight = layer.weight.double() + scale * B.double() @ A.double()
    if factors.magnitude is not None:
        weight *= (factors.magnitude.double() / weight.norm(dim=1))[:, None]
    merged = layer.merged_weight("maps")
    assert merged.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16, which keeps eight bits.
    assert ((merged.double() - weight).abs() <= weight.abs() * 2**-8 * 1.001).all()


def test_a_method_whose_gate_reads_the_input_refuses_factors_and_merging():
    model = adapted_llama("hydralora")
    layers = mtl_lora.adapter_layers(model)
    for refused in (
        lambda: next(iter(layers.values())).factors("maps"),
        lambda: mtl_lora.merge(model, "maps"),
        lambda: mtl_lora.merge(model),
    ):
        with pytest.raises(UserError, match=r"HydraLoRA.*gate depends on the input"):
            refused()
    assert mtl_lora.adapter_layers(model) == layers


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
