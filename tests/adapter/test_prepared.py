"""What all layers need of the task ids is computed together, and is what each layer computes alone."""

import copy

import pytest
import torch
from reference.layers import assert_near
from reference.tiny import TASKS, adapted_llama, adapter_gradients, tokens

import mtl_lora
from mtl_lora.adapter.mtl_lora import MtlLoraLayer

IDS = torch.tensor([0, 2, 2, 3])


@pytest.fixture
def alone(monkeypatch) -> list[MtlLoraLayer]:
    """The layers that compute their transforms themselves, once for each time."""
    called = []
    compute = MtlLoraLayer.combined_transform
    monkeypatch.setattr(MtlLoraLayer, "combined_transform", lambda self, ids: called.append(self) or compute(self, ids))
    return called


def results(model, ids, **options) -> dict[str, torch.Tensor]:
    """Logits and gradients of one step."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens(4), task_ids=ids, use_cache=False, **options).logits
    logits.square().sum().backward()
    return {"logits": logits.detach(), **adapter_gradients(model)}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_near(found[name], tensor, 1e-12, name)


@pytest.mark.parametrize("method", ["mtl_lora", "mtl_lora_diagonal"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_together_is_alone(method, checkpointing, alone):
    model = adapted_llama(method=method).double().train()
    layers = len(mtl_lora.adapter_layers(model))
    single = copy.deepcopy(model)
    single.mtl_lora_injection.layers = []
    expected = results(single, IDS)
    assert len(alone) == layers
    alone.clear()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_same(results(model, IDS), expected)
    # The re-entrant form runs the backward pass of each block by itself, so its blocks have no graph in common.
    assert len(alone) == (2 * layers if checkpointing else 0)


def test_two_forwards_before_one_backward_have_their_own(alone):
    model = adapted_llama().double()
    other = IDS.flip(0)
    first, second = results(model, IDS), results(model, other)
    model.zero_grad(set_to_none=True)
    outputs = [model(input_ids=tokens(4), task_ids=ids, use_cache=False).logits for ids in (IDS, other)]
    sum(logits.square().sum() for logits in outputs).backward()
    for name, gradient in adapter_gradients(model).items():
        assert_near(gradient, first[name] + second[name], 1e-12, name)
    assert not alone


def test_ids_of_tokens_layers_by_themselves_and_compiled_code_compute_their_own(alone):
    model = adapted_llama().double()
    layers = mtl_lora.adapter_layers(model)
    expected = model(input_ids=tokens(4), task_ids=IDS, use_cache=False).logits
    assert not alone
    by_token = model(input_ids=tokens(4), task_ids=IDS[:, None].expand(4, tokens(4).shape[1]), use_cache=False).logits
    assert_near(by_token, expected, 1e-12, "logits")
    assert len(alone) == len(layers)
    alone.clear()
    layer = next(iter(layers.values()))
    with mtl_lora.route.use([TASKS[1]]):
        layer(torch.randn(1, 3, layer.in_features, dtype=torch.float64))
    assert alone == [layer]


@pytest.mark.parametrize("nested", [False, True])
def test_parameters_that_fsdp_holds_get_the_same_gradients(nested):
    """Inside FSDP's units parameters are views of its own, which exist only while the unit runs."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

    plain = adapted_llama().train()
    expected = results(plain, IDS)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = adapted_llama().train()
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        if nested:
            for index, block in enumerate(model.model.layers):
                model.model.layers[index] = Fsdp(block, **options)
        wrapped = Fsdp(model, **options)
        logits = wrapped(input_ids=tokens(4), task_ids=IDS, use_cache=False).logits
        logits.square().sum().backward()
        found = {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad
            for name, parameter in wrapped.named_parameters()
            if parameter.requires_grad
        }
    finally:
        destroy_process_group()
    assert_near(logits, expected.pop("logits"), 1e-5, "logits")
    assert found.keys() >= expected.keys()
    for name, gradient in expected.items():
        assert_near(found[name].view_as(gradient), gradient, 1e-5, name)


def test_a_model_cast_after_injection_computes_in_its_dtype():
    """A model moved to another dtype after injection still gets its transforms in the activations' dtype."""
    model = adapted_llama().to(torch.bfloat16)
    logits = model(input_ids=tokens(4), task_ids=IDS, use_cache=False).logits
    single = copy.deepcopy(model)
    single.mtl_lora_injection.layers = []
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, single(input_ids=tokens(4), task_ids=IDS, use_cache=False).logits)
