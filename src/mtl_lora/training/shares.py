"""How many rows of each task an epoch has, and which: task-balanced sampling by a temperature."""

import numpy as np


def task_rows(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Rows of each task in an epoch, (T,), of which there are as many as the data has.

    counts: (T,), the rows n_t of each task. Task t's share is proportional to n_t^(1 / temperature), rounded by the
    largest remainder: 1 gives the data's own shares, a large temperature nearly equal ones (arXiv 1910.10683,
    section 3.5.2).
    """
    weights = np.where(counts > 0, counts, 1) ** (1 / temperature) * (counts > 0)
    exact = counts.sum() * weights / weights.sum()
    rows = np.floor(exact).astype(np.int64)
    missing = counts.sum() - rows.sum()
    rows[np.argsort(rows - exact, kind="stable")[:missing]] += 1
    return rows


def next_rows(rows: np.ndarray, count: int, seed: int, task_id: int, epoch: int) -> np.ndarray:
    """The ``count`` rows of a task that an epoch takes, in order.

    Every epoch goes on where the one before stopped, in an endless row of passes, each in an order of its own: a
    small task comes in whole passes, of a large one an epoch takes a part, and no row comes again before every other
    row of its task has come as often.
    """
    first = epoch * count // len(rows)
    last = ((epoch + 1) * count - 1) // len(rows)
    # The task's number is not 0 here: numpy takes (a, b) and (a, b, 0) for one seed, and (seed, epoch) is in use.
    passes = [np.random.default_rng([seed, number, task_id + 1]).permutation(rows) for number in range(first, last + 1)]
    start = epoch * count - first * len(rows)
    return np.concatenate(passes)[start : start + count]
