"""How many weights each method trains: exact numbers, counted on models built without memory."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mtl_lora
from mtl_lora import AdapterConfig

TASKS = [f"task{index}" for index in range(8)]
LLAMA_2_7B = 6_738_415_616
SMOLLM2_135M = 134_515_008


def trained_weights(config: LlamaConfig, **settings) -> tuple[int, int]:
    """(trained, all) of an adapter on q, k, v and o, with eight tasks."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    mtl_lora.inject(model, AdapterConfig(tasks=TASKS, **settings))
    return mtl_lora.trainable_parameters(model)


def llama_2_7b() -> LlamaConfig:
    """Its sizes."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )


def smollm2_135m() -> LlamaConfig:
    """Its sizes."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "lora"}, 8_388_608),
        ({"method": "dora"}, 8_912_896),
        ({"method": "multilora", "num_B": 3}, 26_738_688),
        ({"method": "moelora", "num_experts": 8, "task_embedding_dim": 64}, 8_519_680),
        ({"method": "mtl_lora", "num_B": 3}, 16_845_824),
        ({"method": "mtl_lora", "num_B": 3, "lambda_shape": "diagonal"}, 16_788_480),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_llama_2_7b_at_the_papers_settings(settings, expected):
    assert trained_weights(llama_2_7b(), rank=8, **settings) == (expected, LLAMA_2_7B + expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "lora", "rank": 25}, 2_880_000),
        ({"method": "dora", "rank": 24}, 2_810_880),
        ({"method": "multilora", "rank": 8, "num_B": 3}, 2_903_040),
        ({"method": "moelora", "rank": 24, "num_experts": 8}, 2_887_680),
        ({"method": "mtl_lora", "rank": 13, "num_B": 3}, 2_860_800),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_smollm2_135m_at_equal_budgets(settings, expected):
    assert trained_weights(smollm2_135m(), **settings) == (expected, SMOLLM2_135M + expected)
    assert abs(expected / 2_860_800 - 1) < 0.02
