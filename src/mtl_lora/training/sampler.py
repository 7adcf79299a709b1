"""Batches of examples of similar length in which, over any short stretch of steps, each task keeps its proportion.

A plan is a pure function of (seed, epoch): every process computes it and takes its own examples, so nothing is sharded
a second time, no example is repeated, and a resumed run sees the examples it would have seen. Two options: batches
by padded tokens, or more equal proportions of the tasks, in which case examples of small tasks do come again.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch.utils.data import Sampler

from mtl_lora.errors import UserError
from mtl_lora.training.config import TrainingConfig

# Over any WINDOW steps each task stays within two percentage points of its proportion: of the examples, or of the
# tokens with a token budget.
WINDOW = 50
# Candidates for the next step in the greedy order (more did not keep the proportions any better), which aims a little
# below the two percentage points that are promised.
_CANDIDATES, _AIM = 512, 0.015


def examples_per_task(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Examples of each task in an epoch, (T,), summing to the size of the data.

    counts: (T,), the examples n_t of each task. Task t's proportion is that of n_t^(1 / temperature), rounded by the
    largest remainder: 1 gives the data's own, a large temperature nearly equal ones (arXiv 1910.10683, section 3.5.2).
    """
    weights = np.where(counts > 0, counts, 1) ** (1 / temperature) * (counts > 0)
    exact = counts.sum() * weights / weights.sum()
    taken = np.floor(exact).astype(np.int64)
    missing = counts.sum() - taken.sum()
    taken[np.argsort(taken - exact, kind="stable")[:missing]] += 1
    return taken


def sample_cyclically(examples: np.ndarray, count: int, seed: int, task_id: int, epoch: int) -> np.ndarray:
    """The ``count`` examples of a task that an epoch takes, in order: sampling without replacement.

    A task cycles through reshuffled passes that continue across epochs, so no example comes again before every other
    example of its task has come as often.
    """
    first = epoch * count // len(examples)
    last = ((epoch + 1) * count - 1) // len(examples)
    # task_id + 1, because numpy takes (a, b) and (a, b, 0) for one seed, and (seed, epoch) is in use.
    generators = [np.random.default_rng([seed, number, task_id + 1]) for number in range(first, last + 1)]
    passes = [generator.permutation(examples) for generator in generators]
    start = epoch * count - first * len(examples)
    return np.concatenate(passes)[start : start + count]


def stratified_order(
    task_ids: np.ndarray, temperature: float, seed: int, epoch: int, generator: np.random.Generator
) -> np.ndarray:
    """The examples of an epoch in a random order in which those of each task are spread evenly.

    With a temperature of 1 every example comes once, else each task as often as ``examples_per_task`` says.
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


def balanced_order(steps: list[np.ndarray], task_ids: np.ndarray, weights: np.ndarray, window: int) -> list[int]:
    """An order of the steps (arrays of examples) in which every ``window`` of them hold each task's proportion.

    task_ids and weights: (examples,); an example counts as its weight, and steps should be of similar weight. Greedy:
    of the next few hundred steps, the one that brings the running counts closest to the tasks' proportions, and that
    above all does not let the last ``window`` steps stray.
    """
    if not steps:
        return []
    tasks = int(task_ids.max()) + 1
    counts = [np.bincount(task_ids[step], weights=weights[step], minlength=tasks) for step in steps]
    counts = np.array(counts, dtype=np.float32)
    sizes = counts.sum(axis=1, dtype=np.float64)
    size = float(sizes.mean())
    excess = counts - (sizes / size).astype(np.float32)[:, None] * counts.mean(axis=0)
    following, waiting = list(range(len(steps)))[:_CANDIDATES], list(range(_CANDIDATES, len(steps)))[::-1]
    candidates = excess[following]
    drifts, order = [np.zeros_like(excess[0])], []
    for _ in range(len(steps)):
        drift = candidates + drifts[-1]
        stray = np.abs(drift - drifts[max(0, len(drifts) - window)]).max(axis=1)
        over = np.maximum(stray - _AIM * window * size, 0)
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
) -> list[np.ndarray]:
    """Indices of the examples of each global batch of an epoch: each once, the last batch perhaps smaller.

    lengths (tokens) and task_ids: (examples,). batch_size: examples of an optimiser step over all processes.
    length_pool: batches sorted by length together; with 1, every batch holds each task's proportion. temperature:
    other than 1, the epoch is as long, but holds as many of each task as ``examples_per_task`` says.
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
    batches = [batches[index] for index in balanced_order(batches, task_ids, np.ones(len(task_ids)), WINDOW)]
    if len(rest):
        batches.append(rest[np.argsort(lengths[rest], kind="stable")])
    return batches


def plan_by_tokens(
    lengths: np.ndarray, task_ids: np.ndarray, token_budget: int, parts: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Indices of the examples of each global batch, as many as ``parts`` micro-batches of ``token_budget`` tokens hold.

    The examples of an epoch are sorted by length, those of one length at random, and cut into steps by ``step_sizes``,
    so every epoch has the same number of steps, on which the Trainer relies. Fewer than ``parts`` are left out.
    """
    generator = np.random.default_rng([seed, epoch])
    order = stratified_order(task_ids, 1.0, seed, epoch, generator)
    sizes = step_sizes(lengths[order], token_budget, parts)
    taken = order[: sum(sizes)]
    taken = taken[np.argsort(-lengths[taken], kind="stable")]
    steps = [step[::-1] for step in np.split(taken, np.cumsum(sizes)[:-1])] if sizes else []
    steps = [steps[index] for index in generator.permutation(len(steps))]
    return [steps[index] for index in balanced_order(steps, task_ids, lengths, WINDOW)]


def step_sizes(lengths: np.ndarray, token_budget: int, parts: int) -> list[int]:
    """Examples of each step where examples of these lengths are taken from the longest to the shortest.

    A step that begins with an example of length L has ``parts`` micro-batches of floor(token_budget / L) examples, and
    the last step what is left, if that is an example for each micro-batch. If others than the shortest examples are
    left out, the sizes still keep to the budget: examples then move up, to places of examples at least as long.
    """
    lengths = np.sort(lengths)[::-1]
    sizes, start = [], 0
    while len(lengths) - start >= parts:
        sizes.append(min(parts * (token_budget // int(lengths[start])), len(lengths) - start))
        start += sizes[-1]
    return sizes


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one process, ``accumulation`` of them a step.

    A step's examples are the same for any split of its micro-batches over steps of accumulation and processes, so one
    process and many take the same steps. A subclass says which they are.
    """

    def __init__(self, task_ids: np.ndarray, seed: int, accumulation: int, world_size: int, rank: int):
        self.task_ids, self.seed, self.epoch = np.asarray(task_ids), seed, 0
        self.accumulation, self.world_size, self.rank = accumulation, world_size, rank
        self.parts = accumulation * world_size  # micro-batches of a step

    steps_per_epoch: int

    def steps(self) -> list[np.ndarray]:
        """The examples of each optimiser step of the epoch, over all processes; every epoch has as many steps."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose plan the next iteration follows."""
        self.epoch = epoch

    def tasks_met(self, steps: int) -> set[int]:
        """The ids of the tasks of which the first ``steps`` steps of a training take an example."""
        met, every = set(), set(self.task_ids.tolist())
        for epoch in range(-(-steps // self.steps_per_epoch)):
            self.set_epoch(epoch)
            for step in self.steps()[: steps - epoch * self.steps_per_epoch]:
                met |= set(self.task_ids[step].tolist())
            if met == every:
                break
        self.set_epoch(0)
        return met

    def require_steps(self) -> None:
        """Raise ``UserError`` where there are too few examples for a step."""
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(self.task_ids)} training examples are too few for a step of {self.accumulation} x "
                f"{self.world_size} micro-batches (gradient_accumulation_steps x devices); lower "
                "gradient_accumulation_steps or add examples"
            )

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for examples in self.steps():
            micro_batches = np.array_split(examples, self.parts)
            for index in range(self.rank, self.parts, self.world_size):
                yield micro_batches[index].tolist()


class LengthGroupedBatchSampler(StepSampler):
    """Batches of examples of similar length from all tasks.

    Each has at most ``batch_size`` examples or, with a ``token_budget``, at most that many tokens with its padding
    (examples times the longest). A step's global batch, of ``batch_size * accumulation * world_size`` examples or of
    ``accumulation * world_size`` token budgets, is the same for any split of that product, so one process and many
    take the same steps. Its examples are sorted by length and dealt out in consecutive runs, so processes that work at
    the same time have similar work; or, to ``group_tasks``, by task first, so a micro-batch has few. Where the last,
    smaller batch cannot give every micro-batch an example, its examples are left out of that epoch.

    Raises ``UserError`` where that would leave no step at all, and for an example longer than the token budget.
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
    ):
        super().__init__(task_ids, seed, accumulation, world_size, rank)
        self.lengths, self.batch_size, self.group_tasks = np.asarray(lengths), batch_size, group_tasks
        self.length_pool, self.token_budget, self.temperature = length_pool, token_budget, temperature
        self.global_batch_size = batch_size * self.parts  # examples of a step, without a token budget
        if token_budget and self.lengths.max(initial=0) > token_budget:
            raise UserError(
                f"token_budget must be at least the longest example's {self.lengths.max()} tokens, not {token_budget}; "
                "raise it, or lower cutoff_len"
            )
        if token_budget:
            self.steps_per_epoch = len(step_sizes(self.lengths, token_budget, self.parts))
        else:
            full, rest = divmod(len(self.lengths), self.global_batch_size)
            self.steps_per_epoch = full + (rest >= self.parts)
        self.require_steps()

    def steps(self) -> list[np.ndarray]:
        data = self.lengths, self.task_ids
        if self.token_budget:
            steps = plan_by_tokens(*data, self.token_budget, self.parts, self.seed, self.epoch)
        else:
            steps = plan_epoch(*data, self.global_batch_size, self.seed, self.epoch, self.length_pool, self.temperature)
        if self.group_tasks:
            steps = [step[np.argsort(self.task_ids[step], kind="stable")] for step in steps]
        return steps[: self.steps_per_epoch]

    def __str__(self) -> str:
        """One line on the global batch."""
        one = f"{self.token_budget:,} tokens with padding" if self.token_budget else f"{self.batch_size} examples"
        size = f"about {len(self.lengths) / self.steps_per_epoch:.0f}" if self.token_budget else self.global_batch_size
        split = f"{self.world_size} (devices) x {self.accumulation} (accumulation steps)"
        steps = f"{self.steps_per_epoch:,} steps an epoch"
        return f"global batch: {one} (per device) x {split}, {size} examples; {steps}"


class RoundRobinSampler(StepSampler):
    """Steps of one task each, tasks in proportion to their number of steps, as VL-Adapter samples (arXiv 2112.06825).

    batch_sizes: the examples of a micro-batch by task, in id order. Every example comes once an epoch, but for those of
    a task's last, smaller step where it cannot give every micro-batch one. Raises ``UserError`` where a task that has
    examples is left without a step.
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
        self.steps_per_epoch = sum(self.task_steps) if all(self.task_steps[task] for task in counts.nonzero()[0]) else 0
        self.require_steps()

    def steps(self) -> list[np.ndarray]:
        generator, steps = np.random.default_rng([self.seed, self.epoch]), []
        for task_id, size in enumerate(self.batch_sizes.values()):
            examples = generator.permutation(np.flatnonzero(self.task_ids == task_id))
            steps += np.split(examples, range(size * self.parts, len(examples), size * self.parts))
        steps = [steps[index] for index in generator.permutation(len(steps))]
        return [step for step in steps if len(step) >= self.parts]

    def __str__(self) -> str:
        """One line on the steps of each task."""
        steps = zip(self.batch_sizes.items(), self.task_steps, strict=True)
        tasks = ", ".join(f"{name} {count:,} x {size}" for (name, size), count in steps)
        split = f"{self.world_size} (devices) x {self.accumulation} (accumulation steps)"
        steps = f"{self.steps_per_epoch:,} steps an epoch"
        return f"steps of one task: {tasks} examples (per device) x {split}; {steps}"
