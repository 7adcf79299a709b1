"""Batches of rows of similar length in which, over any short stretch of steps, each task keeps its share.

A plan is a pure function of (seed, epoch): every process computes it and takes its own rows, so nothing is sharded
again, no row is repeated, and a resumed run sees the rows it would have seen.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mtl_lora.errors import UserError

# Rows are sorted by length within pools of so many batches: enough to leave almost no padding, few enough that a
# batch differs from epoch to epoch.
LENGTH_POOL = 128
# From so many batches the next one is chosen; more did not keep the shares any better.
_CANDIDATES = 512
# Over any WINDOW steps each task shall stay within two points of its share; the choice aims a little lower.
WINDOW = 50
_AIM = 0.015


def plan_epoch(
    lengths: np.ndarray, task_ids: np.ndarray, batch_size: int, seed: int, epoch: int, length_pool: int = LENGTH_POOL
) -> list[np.ndarray]:
    """Row indices of each global batch of an epoch: every row once, the last batch perhaps smaller.

    lengths (tokens) and task_ids: (rows,). batch_size: rows of an optimiser step over all processes. length_pool:
    batches sorted by length together; with 1, every batch holds each task's share of rows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = _stratified_order(task_ids, generator)
    whole = len(order) - len(order) % batch_size
    order, rest = order[:whole], order[whole:]
    pool = batch_size * length_pool
    batches = []
    for start in range(0, whole, pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(generator.permutation(rows.reshape(-1, batch_size)))
    batches = [batches[index] for index in _balanced_order(batches, task_ids)]
    if len(rest):
        batches.append(rest[np.argsort(lengths[rest], kind="stable")])
    return batches


def _stratified_order(task_ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random order of the rows in which the rows of each task are spread evenly."""
    position = np.empty(len(task_ids))
    for task_id in np.unique(task_ids):
        rows = generator.permutation(np.flatnonzero(task_ids == task_id))
        position[rows] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(position, kind="stable")


def _balanced_order(batches: list[np.ndarray], task_ids: np.ndarray) -> list[int]:
    """An order of the batches in which every stretch of ``WINDOW`` of them holds each task's share.

    Greedy: of the next few hundred batches, the one that brings the running counts closest to where the shares
    would have them, and that above all does not let the last ``WINDOW`` batches stray.
    """
    if not batches:
        return []
    counts = np.zeros((len(batches), int(task_ids.max()) + 1), dtype=np.float32)
    np.add.at(counts, (np.arange(len(batches))[:, None], task_ids[np.array(batches)]), 1)
    excess = counts - counts.mean(axis=0)
    batch_size = len(batches[0])
    window, waiting = list(range(len(batches)))[:_CANDIDATES], list(range(_CANDIDATES, len(batches)))[::-1]
    candidates = excess[window]
    drifts, order = [np.zeros_like(excess[0])], []
    for _ in range(len(batches)):
        drift = candidates + drifts[-1]
        stray = np.abs(drift - drifts[max(0, len(drifts) - WINDOW)]).max(axis=1)
        over = np.maximum(stray - _AIM * WINDOW * batch_size, 0)
        best = int(np.argmin((drift**2).sum(axis=1) + 10 * over * (batch_size + over)))
        order.append(window[best])
        drifts.append(drift[best])
        if waiting:
            window[best] = waiting.pop()
            candidates[best] = excess[window[best]]
        else:
            window.pop(best)
            candidates = np.delete(candidates, best, axis=0)
    return order


class LengthBatchSampler(Sampler[list[int]]):
    """The micro-batches of one process: ``accumulation`` of them a step, each of at most ``batch_size`` rows.

    A step's global batch of ``batch_size * accumulation * world_size`` rows is the same for any split of that
    product, so one process and many take the same steps. Its rows are sorted by length and dealt out in
    consecutive runs, so processes that work at the same time have similar work. Where the last, smaller batch can
    not give every micro-batch a row, its rows are left out of that epoch. Raises ``UserError`` where that would leave
    no step at all.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        task_ids: np.ndarray,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        length_pool: int = LENGTH_POOL,
    ):
        self.lengths, self.task_ids, self.seed = np.asarray(lengths), np.asarray(task_ids), seed
        self.batch_size, self.accumulation, self.world_size, self.rank = batch_size, accumulation, world_size, rank
        self.length_pool, self.epoch = length_pool, 0
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(self.lengths)} training rows are too few for a step of {accumulation} x {world_size} "
                "micro-batches (gradient_accumulation_steps x devices); lower gradient_accumulation_steps or add rows"
            )

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimiser step over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        whole, rest = divmod(len(self.lengths), self.global_batch_size)
        return whole + (rest >= self.accumulation * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose plan the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        parts = self.accumulation * self.world_size
        plan = plan_epoch(self.lengths, self.task_ids, self.global_batch_size, self.seed, self.epoch, self.length_pool)
        for rows in plan[: self.steps_per_epoch]:
            micro_batches = np.array_split(rows, parts)
            for index in range(self.rank, parts, self.world_size):
                yield micro_batches[index].tolist()
