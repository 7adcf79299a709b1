"""Orders in which tasks are spread evenly: of the rows of an epoch, and of its steps."""

import numpy as np

from mtl_lora.training.shares import next_rows, task_rows

# From so many steps the next one is chosen; more did not keep the shares any better.
_CANDIDATES = 512
# How far a task may stray from its share over a window: the promise is two points, the choice aims a little lower.
_AIM = 0.015


def stratified_rows(
    task_ids: np.ndarray, temperature: float, seed: int, epoch: int, generator: np.random.Generator
) -> np.ndarray:
    """The rows of an epoch in a random order in which those of each task are spread evenly.

    With a temperature of 1 every row comes once, else each task as often as ``mtl_lora.training.shares`` says.
    """
    ids, of_task = np.unique(task_ids, return_inverse=True)
    taken = task_rows(np.bincount(of_task), temperature)
    rows, positions = [], []
    for number, task_id in enumerate(ids):
        own = np.flatnonzero(of_task == number)
        if temperature == 1:
            own = generator.permutation(own)
        else:
            own = next_rows(own, taken[number], seed, int(task_id), epoch)
        rows.append(own)
        positions.append((np.arange(len(own)) + generator.random()) / len(own))
    return np.concatenate(rows)[np.argsort(np.concatenate(positions), kind="stable")]


def balanced_order(steps: list[np.ndarray], task_ids: np.ndarray, weights: np.ndarray, window: int) -> list[int]:
    """An order of the steps (arrays of rows) in which every stretch of ``window`` of them holds each task's share.

    task_ids and weights: (rows,); a row counts as its weight, and steps should be of similar weight. Greedy: of the
    next few hundred steps, the one that brings the running counts closest to where the shares would have them, and that
    above all does not let the last ``window`` steps stray.
    """
    if not steps:
        return []
    tasks = int(task_ids.max()) + 1
    counts = [np.bincount(task_ids[rows], weights=weights[rows], minlength=tasks) for rows in steps]
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
