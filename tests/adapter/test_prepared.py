"""What all layers need of the task ids is computed together, and is what each layer computes alone."""

import copy
import dataclasses

import pytest
import torch
from reference.layers import assert_near
from reference.tiny import TASKS, adapted_llama, adapter_config, adapter_gradients, randomise, tokens
from torch import nn

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


# ---- each layer keeps what it would have alone ----


class Towers(nn.Module):
    """Two linear layers, of which a forward may call one."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, which=("left", "right")):
        return [getattr(self, name)(x) for name in which]


def towers(**changes) -> Towers:
    torch.manual_seed(0)
    model = Towers().to(changes.pop("dtype", torch.float64))
    config = adapter_config(**({"target_modules": ["left", "right"]} | changes))
    return randomise(mtl_lora.inject(model, config, allow_unused=True))


X = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_layer_that_is_not_called_has_no_gradient():
    model = towers()
    model(X, ["left"], task_ids=IDS)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.left.adapter_parameters().values())
    assert all(parameter.grad is None for parameter in model.right.adapter_parameters().values())


def test_parts_of_a_forward_may_be_differentiated_one_after_the_other():
    model, both = towers(), towers()
    left, right = model(X, task_ids=IDS)
    left.square().sum().backward()
    right.square().sum().backward()
    sum(each.square().sum() for each in both(X, task_ids=IDS)).backward()
    assert_same(adapter_gradients(model), adapter_gradients(both))


def test_second_derivatives_are_those_of_plain_operations():
    found = []
    for prepared in (True, False):
        model = towers()
        if not prepared:
            model.mtl_lora_injection.layers = []
        x, parameters = X.clone().requires_grad_(), list(model.left.adapter_parameters().values())
        (slope,) = torch.autograd.grad(model(x, ["left"], task_ids=IDS)[0].pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), parameters))
    for first, second in zip(*found, strict=True):
        assert_near(first, second, 1e-10, "second derivative")


def test_torch_func_takes_the_model(alone):
    model = towers()
    parameters = dict(model.left.adapter_parameters())

    def loss(values):
        named = {f"left.{name}": value for name, value in values.items()}
        return torch.func.functional_call(model, named, (X, ["left"]), {"task_ids": IDS})[0].square().sum()

    found = torch.func.grad(loss)(parameters)
    assert alone
    loss(parameters).backward()
    for name, parameter in parameters.items():
        assert_near(found[name], parameter.grad, 1e-12, name)


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    model = towers()
    (left, _) = model(X, task_ids=IDS)
    with torch.no_grad():
        model.left.lora_w.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        left.sum().backward()


def test_a_subclass_that_mixes_otherwise_is_asked_itself():
    class Hardened(MtlLoraLayer):
        def mixture(self, task_ids):
            return nn.functional.one_hot(self.lora_w[task_ids].argmax(-1), self.lora_w.shape[1]).to(self.lora_w.dtype)

    model = towers()
    for layer in (model.left, model.right):
        layer.__class__ = Hardened
    merged = mtl_lora.merge(copy.deepcopy(model), TASKS[1])
    for found, expected in zip(model(X, task_ids=[1] * 4), merged(X), strict=True):
        assert_near(found, expected, 1e-12, "output")


def test_layers_with_values_and_dtypes_of_their_own_are_prepared_by_them():
    model = towers(dtype=torch.float32)
    model.left.hyperparameters = dataclasses.replace(model.left.hyperparameters, temperature=5.0)
    model.right.base_layer.to(torch.bfloat16)
    single = copy.deepcopy(model)
    single.mtl_lora_injection.layers = []
    for which, x in (("left", X.float()), ("right", X.bfloat16())):
        assert torch.equal(model(x, [which], task_ids=IDS)[0], single(x, [which], task_ids=IDS)[0])


def test_a_forward_that_turns_gradients_on_has_all_of_them():
    class Inside(Towers):
        @torch.enable_grad()
        def forward(self, x):
            return super().forward(x)

    model = towers()
    model.__class__ = Inside
    with torch.no_grad():
        outputs = model(X, task_ids=IDS)
    sum(each.sum() for each in outputs).backward()
    assert all(gradient is not None for gradient in adapter_gradients(model).values())


def test_nothing_is_prepared_beyond_a_bound_or_for_weights_that_are_elsewhere(alone, monkeypatch):
    model = towers()
    expected = model(X, task_ids=IDS)
    assert not alone
    monkeypatch.setattr("mtl_lora.adapter.mtl_lora._MAX_PREPARED", 10)
    for found, one in zip(model(X, task_ids=IDS), expected, strict=True):
        assert_near(found, one, 1e-12, "output")
    assert len(alone) == 2
    monkeypatch.undo()
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device="cpu")
    for found, one in zip(model(X, task_ids=IDS), expected, strict=True):
        assert_near(found, one, 1e-12, "output")


def test_norms_that_are_kept_change_no_answer_and_are_of_the_weights_they_were_kept_of():
    model = adapted_llama("dora").eval()
    before = model(tokens(3)).logits
    for layer in mtl_lora.adapter_layers(model).values():
        layer.keep_constants()
        assert torch.equal(layer.kept_norm, layer.norm())
    assert torch.equal(model(tokens(3)).logits, before)
    with torch.no_grad():
        for layer in mtl_lora.adapter_layers(model).values():
            layer.lora_B.mul_(2)
            assert not torch.equal(layer.kept_norm, layer.norm())
