"""Batches of rows of similar length in which, over any short stretch of steps, each task keeps its share.

A plan is a pure function of (seed, epoch): every process computes it and takes its own rows, so nothing is sharded
again, no row is repeated, and a resumed run sees the rows it would have seen. Two options: batches by padded tokens
instead of rows, and more equal shares of the tasks (``mtl_lora.training.shares``), in which case rows of small tasks do
come again.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mtl_lora.errors import UserError
from mtl_lora.training.order import balanced_order, stratified_rows

# Rows are sorted by length within pools of so many batches: enough to leave almost no padding, few enough that a
# batch differs from epoch to epoch.
LENGTH_POOL = 128
# Over any WINDOW steps each task stays within two points of its share: of the rows, or of the tokens where tokens are
# what batches are measured in.
WINDOW = 50


def plan_epoch(
    lengths: np.ndarray,
    task_ids: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    length_pool: int = LENGTH_POOL,
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Row indices of each global batch of an epoch: every row once, the last batch perhaps smaller.

    lengths (tokens) and task_ids: (rows,). batch_size: rows of an optimiser step over all processes. length_pool:
    batches sorted by length together; with 1, every batch holds each task's share of rows. temperature: other than 1,
    the epoch has as many rows, but of each task as many as ``mtl_lora.training.shares`` says.
    """
    generator = np.random.default_rng([seed, epoch])
    order = stratified_rows(task_ids, temperature, seed, epoch, generator)
    whole = len(order) - len(order) % batch_size
    order, rest = order[:whole], order[whole:]
    pool = batch_size * length_pool
    batches = []
    for start in range(0, whole, pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(generator.permutation(rows.reshape(-1, batch_size)))
    batches = [batches[index] for index in balanced_order(batches, task_ids, np.ones(len(task_ids)), WINDOW)]
    if len(rest):
        batches.append(rest[np.argsort(lengths[rest], kind="stable")])
    return batches


def plan_by_tokens(
    lengths: np.ndarray,
    task_ids: np.ndarray,
    token_budget: int,
    parts: int,
    seed: int,
    epoch: int,
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Row indices of each global batch of an epoch, as many as ``parts`` micro-batches of ``token_budget`` tokens hold.

    The rows of an epoch are sorted by length, those of one length at random, and cut into steps by ``step_sizes``. So
    the number of steps follows from the lengths alone and, without a temperature, is that of every epoch, which the
    Trainer relies on; within pools drawn anew it would not be. Fewer than ``parts`` rows are left out, others in every
    epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    order = stratified_rows(task_ids, temperature, seed, epoch, generator)
    sizes = step_sizes(lengths[order], token_budget, parts)
    rows = order[: sum(sizes)]
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    steps = [step[::-1] for step in np.split(rows, np.cumsum(sizes)[:-1])] if sizes else []
    steps = [steps[index] for index in generator.permutation(len(steps))]
    return [steps[index] for index in balanced_order(steps, task_ids, lengths, WINDOW)]


def step_sizes(lengths: np.ndarray, token_budget: int, parts: int) -> list[int]:
    """Rows of each step where rows of these lengths are taken from the longest to the shortest.

    A step that begins with a row of length L has ``parts`` micro-batches of floor(token_budget / L) rows, and the last
    step what is left, if that is a row for each micro-batch. Should others than the shortest rows be left out, the
    sizes still keep to the budget: rows then move up, to places of rows at least as long.
    """
    lengths = np.sort(lengths)[::-1]
    sizes, start = [], 0
    while len(lengths) - start >= parts:
        sizes.append(min(parts * (token_budget // int(lengths[start])), len(lengths) - start))
        start += sizes[-1]
    return sizes


class LengthBatchSampler(Sampler[list[int]]):
    """The micro-batches of one process, ``accumulation`` of them a step.

    Each has at most ``batch_size`` rows or, with a ``token_budget``, at most so many tokens with its padding (rows
    times the longest). A step's global batch, of ``batch_size * accumulation * world_size`` rows or of
    ``accumulation * world_size`` token budgets, is the same for any split of that product, so one process and many
    take the same steps. Its rows are sorted by length and dealt out in consecutive runs, so processes that work at the
    same time have similar work. Where the last, smaller batch cannot give every micro-batch a row, its rows are left
    out of that epoch.

    Raises ``UserError`` where that would leave no step at all, and for a row longer than the token budget.
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
        token_budget: int = 0,
        temperature: float = 1.0,
    ):
        self.lengths, self.task_ids, self.seed = np.asarray(lengths), np.asarray(task_ids), seed
        self.batch_size, self.accumulation, self.world_size, self.rank = batch_size, accumulation, world_size, rank
        self.length_pool, self.token_budget, self.temperature, self.epoch = length_pool, token_budget, temperature, 0
        if token_budget and self.lengths.max(initial=0) > token_budget:
            raise UserError(
                f"token_budget must be at least the longest row's {self.lengths.max()} tokens, not {token_budget}; "
                "raise it, or lower cutoff_len"
            )
        self.steps_per_epoch = self._steps_of_pass(0)
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(self.lengths)} training rows are too few for a step of {accumulation} x {world_size} "
                "micro-batches (gradient_accumulation_steps x devices); lower gradient_accumulation_steps or add rows"
            )

    @property
    def parts(self) -> int:
        """Micro-batches of one optimiser step over all processes."""
        return self.accumulation * self.world_size

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimiser step over all processes, without a token budget."""
        return self.batch_size * self.parts

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose plan the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            micro_batches = np.array_split(rows, self.parts)
            for index in range(self.rank, self.parts, self.world_size):
                yield micro_batches[index].tolist()

    def steps(self) -> Iterator[np.ndarray]:
        """The rows of each optimiser step of the epoch, over all processes.

        Every epoch has as many steps as the first. With both a token budget and a temperature passes over the data
        need a step more or fewer, for each draws other rows: then they follow one another without regard to where an
        epoch ends, and nothing is left out or comes twice.
        """
        number, start = self.epoch, 0
        if self._passes_differ:
            number, start = 0, self.epoch * self.steps_per_epoch
            while start >= (steps := self._steps_of_pass(number)):
                number, start = number + 1, start - steps
        left = self.steps_per_epoch
        while left:
            steps = self._plan(number)[start : start + left]
            yield from steps
            number, start, left = number + 1, 0, left - len(steps)

    @property
    def _passes_differ(self) -> bool:
        return bool(self.token_budget) and self.temperature != 1

    def _plan(self, number: int) -> list[np.ndarray]:
        data = self.lengths, self.task_ids
        if self.token_budget:
            return plan_by_tokens(*data, self.token_budget, self.parts, self.seed, number, self.temperature)
        plan = plan_epoch(*data, self.global_batch_size, self.seed, number, self.length_pool, self.temperature)
        return plan[: self.steps_per_epoch]

    def _steps_of_pass(self, number: int) -> int:
        if not self.token_budget:
            whole, rest = divmod(len(self.lengths), self.global_batch_size)
            return whole + (rest >= self.parts)
        rows = slice(None)
        if self._passes_differ:
            rows = stratified_rows(self.task_ids, self.temperature, self.seed, number, np.random.default_rng(0))
        return len(step_sizes(self.lengths[rows], self.token_budget, self.parts))
