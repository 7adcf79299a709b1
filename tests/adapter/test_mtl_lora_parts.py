"""MTL-LoRA without one of its parts: what is left out is not trained, and the rest computes what it did."""

import pytest
import torch
from reference.tiny import adapted_llama, adapter_config, tiny_llama

import mtl_lora
from mtl_lora.adapter.targets import adapter_layers

IDS = torch.arange(12).view(3, 4) % 7


def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, task_ids=[0, 1, 2]).logits


def test_a_fixed_transform_and_a_uniform_mixture_are_lora_with_the_mean_of_the_up_projections():
    model = adapted_llama(lambda_shape="identity", mixture="uniform")
    twin = mtl_lora.inject(tiny_llama(torch.float64), adapter_config("lora"))
    for name, layer in adapter_layers(model).items():
        # What is fixed stays at its start, whatever the other weights are.
        layer.reset_parameters()
        torch.nn.init.normal_(layer.lora_B)
        n, other = layer.hyperparameters.num_B, adapter_layers(twin)[name]
        with torch.no_grad():
            other.lora_A.copy_(layer.lora_A)
            other.lora_B.copy_(layer.lora_B.unflatten(1, (n, -1)).mean(dim=1))
    assert torch.allclose(logits(model), logits(twin), rtol=1e-12, atol=1e-12)
    logits(model).square().sum().backward()
    logits(twin).square().sum().backward()
    for name, layer in adapter_layers(model).items():
        other = adapter_layers(twin)[name]
        assert torch.allclose(layer.lora_A.grad, other.lora_A.grad, rtol=1e-9, atol=1e-12)
        gradients = layer.lora_B.grad.unflatten(1, (-1, layer.rank))
        assert torch.allclose(gradients.sum(dim=1), other.lora_B.grad, rtol=1e-9, atol=1e-12)
        assert layer.lora_w.grad is None and layer.lora_lambda.grad is None


@pytest.mark.parametrize(
    ("parts", "fixed"),
    [({"lambda_shape": "identity"}, {"lora_lambda"}), ({"mixture": "uniform"}, {"lora_w"}), ({}, set())],
    ids=["identity", "uniform", "whole"],
)
def test_a_part_that_is_left_out_does_not_train_and_is_not_counted(tmp_path, parts, fixed):
    model = adapted_llama(**parts)
    whole, _ = mtl_lora.trainable_parameters(adapted_llama())
    layers = adapter_layers(model).values()
    assert {
        name for layer in layers for name in layer.parameter_names if not getattr(layer, name).requires_grad
    } == fixed
    if fixed != {"lora_lambda"}:  # which is stored as a diagonal
        sizes = sum(getattr(layer, name).numel() for layer in layers for name in fixed)
        assert mtl_lora.trainable_parameters(model)[0] == whole - sizes
    before = logits(model)
    mtl_lora.save(model, tmp_path)
    again = mtl_lora.load(tiny_llama(torch.float64), tmp_path)
    assert torch.equal(logits(again), before)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    kept = {(layer, name): getattr(layer, name).clone() for layer in layers for name in fixed}
    logits(model).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(getattr(layer, name), value) for (layer, name), value in kept.items())
    assert not torch.equal(logits(model), before)


def test_the_mixture_starts_at_a_part_of_the_papers_draw_and_its_up_projections_part():
    torch.manual_seed(0)
    paper = mtl_lora.inject(tiny_llama(torch.float64), adapter_config())
    torch.manual_seed(0)
    even = mtl_lora.inject(tiny_llama(torch.float64), adapter_config(mixture_start=0.01))
    for name, layer in adapter_layers(even).items():
        other = adapter_layers(paper)[name]
        assert torch.allclose(layer.lora_w, 0.01 * other.lora_w, rtol=1e-12) and torch.equal(layer.lora_A, other.lora_A)
    logits(even).square().sum().backward()
    for layer in adapter_layers(even).values():
        first, *others = layer.lora_B.grad.unflatten(1, (-1, layer.rank)).unbind(1)
        assert not any(torch.equal(first, other) for other in others)


def test_values_that_cannot_be_are_refused():
    for values in ({"mixture_start": 0.0}, {"mixture": "mean"}, {"lambda_shape": "zero"}):
        with pytest.raises(mtl_lora.UserError, match=next(iter(values))):
            adapter_config(**values)
