"""Adapters on weights of torchao, whose tensors say the dtype in which they compute."""

import pytest
import torch
from reference.tiny import METHODS, TASKS, adapter_config, tiny_llama, tokens

import mtl_lora
from mtl_lora import UserError

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_starts_at_its_base_learns_and_is_not_merged(method, dtype):
    model, input_ids = tiny_llama(dtype), tokens(4)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = model(input_ids=input_ids).logits
    mtl_lora.inject(model, adapter_config(method)).train()
    output = model(input_ids=input_ids, task_ids=TASKS).logits
    assert torch.equal(output, expected)
    output.float().square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    with pytest.raises(UserError, match="quantised"):
        mtl_lora.merge(model, TASKS[0])
