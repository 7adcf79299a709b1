"""Batches of examples of similar length in which each task keeps its proportion over any short stretch of steps.

The plan of an epoch is a pure function of (seed, epoch): every process computes it and takes its own examples. So
nothing is sharded a second time, no example is repeated, and a resumed run sees the same examples as an uninterrupted
one. Two options: batches sized in padded tokens, and more equal task proportions, which repeat examples of small tasks.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch.utils.data import Sampler

from mtl_lora.errors import UserError
from mtl_lora.training.config import TrainingConfig

# Over any WINDOW steps of an epoch, each task stays within about two percentage points of its proportion of the
# examples or, with a token budget, of the tokens.
WINDOW = 50
# The greedy order chooses the next step from this many candidates. More keep the proportions no better, and put off the
# steps of one task, which are the shortest and the longest, so that a run shorter than an epoch would hardly see these.
# Steps of a token budget need more, above all those of fewer than eight examples.
CANDIDATES, CANDIDATES_BY_TOKENS, CANDIDATES_OF_FEW = 32, 64, 192
OLD_CANDIDATES = 512  # of versions that did not record the number; also where steps have examples of all lengths
_AIM = 0.015  # slightly below the promised two percentage points


def examples_per_task(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Return the number of examples of each task in an epoch, (T,), which sum to the size of the data.

    counts: (T,), the number of examples n_t of each task. Task t's proportion is proportional to n_t^(1 / temperature),
    rounded by the largest remainder: temperature 1 gives the proportions of the data, a large temperature nearly equal
    ones (arXiv 1910.10683, section 3.5.2).
    """
    weights = np.where(counts > 0, counts, 1) ** (1 / temperature) * (counts > 0)
    exact = counts.sum() * weights / weights.sum()
    taken = np.floor(exact).astype(np.int64)
    missing = counts.sum() - taken.sum()
    taken[np.argsort(taken - exact, kind="stable")[:missing]] += 1
    return taken


def sample_cyclically(examples: np.ndarray, count: int, seed: int, task_id: int, epoch: int) -> np.ndarray:
    """Return the ``count`` examples of a task that an epoch uses, in order, sampled without replacement.

    A task cycles through reshuffled passes over its examples that continue across epochs, so no example is repeated
    before every other example of the task has been used as often.
    """
    first = epoch * count // len(examples)
    last = ((epoch + 1) * count - 1) // len(examples)
    # task_id + 1, because numpy treats (a, b) and (a, b, 0) as the same seed, and (seed, epoch) is already used.
    generators = [np.random.default_rng([seed, number, task_id + 1]) for number in range(first, last + 1)]
    passes = [generator.permutation(examples) for generator in generators]
    start = epoch * count - first * len(examples)
    return np.concatenate(passes)[start : start + count]


def stratified_order(
    task_ids: np.ndarray, temperature: float, seed: int, epoch: int, generator: np.random.Generator
) -> np.ndarray:
    """Return the examples of an epoch in a random order that spreads the examples of each task evenly.

    With a temperature of 1 every example occurs once; otherwise ``examples_per_task`` gives each task's number of
    examples.
    """
    ids, of_task = np.unique(task_ids, return_inverse=True)
    taken = examples_per_task(np.bincount(of_task), temperature)
    examples, positions = [], []
    for number, task_id in enumerate(ids):
        own = np.flatnonzero(of_task == number)
        if temperature == 1:
            own = generator.permutation(own)
        else:
            own = sample_cyclically(own, taken[number], seed, int(task_id), epoch)
        examples.append(own)
        positions.append((np.arange(len(own)) + generator.random()) / len(own))
    return np.concatenate(examples)[np.argsort(np.concatenate(positions), kind="stable")]


def balanced_order(
    steps: list[np.ndarray], task_ids: np.ndarray, weights: np.ndarray, choices: int = CANDIDATES
) -> list[int]:
    """Return an order of the steps (arrays of examples) in which any ``WINDOW`` steps keep each task's proportion.

    task_ids and weights: (examples,); an example counts by its weight, and steps should have similar weights. The order
    is greedy: among the next ``choices`` steps it takes the one that brings the running counts closest to the tasks'
    proportions, and penalises most a step that lets the last ``WINDOW`` steps stray from them.
    """
    if not steps:
        return []
    tasks = int(task_ids.max()) + 1
    counts = [np.bincount(task_ids[step], weights=weights[step], minlength=tasks) for step in steps]
    counts = np.array(counts, dtype=np.float32)
    sizes = counts.sum(axis=1, dtype=np.float64)
    size = float(sizes.mean())
    excess = counts - (sizes / size).astype(np.float32)[:, None] * counts.mean(axis=0)
    following, waiting = list(range(len(steps)))[:choices], list(range(choices, len(steps)))[::-1]
    candidates = excess[following]
    drifts, order = [np.zeros_like(excess[0])], []
    for _ in range(len(steps)):
        drift = candidates + drifts[-1]
        stray = np.abs(drift - drifts[max(0, len(drifts) - WINDOW)]).max(axis=1)
        over = np.maximum(stray - _AIM * WINDOW * size, 0)
        best = int(np.argmin((drift**2).sum(axis=1) + 10 * over * (size + over)))
        order.append(following[best])
        drifts.append(drift[best])
        if waiting:
            following[best] = waiting.pop()
            candidates[best] = excess[following[best]]
        else:
            following.pop(best)
            candidates = np.delete(candidates, best, axis=0)
    return order


def plan_epoch(
    lengths: np.ndarray,
    task_ids: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    length_pool: int = TrainingConfig.length_pool,
    temperature: float = 1.0,
    choices: int = CANDIDATES,
) -> list[np.ndarray]:
    """Return the indices of the examples of each global batch of an epoch; the last batch may be smaller.

    lengths (tokens) and task_ids: (examples,). batch_size: examples in an optimiser step over all processes.
    length_pool: number of batches whose examples are sorted by length together; with 1, every batch keeps each task's
    proportion. temperature: with 1, every example occurs once; otherwise the epoch has the same length, but
    ``examples_per_task`` gives each task's number of examples. choices: see ``balanced_order``.
    """
    generator = np.random.default_rng([seed, epoch])
    order = stratified_order(task_ids, temperature, seed, epoch, generator)
    full = len(order) - len(order) % batch_size
    order, rest = order[:full], order[full:]
    pool = batch_size * length_pool
    batches = []
    for start in range(0, full, pool):
        pooled = order[start : start + pool]
        pooled = pooled[np.argsort(lengths[pooled], kind="stable")]
        batches.extend(generator.permutation(pooled.reshape(-1, batch_size)))
    choices = choices if length_pool > 1 else OLD_CANDIDATES
    batches = [batches[index] for index in balanced_order(batches, task_ids, np.ones(len(task_ids)), choices)]
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
    choices: int = CANDIDATES_BY_TOKENS,
) -> list[np.ndarray]:
    """Return the indices of the examples of each global batch: ``parts`` micro-batches of ``token_budget`` tokens.

    The examples of an epoch are sorted by length, ties in random order, and cut into steps by ``step_sizes``, so every
    epoch has the same number of steps, on which the Trainer relies. Fewer than ``parts`` examples are left out.
    """
    generator = np.random.default_rng([seed, epoch])
    order = stratified_order(task_ids, 1.0, seed, epoch, generator)
    sizes = step_sizes(lengths[order], token_budget, parts)
    taken = order[: sum(sizes)]
    taken = taken[np.argsort(-lengths[taken], kind="stable")]
    steps = [step[::-1] for step in np.split(taken, np.cumsum(sizes)[:-1])] if sizes else []
    steps = [steps[index] for index in generator.permutation(len(steps))]
    return [steps[index] for index in balanced_order(steps, task_ids, lengths, choices)]


def step_sizes(lengths: np.ndarray, token_budget: int, parts: int) -> list[int]:
    """Return the number of examples of each step when examples of these lengths are taken from longest to shortest.

    A step that begins with an example of length L has ``parts`` micro-batches of floor(token_budget / L) examples. The
    last step has the remaining examples, if there is at least one for each micro-batch. The sizes keep to the budget
    whichever examples are left out, because the others then move up to places of examples that are at least as long.
    """
    lengths = np.sort(lengths)[::-1]
    sizes, start = [], 0
    while len(lengths) - start >= parts:
        sizes.append(min(parts * (token_budget // int(lengths[start])), len(lengths) - start))
        start += sizes[-1]
    return sizes


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one process, ``accumulation`` of them per optimiser step; a subclass plans the steps.

    The examples of a step do not depend on how its micro-batches are split over accumulation steps and processes, so
    one process and several take the same steps.
    """

    def __init__(self, task_ids: np.ndarray, seed: int, accumulation: int, world_size: int, rank: int):
        self.task_ids, self.seed, self.epoch = np.asarray(task_ids), seed, 0
        self.accumulation, self.world_size, self.rank = accumulation, world_size, rank
        self.parts = accumulation * world_size  # micro-batches per step

    steps_per_epoch: int
    left_out: int  # examples that an epoch omits

    def steps(self) -> list[np.ndarray]:
        """Return the examples of each optimiser step of the epoch, over all processes; every epoch has the same number
        of steps."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose plan the next iteration follows."""
        self.epoch = epoch

    def tasks_met(self, steps: int) -> set[int]:
        """Return the ids of the tasks with an example in the first ``steps`` steps of a training run."""
        met, every = set(), set(self.task_ids.tolist())
        for epoch in range(-(-steps // self.steps_per_epoch)):
            self.set_epoch(epoch)
            for step in self.steps()[: steps - epoch * self.steps_per_epoch]:
                met |= set(self.task_ids[step].tolist())
            if met == every:
                break
        self.set_epoch(0)
        return met

    def too_few(self, examples: str) -> UserError:
        """Return the error for too few examples for a step. examples: their number, and their task if it is of one."""
        return UserError(
            f"{examples} are too few for a step of {self.accumulation} x {self.world_size} micro-batches "
            "(gradient_accumulation_steps x devices); lower gradient_accumulation_steps or add examples"
        )

    def _end_of_line(self) -> str:
        """Return the end of the line that describes the batches."""
        count = self.left_out
        omitted = f"; {count} of {len(self.task_ids):,} examples left out, too few for every micro-batch of a last step"
        return f"; {self.steps_per_epoch:,} steps per epoch" + (omitted if count else "")

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for examples in self.steps():
            micro_batches = np.array_split(examples, self.parts)
            for index in range(self.rank, self.parts, self.world_size):
                yield micro_batches[index].tolist()


class LengthGroupedBatchSampler(StepSampler):
    """Batches of examples of similar length from all tasks.

    A micro-batch has at most ``batch_size`` examples or, with a ``token_budget``, at most that many tokens including
    padding (examples times the longest). The examples of a step are sorted by length and distributed in consecutive
    runs, so that processes working at the same time have similar work. With ``group_tasks`` they are sorted by task
    first, so that a micro-batch has few tasks. If the last, smaller step has too few examples for one in each
    micro-batch, it is left out of the epoch.

    Raises ``UserError`` if that leaves no step at all, and for an example longer than the token budget.
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
        length_pool: int = TrainingConfig.length_pool,
        token_budget: int = 0,
        temperature: float = 1.0,
        group_tasks: bool = False,
        choices: int | None = None,
    ):
        super().__init__(task_ids, seed, accumulation, world_size, rank)
        self.lengths, self.batch_size, self.group_tasks = np.asarray(lengths), batch_size, group_tasks
        self.length_pool, self.token_budget, self.temperature = length_pool, token_budget, temperature
        self.global_batch_size = batch_size * self.parts  # examples per step if there is no token budget
        if token_budget and self.lengths.max(initial=0) > token_budget:
            raise UserError(
                f"token_budget must be at least the longest example's {self.lengths.max()} tokens, not {token_budget}; "
                "raise it, or lower cutoff_len"
            )
        if token_budget:
            sizes = step_sizes(self.lengths, token_budget, self.parts)
            self.steps_per_epoch, rest = len(sizes), len(self.lengths) - sum(sizes)
        else:
            full, rest = divmod(len(self.lengths), self.global_batch_size)
            self.steps_per_epoch = full + (rest >= self.parts)
        self.left_out = rest if rest < self.parts else 0
        if not self.steps_per_epoch:
            raise self.too_few(f"{len(self.lengths)} training examples")
        by_tokens = CANDIDATES_BY_TOKENS if len(self.lengths) >= 8 * self.steps_per_epoch else CANDIDATES_OF_FEW
        self.choices = choices or (by_tokens if token_budget else CANDIDATES)

    def steps(self) -> list[np.ndarray]:
        data, epoch = (self.lengths, self.task_ids), (self.seed, self.epoch)
        if self.token_budget:
            steps = plan_by_tokens(*data, self.token_budget, self.parts, *epoch, self.choices)
        else:
            how = self.length_pool, self.temperature, self.choices
            steps = plan_epoch(*data, self.global_batch_size, *epoch, *how)
        if self.group_tasks:
            steps = [step[np.argsort(self.task_ids[step], kind="stable")] for step in steps]
        return steps[: self.steps_per_epoch]

    def __str__(self) -> str:
        """A line that describes the global batch."""
        one = f"{self.token_budget:,} tokens with padding" if self.token_budget else f"{self.batch_size} examples"
        size = f"about {len(self.lengths) / self.steps_per_epoch:.0f}" if self.token_budget else self.global_batch_size
        split = f"{self.world_size} (devices) x {self.accumulation} (accumulation steps)"
        return f"global batch: {one} (per device) x {split}, {size} examples{self._end_of_line()}"


class RoundRobinSampler(StepSampler):
    """Steps of one task each, tasks in proportion to their number of steps, as in VL-Adapter (arXiv 2112.06825).

    batch_sizes: the number of examples in a micro-batch, by task in id order. Every example occurs once per epoch, but
    a task's last, smaller step is left out if it has too few examples for one in each micro-batch. Raises ``UserError``
    if a task that has examples is left without a step.
    """

    def __init__(
        self,
        task_ids: np.ndarray,
        batch_sizes: Mapping[str, int],
        seed: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ):
        super().__init__(task_ids, seed, accumulation, world_size, rank)
        self.batch_sizes = dict(batch_sizes)
        counts = np.bincount(self.task_ids, minlength=len(batch_sizes))
        wholes = [divmod(int(n), size * self.parts) for n, size in zip(counts, batch_sizes.values(), strict=True)]
        self.task_steps = [full + (rest >= self.parts) for full, rest in wholes]
        self.left_out = sum(rest for _, rest in wholes if rest < self.parts)
        self.steps_per_epoch = sum(self.task_steps)
        for name, count, steps in zip(batch_sizes, counts, self.task_steps, strict=True):
            if count and not steps:
                raise self.too_few(f"{count} training examples of {name}")

    def steps(self) -> list[np.ndarray]:
        generator, steps = np.random.default_rng([self.seed, self.epoch]), []
        for task_id, size in enumerate(self.batch_sizes.values()):
            examples = generator.permutation(np.flatnonzero(self.task_ids == task_id))
            steps += np.split(examples, range(size * self.parts, len(examples), size * self.parts))
        steps = [steps[index] for index in generator.permutation(len(steps))]
        return [step for step in steps if len(step) >= self.parts]

    def __str__(self) -> str:
        """A line that describes the steps of each task."""
        steps = zip(self.batch_sizes.items(), self.task_steps, strict=True)
        tasks = ", ".join(f"{name} {count:,} x {size}" for (name, size), count in steps)
        split = f"{self.world_size} (devices) x {self.accumulation} (accumulation steps)"
        return f"steps of one task: {tasks} examples (per device) x {split}{self._end_of_line()}"
