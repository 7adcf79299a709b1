"""Sampling by temperature and batches by tokens: shares, budgets, the same steps everywhere, nothing twice."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_rows import SHARES, made_rows

from mtl_lora.errors import UserError
from mtl_lora.training.sampler import WINDOW, LengthBatchSampler, plan_by_tokens, plan_epoch
from mtl_lora.training.shares import next_rows, task_rows


def steps_of(rows: int, accumulation: int, world_size: int, epoch: int = 0, seed: int = 3, **options) -> list:
    """The micro-batches of each optimiser step of an epoch, in order, put together from what every process takes."""
    data, taken = made_rows(rows), []
    for rank in range(world_size):
        sampler = LengthBatchSampler(*data, 8, seed, accumulation, world_size, rank, **options)
        sampler.set_epoch(epoch)
        taken.append(list(sampler))
        assert len(taken[-1]) == len(sampler) == sampler.steps_per_epoch * accumulation
    order = list(itertools.chain.from_iterable(zip(*taken, strict=True)))
    parts = accumulation * world_size
    return [order[first : first + parts] for first in range(0, len(order), parts)]


def rows_of(steps: list) -> list[list[int]]:
    """The rows of each step, sorted."""
    return [sorted(itertools.chain.from_iterable(step)) for step in steps]


def test_without_options_the_plan_is_the_one_of_earlier_versions():
    """So that a run that began with one of them goes on with the rows it would have seen."""
    lengths, task_ids = np.arange(26) * 7 % 11 + 3, np.arange(26) % 2
    assert [rows.tolist() for rows in plan_epoch(lengths, task_ids, 4, seed=3, epoch=1, length_pool=2)] == [
        [22, 19, 2, 21],
        [18, 4, 1, 25],
        [11, 16, 13, 10],
        [15, 12, 20, 3],
        [7, 23, 17, 14],
        [0, 8, 5, 24],
        [9, 6],
    ]


# ---- temperature ----


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(0, 5000), min_size=1, max_size=9).filter(any), temperature=st.floats(1, 100))
def test_shares_follow_the_temperature_and_add_up_to_the_data(counts, temperature):
    counts = np.array(counts)
    rows = task_rows(counts, temperature)
    assert rows.sum() == counts.sum()
    assert ((rows > 0) == (counts > 0)).all()
    weights = np.array([count ** (1 / temperature) if count else 0 for count in counts])
    assert np.abs(rows - counts.sum() * weights / weights.sum()).max() < 1 + 1e-6


@pytest.mark.parametrize("temperature, expected", [(1, [900, 90, 10]), (2, [703, 223, 74]), (1e9, [334, 333, 333])])
def test_a_larger_temperature_balances_more(temperature, expected):
    assert task_rows(np.array([900, 90, 10]), temperature).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), taken=st.integers(1, 100), epochs=st.integers(1, 12))
def test_no_row_comes_again_before_every_other_has_come_as_often(rows, taken, epochs):
    own = np.arange(rows) * 3 + 1
    stream = np.concatenate([next_rows(own, taken, seed=5, task_id=2, epoch=epoch) for epoch in range(epochs)])
    assert len(stream) == taken * epochs
    for first in range(0, len(stream), rows):
        passed = stream[first : first + rows]
        assert len(set(passed)) == len(passed) and set(passed) <= set(own)


def test_passes_over_a_task_have_orders_of_their_own():
    own = np.arange(50)
    orders = {tuple(next_rows(own, 50, seed, task, epoch)) for seed in (0, 1) for task in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 8


@pytest.mark.parametrize("budget", [0, 2048], ids=["rows", "tokens"])
@pytest.mark.parametrize("temperature", [1.5, 3.0, 100.0])
def test_an_epoch_has_as_many_rows_as_the_data_in_the_shares_of_the_temperature(temperature, budget):
    lengths, task_ids = made_rows(3200)
    if budget:
        plan = plan_by_tokens(lengths, task_ids, budget, 1, 0, 2, temperature)
    else:
        plan = plan_epoch(lengths, task_ids, 16, 0, 2, temperature=temperature)
    rows = np.concatenate(plan)
    expected = task_rows(np.bincount(task_ids), temperature)
    assert np.bincount(task_ids[rows]).tolist() == expected.tolist()
    times = np.bincount(rows, minlength=3200)
    for task_id, count in enumerate(np.bincount(task_ids)):
        # What a part of a pass adds to whole ones: one, or two where an epoch goes from one pass into the next.
        own = times[task_ids == task_id]
        assert own.max() - own.min() <= 2
        assert own.min() >= expected[task_id] // count - 1


# ---- token budget ----


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 500),
    budget=st.integers(256, 4096),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 4),
)
def test_every_row_comes_once_an_epoch_and_no_micro_batch_is_over_the_budget(
    rows, budget, accumulation, world_size, epoch
):
    lengths, _ = made_rows(rows)
    parts = accumulation * world_size
    if rows < parts:
        with pytest.raises(UserError, match="training rows are too few for a step of"):
            steps_of(rows, accumulation, world_size, token_budget=budget)
        return
    steps = steps_of(rows, accumulation, world_size, epoch, token_budget=budget)
    for micro_batch in itertools.chain.from_iterable(steps):
        assert micro_batch and len(micro_batch) * lengths[micro_batch].max() <= budget
    seen = list(itertools.chain.from_iterable(rows_of(steps)))
    assert len(seen) == len(set(seen))
    assert rows - len(seen) < parts


def test_rows_left_out_of_an_epoch_are_others_in_the_next():
    lengths = np.full(101, 60)  # two rows to a budget of 120 tokens: 25 steps of two micro-batches, and one row
    sampler = LengthBatchSampler(lengths, np.zeros(101, dtype=int), 8, seed=0, accumulation=2, token_budget=120)
    left_out = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        left_out.add(*set(range(101)) - {row for micro_batch in sampler for row in micro_batch})
    assert len(left_out) > 1


def test_longest_row_alone_must_fit_the_budget():
    lengths, task_ids = np.array([30, 90, 41]), np.zeros(3, dtype=int)
    assert len(LengthBatchSampler(lengths, task_ids, 8, seed=0, token_budget=90)) == 2
    with pytest.raises(UserError, match="token_budget must be at least the longest row's 90 tokens, not 89"):
        LengthBatchSampler(lengths, task_ids, 8, seed=0, token_budget=89)


@pytest.mark.parametrize("budget, least", [(2048, 0.95), (1024, 0.9)])
def test_micro_batches_are_full_and_almost_without_padding(budget, least):
    lengths, _ = made_rows(24_000)
    padded = [len(rows) * lengths[rows].max() for (rows,) in steps_of(24_000, 1, 1, token_budget=budget)]
    assert np.mean(padded) > least * budget
    assert 1 - lengths.sum() / sum(padded) < 0.01


# ---- the same steps, and similar work, for any number of processes ----

OPTIONS = {
    "temperature": {"temperature": 3.0},
    "tokens": {"token_budget": 1024},
    "tokens and temperature": {"token_budget": 1024, "temperature": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("accumulation, world_size", [(3, 2), (2, 3), (1, 6)])
def test_steps_are_the_same_for_any_number_of_processes(accumulation, world_size, epoch, options):
    one = steps_of(1003, 6, 1, epoch, **options)
    assert rows_of(steps_of(1003, accumulation, world_size, epoch, **options)) == rows_of(one)


@pytest.mark.parametrize("accumulation, world_size", [(1, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("options", [OPTIONS["tokens"], OPTIONS["tokens and temperature"]], ids=["tokens", "both"])
def test_processes_work_on_as_many_rows_and_similarly_many_tokens_at_a_time(accumulation, world_size, options):
    lengths, _ = made_rows(4096)
    ratios, uneven = [], 0
    for step in steps_of(4096, accumulation, world_size, **options):
        if len({len(rows) for rows in step}) > 1:
            uneven += 1
            continue
        for first in range(0, len(step), world_size):
            work = [lengths[rows].max() for rows in step[first : first + world_size]]
            ratios.append(max(work) / min(work))
    assert uneven <= 1, "only what is left at the end of a pass may not be the same number of rows for all"
    assert np.mean(ratios) < 1.02
    assert np.quantile(ratios, 0.98) < 1.1
    assert max(ratios) < 1.5


# ---- shares over any 50 steps ----


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0},
        {"temperature": 100.0},
        {"token_budget": 2048},
        {"token_budget": 1024, "temperature": 5.0},
        {"token_budget": 512},
    ],
    ids=str,
)
def test_each_task_keeps_its_share_within_two_points_over_any_50_steps(options):
    """Of the rows, or under a token budget of the tokens."""
    lengths, task_ids = made_rows(16_000)
    weights = lengths if "token_budget" in options else np.ones(len(lengths))
    steps = [rows for (rows,) in steps_of(16_000, 1, 1, epoch=1, **options)]
    whole = [rows for rows in steps if "token_budget" in options or len(rows) == 8]
    counts = np.array([np.bincount(task_ids[rows], weights[rows], minlength=len(SHARES)) for rows in whole])
    running = np.concatenate([np.zeros((1, len(SHARES))), counts.cumsum(axis=0)])
    window = running[WINDOW:] - running[:-WINDOW]
    shares = window / window.sum(axis=1, keepdims=True)
    assert np.abs(shares - counts.sum(axis=0) / counts.sum()).max() <= 0.02


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_do_not_come_in_order_of_length(options):
    lengths, _ = made_rows(6000)
    means = np.array([lengths[rows].mean() for rows in rows_of(steps_of(6000, 2, 1, **options))])
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.1
    # Steps of one task alone, the longest and shortest among them, find their place a little later than others.
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


# ---- same inputs, same order ----


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_order_is_a_function_of_seed_and_epoch(options):
    first = steps_of(500, 2, 1, epoch=2, seed=7, **options)
    assert steps_of(500, 2, 1, epoch=2, seed=7, **options) == first
    assert steps_of(500, 2, 1, epoch=3, seed=7, **options) != first
    assert steps_of(500, 2, 1, epoch=2, seed=8, **options) != first


def test_batches_by_tokens_hold_other_rows_in_every_epoch():
    together = [{tuple(rows) for rows in rows_of(steps_of(6400, 1, 1, epoch, token_budget=2048))} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


def test_passes_that_differ_in_length_follow_one_another_in_epochs_that_do_not():
    """With both options: nothing is left out or comes twice where an epoch of the Trainer ends."""
    lengths, task_ids = made_rows(700)
    options = {"token_budget": 300, "temperature": 4.0}
    passes = [plan_by_tokens(lengths, task_ids, 300, 2, 3, number, 4.0) for number in range(7)]
    assert len({len(plan) for plan in passes}) > 1, "passes of one length show nothing"
    expected = [sorted(rows.tolist()) for plan in passes for rows in plan]
    epochs = [rows_of(steps_of(700, 2, 1, epoch, **options)) for epoch in range(6)]
    assert {len(steps) for steps in epochs} == {len(passes[0])}
    found = list(itertools.chain.from_iterable(epochs))
    assert found == expected[: len(found)]
