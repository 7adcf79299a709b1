"""One experiment against another on the same questions, over all seeds that both have."""

import dataclasses
import math
from collections.abc import Sequence

from mtl_lora.report.comparable import check_comparable, check_same_questions
from mtl_lora.report.paired import bootstrap_means, percentile_interval
from mtl_lora.report.predictions import read_predictions
from mtl_lora.report.results import Results

RESAMPLES, SEED = 10_000, 0


def seed_pairs(a: dict[int | None, Results], b: dict[int | None, Results]) -> list[tuple[Results, Results]]:
    """Seed i of A with seed i of B; a run without a seed (the base model alone) goes with every run of the other."""
    if None in a or None in b:
        return [(one, other) for one in a.values() for other in b.values()]
    return [(a[seed], b[seed]) for seed in a if seed in b]


def question_differences(pairs: Sequence[tuple[Results, Results]]) -> dict[str, list[float]]:
    """By task, for each question: correct in B minus correct in A, averaged over the pairs of runs.

    Only tasks that all runs have. Raises ``UserError`` where two runs did not answer the same questions.
    """
    shared = [name for name in pairs[0][0].tasks if all(name in run.tasks for pair in pairs for run in pair)]
    sums: dict[str, dict[int, list[int]]] = {name: {} for name in shared}
    for pair in pairs:
        a, b = (dataclasses.replace(run, tasks={name: run.tasks[name] for name in shared}) for run in pair)
        check_comparable(a, b)
        answers_a, answers_b = read_predictions(a), read_predictions(b)
        for name in shared:
            check_same_questions(a, b, name, answers_a[name], answers_b[name])
            for index, answer in answers_a[name].items():
                difference = answers_b[name][index].correct - answer.correct
                sums[name].setdefault(index, []).append(difference)
    return {
        name: [math.fsum(values) / len(values) for _, values in sorted(questions.items())]
        for name, questions in sums.items()
    }


def paired_intervals(differences: dict[str, list[float]], every: Sequence[str]) -> dict:
    """``tasks`` and ``average`` with ``difference``, ``low`` and ``high`` (fractions).

    95 % percentile intervals of a bootstrap over the questions within each task (see ``mtl_lora.report.paired``);
    the average, over the tasks ``every``, is None if one of them is not there.
    """
    tasks, means = {}, {}
    for name, values in differences.items():
        # The stream that report compare draws from, so that one pair of runs has one interval.
        means[name] = bootstrap_means(values, [SEED, *name.encode()], RESAMPLES)
        tasks[name] = _interval(math.fsum(values) / len(values), means[name])
    average = None
    if tasks and all(name in tasks for name in every):
        center = math.fsum(tasks[name]["difference"] for name in every) / len(every)
        average = _interval(center, sum(means[name] for name in every) / len(every))
    return {"tasks": tasks, "average": average}


def _interval(difference: float, means) -> dict[str, float]:
    low, high = percentile_interval(means)
    return {"difference": difference, "low": low, "high": high}


def against(a: dict[int | None, Results], b: dict[int | None, Results], every: Sequence[str]) -> dict | None:
    """B minus A over their common seeds, see ``paired_intervals``; None without a common seed or task."""
    pairs = seed_pairs(a, b)
    differences = question_differences(pairs) if pairs else {}
    return paired_intervals(differences, every) if differences else None
