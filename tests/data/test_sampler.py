"""Batches: every row once an epoch, the same steps for any number of processes, each task's share in any stretch."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_rows import SHARES, made_rows

from mtl_lora.errors import UserError
from mtl_lora.training.sampler import WINDOW, LengthBatchSampler, plan_epoch


def steps_of(rows: int, batch_size: int, accumulation: int, world_size: int, epoch: int = 0, seed: int = 3) -> list:
    """The rows of each optimiser step, in order, put together from what every process takes."""
    lengths, task_ids = made_rows(rows)
    taken = []
    for rank in range(world_size):
        sampler = LengthBatchSampler(lengths, task_ids, batch_size, seed, accumulation, world_size, rank)
        sampler.set_epoch(epoch)
        taken.append(list(sampler))
        assert len(taken[-1]) == len(sampler) == sampler.steps_per_epoch * accumulation
    steps = []
    for first in range(0, len(taken[0]), accumulation):
        micro_batches = [process[first + n] for n in range(accumulation) for process in taken]
        steps.append([row for micro_batch in micro_batches for row in micro_batch])
    return steps


# ---- every row once ----


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 700),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
def test_every_row_comes_once_an_epoch_to_one_process(rows, batch_size, accumulation, world_size, epoch):
    lengths, task_ids = made_rows(rows)
    whole = batch_size * accumulation * world_size
    rest = rows % whole
    left_out = rest if rest < accumulation * world_size else 0
    seen = []
    for rank in range(world_size):
        arguments = (lengths, task_ids, batch_size, 1, accumulation, world_size, rank)
        if rows == left_out:
            with pytest.raises(UserError):
                LengthBatchSampler(*arguments)
            return
        sampler = LengthBatchSampler(*arguments)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == -(-(rows - left_out) // whole) * accumulation
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        seen += [row for batch in batches for row in batch]
    assert len(seen) == len(set(seen)) == rows - left_out
    assert set(seen) <= set(range(rows))


def test_rows_left_out_of_an_epoch_are_others_in_the_next():
    lengths, task_ids = made_rows(101)
    sampler = LengthBatchSampler(lengths, task_ids, 5, seed=0, accumulation=2)  # 101 = 10 steps of 10 and one row
    left_out = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == 20
        left_out.add(*set(range(101)) - {row for batch in batches for row in batch})
    assert len(left_out) > 1


def test_small_last_batch_is_dealt_out_evenly_and_comes_last():
    *steps, last = steps_of(rows=87, batch_size=4, accumulation=2, world_size=2)
    assert [len(step) for step in steps] == [16] * 5 and len(last) == 7
    lengths, task_ids = made_rows(87)
    samplers = [LengthBatchSampler(lengths, task_ids, 4, 3, 2, 2, rank) for rank in range(2)]
    assert sorted(len(batch) for sampler in samplers for batch in list(sampler)[-2:]) == [1, 2, 2, 2]


def test_too_few_rows_for_one_step_are_refused():
    lengths, task_ids = made_rows(5)
    assert len(LengthBatchSampler(lengths, task_ids, 8, seed=0)) == 1
    with pytest.raises(UserError, match=r"5 training rows are too few for a step of 4 x 2 micro-batches"):
        LengthBatchSampler(lengths, task_ids, 8, seed=0, accumulation=4, world_size=2)


# ---- the same steps for any split ----


@pytest.mark.parametrize("rows", [640, 643, 655])
@pytest.mark.parametrize(
    "batch_size, accumulation, world_size", [(8, 1, 2), (8, 2, 1), (4, 2, 2), (4, 1, 4), (2, 4, 2), (1, 2, 8)]
)
def test_steps_are_the_same_for_any_number_of_processes_and_micro_batches(rows, batch_size, accumulation, world_size):
    one_process = steps_of(rows, batch_size=16, accumulation=1, world_size=1)
    split = steps_of(rows, batch_size, accumulation, world_size)
    dropped = len(one_process) - len(split)
    assert dropped == (0 < rows % 16 < accumulation * world_size)
    assert [sorted(step) for step in split] == [sorted(step) for step in one_process[: len(split)]]


def test_processes_work_on_rows_of_similar_length_at_a_time():
    lengths, task_ids = made_rows(4096)
    ranks = [LengthBatchSampler(lengths, task_ids, 8, 0, world_size=2, rank=rank) for rank in range(2)]
    means = [[lengths[batch].mean() for batch in sampler] for sampler in ranks]
    assert np.abs(np.subtract(*means)).mean() < 3 < np.std(means[0])


def test_micro_batches_of_a_step_are_dealt_out_so_that_processes_take_neighbours_at_a_time():
    lengths, task_ids = made_rows(1024)
    first, second = (list(LengthBatchSampler(lengths, task_ids, 4, 0, 2, 2, rank)) for rank in range(2))
    for step in range(0, len(first), 2):
        earlier, later = (lengths[first[step + n] + second[step + n]] for n in range(2))
        assert earlier.max() <= later.min()


# ---- same inputs, same order ----


def test_order_is_a_function_of_seed_and_epoch():
    first = steps_of(500, 16, 1, 1, epoch=2, seed=7)
    assert steps_of(500, 16, 1, 1, epoch=2, seed=7) == first
    assert steps_of(500, 16, 1, 1, epoch=3, seed=7) != first
    assert steps_of(500, 16, 1, 1, epoch=2, seed=8) != first


def test_order_does_not_depend_on_what_was_drawn_before():
    lengths, task_ids = made_rows(500)
    sampler = LengthBatchSampler(lengths, task_ids, 16, seed=7)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        np.random.random(3)  # the global generator is what must not matter
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]


def test_batches_hold_other_rows_in_every_epoch():
    together = [{tuple(sorted(step)) for step in steps_of(6400, 16, 1, 1, epoch=epoch)} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < 0.02 * len(together[0])


# ---- shares and padding ----


@pytest.fixture(scope="module", params=[(16, 0), (16, 1), (32, 0)], ids=["16 rows", "epoch 1", "32 rows"])
def planned(request):
    """(batch size, lengths, task ids, plan) of a data set of the shape of the real one."""
    batch_size, epoch = request.param
    lengths, task_ids = made_rows(24_000)
    return batch_size, lengths, task_ids, plan_epoch(lengths, task_ids, batch_size, 42, epoch)


def test_each_task_keeps_its_share_within_two_points_over_any_50_steps(planned):
    batch_size, _, task_ids, plan = planned
    counts = np.array([np.bincount(task_ids[rows], minlength=len(SHARES)) for rows in plan])
    running = np.concatenate([np.zeros((1, len(SHARES)), dtype=int), counts.cumsum(axis=0)])
    shares = (running[WINDOW:] - running[:-WINDOW]) / (WINDOW * batch_size)
    whole = np.bincount(task_ids) / len(task_ids)
    assert WINDOW == 50
    assert np.abs(shares - whole).max() <= 0.02


def test_padding_stays_below_three_percent(planned):
    batch_size, lengths, _, plan = planned
    padded = sum(len(rows) * lengths[rows].max() for rows in plan)
    assert 1 - lengths.sum() / padded < 0.03
    shuffled = np.random.default_rng(0).permutation(len(lengths)).reshape(-1, batch_size)
    unsorted = sum(len(rows) * lengths[rows].max() for rows in shuffled)
    assert 1 - lengths.sum() / unsorted > 0.2, "rows in random order must need much padding, or nothing is shown"


def test_batches_do_not_come_in_order_of_length(planned):
    _, lengths, _, plan = planned
    means = np.array([lengths[rows].mean() for rows in plan])
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.1
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


def test_planning_an_epoch_takes_a_moment():
    lengths, task_ids = made_rows(24_000)
    started = time.perf_counter()
    plan_epoch(lengths, task_ids, 16, 0, 0)
    assert time.perf_counter() - started < 10


def test_one_task_alone_does_not_come_in_order_of_length_either():
    lengths = np.random.default_rng(0).integers(35, 256, size=3200)
    means = [lengths[rows].mean() for rows in plan_epoch(lengths, np.zeros(3200, dtype=int), 16, 0, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("tasks", [1, 3])
def test_other_numbers_of_tasks_are_planned_too(tasks):
    lengths = np.arange(200) % 50 + 10
    plan = plan_epoch(lengths, np.arange(200) % tasks, 8, 0, 0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(200))
