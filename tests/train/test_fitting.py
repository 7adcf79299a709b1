"""``--batch_size auto``: the largest micro-batch that fits, with the global batch that it would have anyway."""

import math

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.tiny import VOCABULARY, adapted_llama
from safetensors.torch import load_file

from mtl_lora.errors import UserError
from mtl_lora.language.collate import Collator
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.token_cache import COLUMNS
from mtl_lora.training import fitting
from mtl_lora.training.fitting import fitted, largest_that_fits

CPU = torch.device("cpu")
LENGTHS = [9, 4, 12, 7, 5]


@given(rows=st.integers(1, 1000), limit=st.integers(0, 1200))
def test_the_largest_power_of_two_that_fits_and_divides_the_rows_is_found(rows, limit):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_that_fits(rows, fits)
    possible = [2**n for n in range(10) if rows % 2**n == 0 and 2**n <= limit]
    assert found == max(possible, default=0)
    assert len(tried) <= math.log2(rows) + 1
    assert sum(size > limit for size in tried) <= 1, "what does not fit is tried once at most"


def few_rows() -> datasets.Dataset:
    """Rows of the tiny model's vocabulary, fewer than a step may try at once."""
    columns = {
        "input_ids": [[1 + index % (VOCABULARY - 1) for index in range(length)] for length in LENGTHS],
        "prompt_length": [2] * len(LENGTHS),
        "length": LENGTHS,
        "task_id": [0, 1, 2, 3, 0],
        "removed": [0] * len(LENGTHS),
    }
    return datasets.Dataset.from_dict(columns, features=COLUMNS)


def limited(model: torch.nn.Module, rows: int) -> list[tuple[int, ...]]:
    """Make a model run out of memory in the middle of a batch of more rows; the sizes it is given come back."""
    shapes = []

    def check(module, inputs, output):
        shapes.append(tuple(output.shape[:2]))
        if len(output) > rows:
            raise torch.OutOfMemoryError("out of memory")

    model.model.layers[0].register_forward_hook(check)
    return shapes


@pytest.mark.parametrize(
    "limit, accumulation, expected",
    [(1, 1, (1, 8)), (5, 1, (4, 2)), (100, 1, (8, 1)), (100, 4, (32, 1)), (6, 3, (4, 6))],
)
def test_micro_batches_are_what_fits_and_the_global_batch_stays(limit, accumulation, expected):
    model = adapted_llama().eval()
    shapes = limited(model, limit)
    config = TrainConfig(batch_size="auto", gradient_accumulation_steps=accumulation)
    found = fitted(config, model, few_rows(), Collator(0), CPU)
    assert (found.batch_size, found.gradient_accumulation_steps) == expected
    assert model.training and all(length == max(LENGTHS) for _, length in shapes), "the longest rows must be tried"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_row_that_does_not_fit_is_said_in_one_sentence():
    model = adapted_llama()
    limited(model, 0)
    with pytest.raises(UserError, match="a single row does not fit in the GPU's memory; pass --use_gradient_check"):
        fitted(TrainConfig(batch_size="auto"), model, few_rows(), Collator(0), CPU)


def test_another_error_than_too_little_memory_is_not_taken_for_it():
    model = adapted_llama()
    model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fitted(TrainConfig(batch_size="auto"), model, few_rows(), Collator(0), CPU)


def test_on_a_cpu_nothing_is_tried_and_a_line_says_so(train, capsys):
    found = load_file(train("auto", batch_size="auto", max_steps=2) / "mtl_lora.safetensors")
    assert "--batch_size auto: 8 rows, for only a GPU's memory is tried" in capsys.readouterr().err
    for name, tensor in load_file(train("eight", batch_size=8, max_steps=2) / "mtl_lora.safetensors").items():
        assert torch.equal(found[name], tensor), name


def test_a_run_trains_with_what_was_found_as_if_it_had_been_told(train, monkeypatch, capsys):
    """On this machine's CPU, as on a GPU with room for two rows."""
    monkeypatch.setattr(fitting, "_TRIED", {"cpu"})
    one_pass_fits = fitting.one_pass_fits
    monkeypatch.setattr(
        fitting, "one_pass_fits", lambda *given: one_pass_fits(*given) and len(given[1]["task_ids"]) <= 2
    )
    found = load_file(train("auto", batch_size="auto", max_steps=2) / "mtl_lora.safetensors")
    assert "global batch: 2 rows per device x 1 devices x 4 accumulation steps = 8 rows" in capsys.readouterr().err
    told = train("told", batch_size=2, gradient_accumulation_steps=4, max_steps=2)
    for name, tensor in load_file(told / "mtl_lora.safetensors").items():
        assert torch.equal(found[name], tensor), name
