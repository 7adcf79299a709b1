"""Batches: every example once an epoch, the same steps for any number of processes, each task's proportion in any
stretch; with a sampling temperature or a token budget too.
"""

import itertools

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_rows import SHARES, made_rows

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.training.rows import split
from mtl_lora.training.sampler import (
    WINDOW,
    LengthGroupedBatchSampler,
    examples_per_task,
    plan_by_tokens,
    plan_epoch,
    sample_cyclically,
)

OPTIONS = {"plain": {}, "temperature": {"temperature": 3.0}, "tokens": {"token_budget": 1024}}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def steps_of(rows, accumulation=1, world_size=1, epoch=0, seed=3, batch_size=8, **options) -> list[list[list[int]]]:
    """The micro-batches of each optimiser step of an epoch, in order, put together from what every process takes."""
    data, taken = made_rows(rows), []
    for rank in range(world_size):
        sampler = LengthGroupedBatchSampler(*data, batch_size, seed, accumulation, world_size, rank, **options)
        sampler.set_epoch(epoch)
        taken.append(list(sampler))
        assert len(taken[-1]) == len(sampler) == sampler.steps_per_epoch * accumulation
    order = list(itertools.chain.from_iterable(zip(*taken, strict=True)))
    parts = accumulation * world_size
    return [order[first : first + parts] for first in range(0, len(order), parts)]


def rows_of(steps: list) -> list[list[int]]:
    """The rows of each step, sorted."""
    return [sorted(itertools.chain.from_iterable(step)) for step in steps]


# ---- plans of earlier versions, so that a run of one of them resumes with the rows it would have seen ----

LENGTHS = np.arange(26) * 7 % 11 + 3
EARLIER = {
    "plain": (
        lambda: plan_epoch(LENGTHS, np.arange(26) % 2, 4, seed=3, epoch=1, length_pool=2),
        [[22, 19, 2, 21], [18, 4, 1, 25], [11, 16, 13, 10], [15, 12, 20, 3], [7, 23, 17, 14], [0, 8, 5, 24], [9, 6]],
    ),
    "temperature": (
        lambda: plan_epoch(LENGTHS, np.arange(26) // 20, 4, seed=3, epoch=1, length_pool=2, temperature=3.0),
        [[21, 1, 9, 25], [22, 0, 5, 2], [21, 4, 6, 17], [22, 11, 24, 13], [19, 5, 16, 24], [23, 12, 1, 20], [22, 3]],
    ),
    "tokens": (
        lambda: plan_by_tokens(LENGTHS, np.arange(26) % 2, 26, 2, seed=3, epoch=1),
        [[11, 22, 0, 19, 8, 16, 5, 13], [15, 4, 12, 1], [23, 9, 20, 6], [17, 3, 25, 14], [2, 24, 10, 21, 18, 7]],
    ),
}


@pytest.mark.parametrize("plan, expected", EARLIER.values(), ids=EARLIER)
def test_the_plan_is_the_one_of_earlier_versions(plan, expected):
    assert [rows.tolist() for rows in plan()] == expected


# ---- every example once ----


@pytest.mark.slow(1)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 700),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
def test_every_row_comes_once_an_epoch_to_one_process(rows, batch_size, accumulation, world_size, epoch):
    whole = batch_size * accumulation * world_size
    rest = rows % whole
    left_out = rest if rest < accumulation * world_size else 0
    if rows == left_out:
        with pytest.raises(UserError, match=f"^{rows} training examples are too few for a step of "):
            steps_of(rows, accumulation, world_size, batch_size=batch_size)
        return
    steps = steps_of(rows, accumulation, world_size, epoch, batch_size=batch_size)
    assert len(steps) == -(-(rows - left_out) // whole)
    line = str(LengthGroupedBatchSampler(*made_rows(rows), batch_size, 3, accumulation, world_size))
    assert (f"{left_out} of {rows} examples left out" in line) == bool(left_out)
    assert all(1 <= len(micro_batch) <= batch_size for step in steps for micro_batch in step)
    seen = list(itertools.chain.from_iterable(rows_of(steps)))
    assert len(seen) == len(set(seen)) == rows - left_out


@pytest.mark.slow(1)
@settings(max_examples=60, deadline=None)
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
        with pytest.raises(UserError, match="too few"):
            steps_of(rows, accumulation, world_size, token_budget=budget)
        return
    steps = steps_of(rows, accumulation, world_size, epoch, token_budget=budget)
    for micro_batch in itertools.chain.from_iterable(steps):
        assert micro_batch and len(micro_batch) * lengths[micro_batch].max() <= budget
    seen = list(itertools.chain.from_iterable(rows_of(steps)))
    assert len(seen) == len(set(seen))
    assert rows - len(seen) < parts


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"batch_size": 8, "token_budget": 120}], ids=str)
def test_rows_left_out_of_an_epoch_are_others_in_the_next(options):
    # 101 rows of 60 tokens: steps of two micro-batches, and one row.
    sampler = LengthGroupedBatchSampler(np.full(101, 60), np.zeros(101, dtype=int), seed=0, accumulation=2, **options)
    left_out = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        left_out.add(*set(range(101)) - {row for micro_batch in sampler for row in micro_batch})
    assert len(left_out) > 1


def test_small_last_batch_is_dealt_out_evenly_and_comes_last():
    *steps, last = steps_of(87, 2, 2, batch_size=4)
    assert [len(rows) for rows in rows_of(steps)] == [16] * 5
    assert sorted(len(micro_batch) for micro_batch in last) == [1, 2, 2, 2]


def test_longest_row_alone_must_fit_the_budget():
    lengths, task_ids = np.array([30, 90, 41]), np.zeros(3, dtype=int)
    assert len(LengthGroupedBatchSampler(lengths, task_ids, 8, seed=0, token_budget=90)) == 2
    with pytest.raises(UserError, match=r"token_budget must be at least .* 90 tokens, not 89"):
        LengthGroupedBatchSampler(lengths, task_ids, 8, seed=0, token_budget=89)


# ---- the same steps, and similar work, for any number of processes ----


@pytest.mark.parametrize("rows", [640, 643, 655])
@pytest.mark.parametrize(
    "batch_size, accumulation, world_size", [(8, 1, 2), (8, 2, 1), (4, 2, 2), (4, 1, 4), (2, 4, 2), (1, 2, 8)]
)
def test_steps_are_the_same_for_any_number_of_processes_and_micro_batches(rows, batch_size, accumulation, world_size):
    one_process = rows_of(steps_of(rows, batch_size=16))
    split = rows_of(steps_of(rows, accumulation, world_size, batch_size=batch_size))
    assert len(one_process) - len(split) == (0 < rows % 16 < accumulation * world_size)
    assert split == one_process[: len(split)]


@each_option
@pytest.mark.parametrize("accumulation, world_size", [(3, 2), (2, 3), (1, 6)])
def test_steps_are_the_same_for_any_split_with_options(accumulation, world_size, options):
    one = steps_of(1003, 6, 1, 3, **options)
    assert rows_of(steps_of(1003, accumulation, world_size, 3, **options)) == rows_of(one)


@pytest.mark.parametrize("options", [{}, {"token_budget": 1024}], ids=["plain", "tokens"])
def test_grouped_by_task_the_steps_are_the_same_in_micro_batches_of_few_tasks(options):
    _, task_ids = made_rows(3000)
    plain, grouped = (steps_of(3000, 2, 4, group_tasks=group, **options) for group in (False, True))
    assert rows_of(grouped) == rows_of(plain)
    few, many = (np.mean([len(set(task_ids[micro])) for step in steps for micro in step]) for steps in (grouped, plain))
    assert few < 0.5 * many
    assert [[len(micro) for micro in step] for step in grouped] == [[len(micro) for micro in step] for step in plain]


def test_micro_batches_of_a_step_are_dealt_out_so_that_processes_take_neighbours_at_a_time():
    lengths, _ = made_rows(1024)
    for first, second, third, fourth in steps_of(1024, 2, 2, batch_size=4):
        assert lengths[first + second].max() <= lengths[third + fourth].min()


def test_processes_work_on_rows_of_similar_length_at_a_time():
    lengths, _ = made_rows(4096)
    means = np.array([[lengths[rows].mean() for rows in step] for step in steps_of(4096, 1, 2)]).T
    assert np.abs(np.subtract(*means)).mean() < 3 < np.std(means[0])


@pytest.mark.parametrize("accumulation, world_size", [(1, 2), (2, 2), (1, 3)])
def test_processes_work_on_as_many_rows_and_similarly_many_tokens_at_a_time(accumulation, world_size):
    lengths, _ = made_rows(4096)
    ratios, uneven = [], 0
    for step in steps_of(4096, accumulation, world_size, token_budget=1024):
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


# ---- same inputs, same order ----


@each_option
def test_order_is_a_function_of_seed_and_epoch(options):
    first = steps_of(500, 2, 1, epoch=2, seed=7, **options)
    np.random.random(3)  # the global generator is what must not matter
    assert steps_of(500, 2, 1, epoch=2, seed=7, **options) == first
    assert steps_of(500, 2, 1, epoch=3, seed=7, **options) != first
    assert steps_of(500, 2, 1, epoch=2, seed=8, **options) != first


def test_order_does_not_depend_on_the_epochs_before():
    sampler = LengthGroupedBatchSampler(*made_rows(500), 16, seed=7)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]


@pytest.mark.parametrize("options", [{"batch_size": 16}, {"token_budget": 2048}], ids=str)
def test_batches_hold_other_rows_in_every_epoch(options):
    together = [{tuple(rows) for rows in rows_of(steps_of(6400, epoch=epoch, **options))} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


# ---- proportions and padding ----


@pytest.mark.parametrize(
    "epoch, options",
    [
        (0, {"batch_size": 16}),
        (1, {"batch_size": 16}),
        (0, {"batch_size": 32}),
        (1, {"temperature": 2.0}),
        (1, {"temperature": 100.0}),
        (1, {"token_budget": 2048}),
        (1, {"token_budget": 512}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_each_task_keeps_its_proportion_within_two_points_over_any_50_steps(epoch, options):
    """Of the rows, or under a token budget of the tokens."""
    lengths, task_ids = made_rows(16_000)
    weights = lengths if "token_budget" in options else np.ones(len(lengths))
    steps = [rows for (rows,) in steps_of(16_000, epoch=epoch, **options)]
    whole = [rows for rows in steps if "token_budget" in options or len(rows) == len(steps[0])]
    counts = np.array([np.bincount(task_ids[rows], weights[rows], minlength=len(SHARES)) for rows in whole])
    running = np.concatenate([np.zeros((1, len(SHARES))), counts.cumsum(axis=0)])
    window = running[WINDOW:] - running[:-WINDOW]
    shares = window / window.sum(axis=1, keepdims=True)
    assert WINDOW == 50
    assert np.abs(shares - counts.sum(axis=0) / counts.sum()).max() <= 0.02


@each_option
def test_steps_do_not_come_in_order_of_length(options):
    lengths, _ = made_rows(6000)
    means = np.array([lengths[rows].mean() for rows in rows_of(steps_of(6000, 2, 1, **options))])
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.1
    # Steps of one task alone, the longest and shortest among them, find their place a little later than others.
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize("options", [{"batch_size": 16}, {"token_budget": 2048}], ids=str)
@pytest.mark.slow
def test_the_beginning_of_an_epoch_has_examples_of_all_lengths(options):
    """A run shorter than an epoch would otherwise train on a part of the data."""
    lengths, task_ids = made_rows(16_000)
    off = []
    for seed in range(3):
        first = np.concatenate([rows for (rows,) in steps_of(16_000, seed=seed, **options)][:100])
        means = [[lengths[rows][task_ids[rows] == task].mean() for task in range(8)] for rows in (first, slice(None))]
        off.append(np.divide(*means) - 1)
    assert np.abs(np.mean(off, axis=0)).max() < {"batch_size": 0.1, "token_budget": 0.2}[next(iter(options))]


def test_one_task_alone_does_not_come_in_order_of_length_either():
    lengths = np.random.default_rng(0).integers(35, 256, size=3200)
    means = [lengths[rows].mean() for rows in plan_epoch(lengths, np.zeros(3200, dtype=int), 16, 0, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("tasks", [1, 3])
def test_other_numbers_of_tasks_are_planned_too(tasks):
    lengths = np.arange(200) % 50 + 10
    plan = plan_epoch(lengths, np.arange(200) % tasks, 8, 0, 0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(200))


def test_padding_stays_below_three_percent():
    lengths, task_ids = made_rows(24_000)
    padded = sum(len(rows) * lengths[rows].max() for rows in plan_epoch(lengths, task_ids, 16, 42, 0))
    assert 1 - lengths.sum() / padded < 0.03
    shuffled = np.random.default_rng(0).permutation(len(lengths)).reshape(-1, 16)
    unsorted = sum(len(rows) * lengths[rows].max() for rows in shuffled)
    assert 1 - lengths.sum() / unsorted > 0.2, "rows in random order must need much padding, or nothing is shown"


@pytest.mark.parametrize("budget, least", [(2048, 0.95), (1024, 0.9)])
def test_micro_batches_are_full_and_almost_without_padding(budget, least):
    lengths, _ = made_rows(24_000)
    padded = [len(rows) * lengths[rows].max() for (rows,) in steps_of(24_000, token_budget=budget)]
    assert np.mean(padded) > least * budget
    assert 1 - lengths.sum() / sum(padded) < 0.01


# ---- temperature ----


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 5000), min_size=1, max_size=9).filter(any), temperature=st.floats(1, 100))
def test_proportions_follow_the_temperature_and_add_up_to_the_data(counts, temperature):
    counts = np.array(counts)
    rows = examples_per_task(counts, temperature)
    assert rows.sum() == counts.sum()
    assert ((rows > 0) == (counts > 0)).all()
    weights = np.array([count ** (1 / temperature) if count else 0 for count in counts])
    assert np.abs(rows - counts.sum() * weights / weights.sum()).max() < 1 + 1e-6


@pytest.mark.parametrize("temperature, expected", [(1, [900, 90, 10]), (2, [703, 223, 74]), (1e9, [334, 333, 333])])
def test_a_larger_temperature_balances_more(temperature, expected):
    assert examples_per_task(np.array([900, 90, 10]), temperature).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), taken=st.integers(1, 100), epochs=st.integers(1, 12))
def test_no_row_comes_again_before_every_other_has_come_as_often(rows, taken, epochs):
    own = np.arange(rows) * 3 + 1
    stream = np.concatenate([sample_cyclically(own, taken, seed=5, task_id=2, epoch=epoch) for epoch in range(epochs)])
    assert len(stream) == taken * epochs
    for first in range(0, len(stream), rows):
        passed = stream[first : first + rows]
        assert len(set(passed)) == len(passed) and set(passed) <= set(own)


def test_passes_over_a_task_have_orders_of_their_own():
    keys = itertools.product((0, 1), (0, 1), (0, 1))
    orders = {tuple(sample_cyclically(np.arange(50), 50, seed, task, epoch)) for seed, task, epoch in keys}
    assert len(orders) == 8


@pytest.mark.parametrize("temperature", [1.5, 3.0, 100.0])
def test_an_epoch_has_as_many_rows_as_the_data_in_the_proportions_of_the_temperature(temperature):
    lengths, task_ids = made_rows(3200)
    rows = np.concatenate(plan_epoch(lengths, task_ids, 16, 0, 2, temperature=temperature))
    expected = examples_per_task(np.bincount(task_ids), temperature)
    assert np.bincount(task_ids[rows]).tolist() == expected.tolist()
    times = np.bincount(rows, minlength=3200)
    for task_id, count in enumerate(np.bincount(task_ids)):
        # What a part of a pass adds to whole ones: one, or two where an epoch goes from one pass into the next.
        own = times[task_ids == task_id]
        assert own.max() - own.min() <= 2
        assert own.min() >= expected[task_id] // count - 1


@pytest.mark.parametrize("steps", [1, 5, 11, 40])
@pytest.mark.parametrize("options", [{}, {"token_budget": 60}, {"temperature": 3.0}], ids=str)
def test_the_tasks_that_are_met_are_those_of_the_steps(options, steps):
    generator = np.random.default_rng(5)
    task_ids = np.concatenate([np.zeros(60, dtype=int), np.arange(1, 15)])
    sampler = LengthGroupedBatchSampler(generator.integers(5, 20, len(task_ids)), task_ids, 3, 4, 2, **options)
    met, epoch, left = set(), 0, steps
    while left > 0:
        sampler.set_epoch(epoch)
        for step in sampler.steps()[:left]:
            met |= {int(task_ids[index]) for index in step}
        epoch, left = epoch + 1, left - sampler.steps_per_epoch
    assert sampler.tasks_met(steps) == met and sampler.epoch == 0
    assert steps > 1 or met != {*task_ids.tolist()}


def test_a_task_left_out_of_the_first_epoch_is_met_in_a_later_one():
    # Five tasks of one example each, of which an epoch takes four.
    sampler = LengthGroupedBatchSampler(np.full(5, 10), np.arange(5), 2, seed=0, accumulation=2)
    assert (sampler.steps_per_epoch, sampler.left_out) == (1, 1)
    assert len(sampler.tasks_met(1)) == 4 and sampler.tasks_met(30) == {0, 1, 2, 3, 4}
    assert sampler.epoch == 0


# ---- held-out examples ----


@pytest.mark.parametrize("count", [3, 10, 100, 996])
def test_held_out_examples_are_of_every_task_in_its_proportion(count):
    sizes = np.array([600, 300, 99, 1])
    rows = datasets.Dataset.from_dict({"task_id": np.repeat(range(4), sizes), "number": range(1000)})
    drawn = []
    for seed in (0, 0, 1):
        train, held_out = split(rows, count, seed)
        drawn.append(held_out["number"][:])
        assert sorted([*train["number"], *drawn[-1]]) == [*range(1000)] and len(held_out) == count
        found = np.bincount(held_out["task_id"], minlength=4)
        assert found[3] == 0 and found[:3].min() >= 1, "the only example of a task is for training"
        assert np.abs(found - count * sizes / 1000).max() < 2
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("by_task", "expected"), [(False, "6784bd775120"), (True, "14ed7d180aec")])
def test_the_same_examples_are_held_out_in_every_version(by_task, expected):
    rows = datasets.Dataset.from_dict({"task_id": [number**2 % 7 for number in range(400)], "number": range(400)})
    drawn = split(rows, 90, 3, by_task)[1]["number"][:]
    assert files.sha256_of(repr(drawn).encode()).startswith(expected)
