"""A fresh adapter is its base bit for bit, starts with the values its paper names, and learns with all its weights."""

import itertools

import pytest
import torch
from reference.tiny import METHODS, adapted_llama, adapter_config, tiny_llama, tokens
from torch import nn

import mtl_lora
from mtl_lora import AdapterConfig, route
from mtl_lora.adapter.layer import layer_class


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapter_leaves_output_and_base_bit_for_bit(method, dtype):
    model = tiny_llama(dtype)
    input_ids = tokens(5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(input_ids=input_ids).logits
    mtl_lora.inject(model, adapter_config(method, dropout=0.5))
    with route.use(torch.tensor([0, 1, 2, 3, 0])):
        assert torch.equal(model(input_ids=input_ids).logits, expected)
        # Dropout on the trained path is nothing to the base, so training mode must agree too.
        assert torch.equal(model.train()(input_ids=input_ids).logits, expected)
    after = {name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items()}
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_layer_is_its_base_bit_for_bit(method, bias, dtype):
    torch.manual_seed(0)
    base = nn.Linear(33, 17, bias=bias).to(dtype)
    layer = layer_class(adapter_config(method).method)(base, adapter_config(method, dropout=0.5)).train()
    for shape in ((4, 33), (4, 5, 33), (2, 33)):
        x = torch.randn(shape).to(dtype)
        with route.use(torch.arange(shape[0])):
            assert torch.equal(layer(x), base(x)), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_weights_alone_are_trained_and_are_float32(method, dtype):
    model = mtl_lora.inject(tiny_llama(dtype), adapter_config(method))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    layers = mtl_lora.adapter_layers(model)
    assert len(layers) == 8
    assert trained.keys() == {f"{name}.{key}" for name, layer in layers.items() for key in layer.adapter_parameters()}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_no_base_weight(method):
    model = adapted_llama(method)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with route.use(torch.tensor([0, 1, 2, 3])):
        model(input_ids=tokens(4)).logits.square().mean().backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_of_a_fresh_adapter_learns(method):
    torch.manual_seed(5)
    model = mtl_lora.inject(tiny_llama(), adapter_config(method))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    # At the first step only what stands behind a zero learns nothing.
    for _ in range(2):
        optimizer.zero_grad()
        with route.use(torch.tensor([0, 1, 2, 3])):
            model(input_ids=tokens(4)).logits.square().mean().backward()
        optimizer.step()
    for name, weight in trained.items():
        assert weight.grad.flatten(1).any(dim=1).all() if weight.dim() > 1 else weight.grad.all(), name


@pytest.mark.parametrize("method", ["mtl_lora", "hydralora"])
def test_up_projections_part_at_the_first_step(method):
    torch.manual_seed(5)
    model = mtl_lora.inject(tiny_llama(), adapter_config(method, num_B=3, temperature=0.1))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    with route.use(torch.tensor([0, 1, 2, 3])):
        model(input_ids=tokens(4)).logits.square().mean().backward()
    optimizer.step()
    for name, layer in mtl_lora.adapter_layers(model).items():
        for one, other in itertools.combinations(layer.lora_B.detach().split(layer.rank, dim=1), 2):
            assert (one - other).abs().max() > 0.5 * one.abs().max(), name


def is_uniform(values: torch.Tensor, inputs: int) -> bool:
    """Drawn from kaiming_uniform with a = sqrt 5, which is U(-1/sqrt(inputs), 1/sqrt(inputs))."""
    bound = inputs**-0.5
    spread = values.std() * 3**0.5
    return bool(values.abs().max() <= bound and values.abs().max() > 0.98 * bound and abs(spread / bound - 1) < 0.1)


def is_normal(values: torch.Tensor, deviation: float) -> bool:
    """Drawn from N(0, deviation^2)."""
    return bool(abs(values.std() / deviation - 1) < 0.1 and values.abs().max() > 2.5 * deviation)


TASKS, RANK, INPUTS, OUTPUTS, PARALLEL, EXPERTS, EMBEDDING = 100, 8, 50, 30, 3, 4, 40


def is_zero(values: torch.Tensor) -> bool:
    """All zero."""
    return not values.any()


STARTS = {
    "lora": {"lora_A": lambda v: is_uniform(v, INPUTS), "lora_B": is_zero},
    "dora": {
        "lora_A": lambda v: is_uniform(v, INPUTS),
        "lora_B": is_zero,
        "lora_magnitude": lambda v: torch.allclose(v, frozen_weight().norm(dim=1), rtol=1e-6),
    },
    "multilora": {
        "lora_A": lambda v: is_uniform(v, INPUTS),
        "lora_B": lambda v: all(is_uniform(block, RANK) for block in v.split(RANK, dim=1)),
        "lora_scaling": is_zero,
    },
    "moelora": {
        "lora_A": lambda v: is_normal(v, 0.01),
        "lora_B": is_zero,
        "lora_task_embedding": lambda v: is_normal(v, 1),
        "lora_gate": lambda v: is_uniform(v, EMBEDDING),
    },
    "mtl_lora": {
        "lora_A": lambda v: is_uniform(v, INPUTS),
        "lora_lambda": lambda v: torch.equal(v, torch.eye(RANK).expand(TASKS, RANK, RANK)),
        "lora_w": lambda v: is_uniform(v, PARALLEL),
        "lora_B": is_zero,
    },
    "mtl_lora_diagonal": {
        "lora_A": lambda v: is_uniform(v, INPUTS),
        "lora_lambda": lambda v: torch.equal(v, torch.ones(TASKS, RANK)),
        "lora_w": lambda v: is_uniform(v, PARALLEL),
        "lora_B": is_zero,
    },
    "hydralora": {
        "lora_A": lambda v: is_uniform(v, INPUTS),
        "lora_gate": lambda v: is_uniform(v, INPUTS),
        "lora_B": is_zero,
    },
}


def frozen_weight() -> torch.Tensor:
    """The frozen weight in the test below."""
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("method", METHODS)
def test_weights_start_as_the_papers_say(method):
    torch.manual_seed(6)
    names = [f"task{index}" for index in range(TASKS)]
    config = adapter_config(
        method, rank=RANK, tasks=names, num_B=PARALLEL, num_experts=EXPERTS, task_embedding_dim=EMBEDDING
    )
    base = nn.Linear(INPUTS, OUTPUTS)
    base.weight.data.copy_(frozen_weight())
    layer = layer_class(config.method)(base, config)
    assert layer.adapter_parameters().keys() == STARTS[method].keys()
    for name, weight in layer.adapter_parameters().items():
        assert STARTS[method][name](weight.detach()), name


@pytest.mark.parametrize("mode", ["matrix", "matrixv2", "addition"])
def test_mtlora_starts_with_pairs_as_loras(mode):
    torch.manual_seed(6)
    names = [f"task{index}" for index in range(TASKS)]
    config = AdapterConfig("mtlora", RANK, tasks=names, task_rank=4, shared_mode=mode)
    weights = layer_class("mtlora")(nn.Linear(INPUTS, OUTPUTS), config).adapter_parameters()
    assert is_uniform(weights.pop("task_A").detach(), INPUTS) and is_zero(weights.pop("task_B"))
    if mode == "addition":
        norm = nn.LayerNorm(OUTPUTS)
        assert torch.equal(weights.pop("stream_norm_weight"), norm.weight)
        assert torch.equal(weights.pop("stream_norm_bias"), norm.bias)
    else:
        assert is_uniform(weights.pop("lora_A").detach(), INPUTS) and is_zero(weights.pop("lora_B"))
    assert not weights


@pytest.mark.parametrize("method", METHODS)
def test_start_follows_the_seed(method):
    def start(seed):
        torch.manual_seed(seed)
        layers = mtl_lora.adapter_layers(mtl_lora.inject(base, adapter_config(method)))
        weights = [weight.clone() for layer in layers.values() for weight in layer.adapter_parameters().values()]
        mtl_lora.unload(base)
        return weights

    base = tiny_llama()
    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(first, other, strict=True))
