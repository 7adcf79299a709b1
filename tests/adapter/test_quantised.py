"""Adapters on bitsandbytes' 4-bit and 8-bit linear layers, whose weights are codes."""

import pytest
import torch
from reference.cases import make_layer
from reference.layers import assert_near
from reference.tiny import FACTORED, METHODS, TASKS, adapter_config, tiny_llama, tokens
from torch import nn

import mtl_lora
from mtl_lora import UserError, route
from mtl_lora.adapter.layer import layer_class

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed", exc_type=ImportError)

K, D = 64, 48
IDS = torch.tensor([0, 1, 2, 3])


def quantised(bits: str, source: nn.Linear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """``source`` with its weight in 4 or 8 bits; ``4 packed`` stores the codes as bfloat16."""
    sizes = (source.in_features, source.out_features, source.bias is not None)
    if bits == "8":
        layer = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        storage = torch.bfloat16 if bits == "4 packed" else torch.uint8
        layer = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", quant_storage=storage)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu").requires_grad_(False)


def whole_weight(layer: nn.Linear) -> torch.Tensor:
    """The weight (d, k) that a 4-bit layer's codes stand for."""
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def source(bias: bool = True) -> nn.Linear:
    """A layer to quantise."""
    torch.manual_seed(0)
    return nn.Linear(K, D, bias=bias)


@pytest.mark.parametrize("bits", ["4", "4 packed", "8"])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_layer_is_its_quantised_base_and_every_weight_learns(method, bits):
    base = quantised(bits, source())
    x = torch.randn(4, 5, K, requires_grad=True)
    layer = layer_class(adapter_config(method).method)(base, adapter_config(method))
    with route.use(IDS):
        assert torch.equal(layer(x), base(x))
    layer = make_layer(method, base, dropout=0.1).train()
    with route.use(IDS):
        layer(x).square().sum().backward()
    assert x.grad.any()
    for name, weight in layer.adapter_parameters().items():
        assert weight.dtype == torch.float32, name
        assert weight.grad.any(), name


@pytest.mark.parametrize("bits", ["4", "4 packed"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_layer_equals_the_one_on_its_dequantised_weight(method, bias, bits):
    base = quantised(bits, source(bias))
    plain = source(bias)
    plain.weight.data.copy_(whole_weight(base))
    x = torch.randn(4, 5, K)
    outputs = []
    for each in (base, plain):
        layer = make_layer(method, each)
        with route.use(IDS):
            outputs.append(layer(x))
    assert_near(*outputs, 1e-5, "y")


def test_dora_starts_at_the_norms_of_the_weight_beside_a_large_bias():
    linear = source()
    linear.bias.data.fill_(1e4)
    base = quantised("4", linear, torch.bfloat16)
    layer = layer_class("dora")(base, adapter_config("dora"))
    assert_near(layer.lora_magnitude, whole_weight(base).norm(dim=1), 1e-2, "m")
    assert torch.equal(base.bias, linear.bias)


@pytest.mark.parametrize("method", FACTORED)
def test_factors_are_there_and_merging_is_refused(method):
    layer = make_layer(method, quantised("4", source()))
    assert layer.factors("maps").delta().shape == (D, K)
    with pytest.raises(UserError, match=r"^an adapter cannot be merged into a quantised base; load the base in bf16"):
        layer.merged_weight("maps")


@pytest.mark.parametrize("method", METHODS)
def test_injection_in_evaluation_mode_leaves_the_base_fit_for_training(method):
    base, x = quantised("4", source(bias=False)).eval(), torch.randn(4, K, requires_grad=True)
    layer = layer_class(adapter_config(method).method)(base, adapter_config(method)).train()
    with route.use(IDS):
        layer(x).sum().backward()
    assert_near(x.grad[0], whole_weight(base).sum(dim=0), 1e-5, "the gradient of x")


def test_model_with_quantised_layers_is_adapted_saved_and_not_merged(tmp_path):
    model = tiny_llama(torch.float32)
    for block in model.model.layers:
        block.mlp.gate_proj = quantised("8", block.mlp.gate_proj)
    input_ids = tokens(4)
    expected = model.eval()(input_ids=input_ids).logits  # bitsandbytes computes otherwise in training mode
    mtl_lora.inject(model, adapter_config(target_modules=["gate_proj"]))
    with route.use(IDS):
        assert torch.equal(model(input_ids=input_ids).logits, expected)
    mtl_lora.save(model, tmp_path)
    with pytest.raises(UserError, match="quantised"):
        mtl_lora.merge(model, TASKS[0])
    assert len(mtl_lora.adapter_layers(model)) == 2
