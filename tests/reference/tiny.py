"""A LLaMA small enough to test with, and adapters whose every weight matters."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mtl_lora
from mtl_lora import AdapterConfig
from mtl_lora.adapter.layer import layer_class, methods

VOCABULARY = 37
TASKS = ["tides", "maps", "birds", "rivers"]
# Every method by a label, with what its configuration changes: all tests over methods run through this table.
METHODS = {
    "lora": {},
    "dora": {},
    "multilora": {},
    "moelora": {"rank": 6, "num_experts": 3, "task_embedding_dim": 5},
    "mtl_lora": {},
    "mtl_lora_diagonal": {"method": "mtl_lora", "lambda_shape": "diagonal"},
    "hydralora": {},
}
FACTORED = [label for label in METHODS if label != "hydralora"]


def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, width 16; keys and values half as wide as queries. Weights large enough that logits differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapter_config(method: str = "mtl_lora", **changes) -> AdapterConfig:
    """Of a method or a label in ``METHODS``; rank 3, so that no two sizes of the model agree by accident."""
    settings = {"rank": 3, "alpha": 6, "dropout": 0.0, "tasks": TASKS, "temperature": 0.5}
    settings = {"method": method, **settings, **METHODS.get(method, {}), **changes}
    # Hyperparameters of other methods are left out, so that one call serves every method.
    read = {each.name for each in layer_class(settings["method"]).Hyperparameters.flags()}
    every = {each.name for layer in methods().values() for each in layer.Hyperparameters.flags()}
    return AdapterConfig(**{name: value for name, value in settings.items() if name in read or name not in every})


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 1, spread: float = 0.4) -> nn.Module:
    """Give every adapter weight a random value: at its start a method adds nothing, and its Lambda is the identity."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in module.modules() if hasattr(layer, "adapter_parameters")]
    for layer in layers:
        for parameter in layer.adapter_parameters().values():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def adapted_llama(method: str = "mtl_lora", dtype: torch.dtype = torch.float64, **changes) -> LlamaForCausalLM:
    """``tiny_llama`` carrying an adapter with random weights."""
    return randomise(mtl_lora.inject(tiny_llama(dtype), adapter_config(method, **changes)))


def tokens(rows: int, length: int = 7, seed: int = 2) -> torch.Tensor:
    """Random ids (B, L); 0 is left to padding."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every trained weight by name, taken off the model."""
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return gradients
