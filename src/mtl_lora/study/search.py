"""Which value of the searched flag an experiment gets: the best average on the development set."""

from collections.abc import Sequence

from mtl_lora.report.results import mean_score, read_results
from mtl_lora.study.planner import Planner, Run


def outcome(planner: Planner, name: str, candidates: Sequence[Run]) -> dict:
    """Every candidate with its dev score (a fraction, the plain mean over tasks), and the value that is chosen."""
    found = []
    for run in candidates:
        scores = {}
        for job in run.jobs:
            scores |= read_results(job.folder).tasks
        found.append(
            {
                "value": run.value,
                "dev": mean_score(list(scores.values())).accuracy,
                "tasks": {task: score.accuracy for task, score in scores.items()},
                "commands": [command for job in run.jobs for command in job.commands],
            }
        )
    return {"name": name, "candidates": found, "chosen": choose({entry["value"]: entry["dev"] for entry in found})}


def choose(scores: dict[float, float]) -> float:
    """The value with the highest score; of equal ones the smallest."""
    return min(scores, key=lambda value: (-scores[value], value))
