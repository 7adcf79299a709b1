"""The adapters' dropout on a CPU: Bernoulli, elementwise, unbiased, and of the seed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mtl_lora.adapter.dropout import dropout, dropped_positions

STEP = 2.0**-16


@pytest.mark.slow(1)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 2**16 - 1), st.integers(0, 2**31))
def test_every_element_is_either_zero_or_divided_by_the_share_that_is_kept(shape, steps, seed):
    torch.manual_seed(seed)
    p = steps * STEP
    x = torch.rand(shape, dtype=torch.float64) + 1
    y = dropout(x, p)
    assert y.shape == x.shape
    assert all(value == 0 or value == pytest.approx(1 / (1 - p)) for value in (y / x).flatten().tolist())


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5, 0.9])
def test_the_share_of_zeros_is_p_in_every_row_column_and_lane(p):
    torch.manual_seed(0)
    zeros = torch.stack([dropout(torch.ones(400, 256), p) == 0 for _ in range(10)]).double()

    def within(values: torch.Tensor, draws: int) -> bool:
        """Whether means of so many draws lie within five standard deviations of p."""
        return bool((values - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws))

    assert within(zeros.mean(), zeros.numel())
    assert within(zeros.mean(dim=(0, 1)), 4000)
    assert within(zeros.mean(dim=(0, 2)), 2560)
    # Lanes of four, which one random number could serve.
    assert within(zeros.view(-1, 4).mean(dim=0), zeros.numel() // 4)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 256])
def test_neighbours_are_dropped_independently(distance):
    torch.manual_seed(1)
    p = 0.25
    zeros = (dropout(torch.ones(2000, 256), p) == 0).double().flatten()
    both = (zeros[:-distance] * zeros[distance:]).mean().item()
    assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / len(zeros))


def test_a_seed_fixes_the_mask_and_each_call_draws_another():
    x = torch.ones(30, 20)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_the_gradient_goes_through_what_was_kept():
    torch.manual_seed(0)
    x = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25)
    gradient = torch.randn(7, 9, dtype=torch.float64)
    y.backward(gradient)
    assert torch.equal(x.grad, torch.where(y == 0, 0, gradient * (4 / 3)))


def test_recomputation_under_checkpointing_draws_the_same_mask():
    torch.manual_seed(0)
    x = torch.randn(50, 9, dtype=torch.float64, requires_grad=True)
    y = checkpoint(lambda x: dropout(x, 0.5).sin(), x, use_reentrant=False)
    y.sum().backward()
    dropped = y == 0
    assert torch.equal(x.grad == 0, dropped)
    assert dropped.any() and not dropped.all()


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5])
def test_positions_are_different_ascending_and_within_the_count(count, p):
    torch.manual_seed(0)
    for _ in range(50):
        positions = dropped_positions(count, p)
        assert torch.equal(positions, positions.unique())
        assert not len(positions) or 0 <= positions[0] <= positions[-1] < count


@pytest.mark.slow(1)
def test_each_set_of_positions_is_as_likely_as_bernoulli_draws_make_it():
    torch.manual_seed(0)
    p, draws = 0.3, 5_000
    found = torch.tensor([sum(1 << int(position) for position in dropped_positions(3, p)) for _ in range(draws)])
    for subset in range(8):
        dropped = subset.bit_count()
        expected = p**dropped * (1 - p) ** (3 - dropped)
        share = (found == subset).double().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


def test_too_few_draws_are_followed_by_more(monkeypatch):
    """The first draws reach the end nearly always; where they do not, the rest comes from further ones."""
    monkeypatch.setattr("mtl_lora.adapter.dropout.math.ceil", lambda _: 2)
    torch.manual_seed(0)
    share = torch.stack([(dropout(torch.ones(50), 0.25) == 0).double().mean() for _ in range(400)]).mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_above_a_half_it_is_torchs_own_dropout(p):
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(torch.ones(100), p)
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(100), p), expected)


@pytest.mark.slow
def test_compiled_code_takes_torchs_own_dropout():
    compiled = torch.compile(lambda x: dropout(x, 0.25), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    found = compiled(torch.ones(100))
    torch.manual_seed(0)
    assert torch.equal(found, torch.nn.functional.dropout(torch.ones(100), 0.25))
