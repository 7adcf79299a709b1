"""Rows for tests of the sampler: lengths and task ids alone, in the proportions of real data."""

import numpy as np

# Shares of the eight tasks in percent and their mean lengths in tokens, as in the commonsense training data.
SHARES = (7, 12, 25, 2.5, 47, 0.8, 1.7, 3.7)
LENGTHS = (66, 119, 105, 110, 92, 125, 115, 100)


def made_rows(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, task ids) of rows shaped like the commonsense data."""
    generator = np.random.default_rng(seed)
    task_ids = generator.choice(len(SHARES), size=rows, p=np.array(SHARES) / sum(SHARES))
    lengths = generator.normal(np.array(LENGTHS)[task_ids], 25)
    return np.clip(lengths, 35, 256).astype(np.int64), task_ids
