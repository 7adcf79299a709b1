"""The sizes of two real base models, and how many weights an adapter trains on them."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

import mtl_lora
from mtl_lora import AdapterConfig

LLAMA_2_7B = 6_738_415_616
SMOLLM2_135M = 134_515_008


def structure_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model without memory, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def trained_and_all(config: LlamaConfig, tasks: int = 8, **settings) -> tuple[int, int]:
    """(trained, all) of an adapter on q, k, v and o, with so many tasks."""
    names = [f"task{index}" for index in range(tasks)]
    return mtl_lora.trainable_parameters(mtl_lora.inject(structure_of(config), AdapterConfig(tasks=names, **settings)))


def llama_2_7b() -> LlamaConfig:
    """LLaMA-2-7B's."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )


def smollm2_135m() -> LlamaConfig:
    """SmolLM2-135M's."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
