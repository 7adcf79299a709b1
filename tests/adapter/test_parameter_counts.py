"""How many weights each method trains: exact numbers, counted on models built without memory."""

import pytest
from reference.sizes import LLAMA_2_7B, SMOLLM2_135M, llama_2_7b, smollm2_135m, trained_and_all


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "lora"}, 8_388_608),
        ({"method": "dora"}, 8_912_896),
        ({"method": "multilora", "num_B": 3}, 26_738_688),
        ({"method": "moelora", "num_experts": 8, "task_embedding_dim": 64}, 8_519_680),
        ({"method": "mtl_lora", "num_B": 3}, 16_845_824),
        ({"method": "mtl_lora", "num_B": 3, "lambda_shape": "diagonal"}, 16_788_480),
        ({"method": "hydralora", "num_B": 3}, 18_350_080),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_llama_2_7b_at_the_papers_settings(settings, expected):
    assert trained_and_all(llama_2_7b(), rank=8, **settings) == (expected, LLAMA_2_7B + expected)


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
    assert trained_and_all(smollm2_135m(), **settings) == (expected, SMOLLM2_135M + expected)
    assert abs(expected / 2_860_800 - 1) < 0.02
