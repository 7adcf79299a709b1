"""From generated text to an answer and from answers to figures: pure functions, tested without a model."""

import collections
import math
import re
from collections.abc import Iterable, Sequence

from mtl_lora.tasks import Task


def extract_answer(task: Task, text: str) -> str:
    """The answer in generated text, or ``""``: the first match of the task's pattern, as LLM-Adapters extracts.

    A free-text task without a pattern takes the first line, without the answer prefix.
    """
    text = text.strip()
    if task.answer_pattern:
        match = re.search(task.answer_pattern, text)
        return match.group(0) if match else ""
    lines = text.splitlines()
    return lines[0].removeprefix(task.answer_prefix).strip() if lines else ""


def standard_error(correct: int, total: int) -> float:
    """Standard error of an accuracy, sqrt(p (1 - p) / n)."""
    share = correct / total
    return math.sqrt(share * (1 - share) / total)


def accuracy(outcomes: Sequence[bool]) -> dict:
    """``accuracy`` (a fraction), ``stderr``, ``n`` and ``correct`` of a non-empty list of outcomes."""
    correct, total = sum(outcomes), len(outcomes)
    return {"accuracy": correct / total, "stderr": standard_error(correct, total), "n": total, "correct": correct}


def summarise_task(records: Sequence[dict]) -> dict:
    """One task's figures from its prediction records (see ``mtl_lora.evaluate.run``).

    majority: the accuracy of always giving the answer that is most frequent in these questions. unparsed: the
    share of texts without an answer. predicted: how often each answer was given. groups: the same accuracy by
    ``kind``, where records have one.
    """
    right = collections.Counter(record["answer"] for record in records)
    summary = accuracy([record["correct"] for record in records])
    summary["unparsed"] = sum(record["parsed"] == "" for record in records) / len(records)
    summary["majority"] = right.most_common(1)[0][1] / len(records)
    summary["predicted"] = dict(sorted(collections.Counter(record["parsed"] for record in records).items()))
    kinds = sorted({record["kind"] for record in records if record.get("kind")})
    if kinds:
        summary["groups"] = {
            kind: accuracy([record["correct"] for record in records if record.get("kind") == kind]) for kind in kinds
        }
    return summary


def average(summaries: Iterable[dict]) -> dict:
    """The plain mean over tasks, its standard error from the tasks' own, and the same for each group in all tasks."""
    summaries = list(summaries)
    result = _mean(summaries)
    groups = set.intersection(*(set(summary.get("groups", {})) for summary in summaries))
    if groups:
        result["groups"] = {kind: _mean([summary["groups"][kind] for summary in summaries]) for kind in sorted(groups)}
    return result


def _mean(summaries: Sequence[dict]) -> dict:
    count = len(summaries)
    return {
        "accuracy": sum(summary["accuracy"] for summary in summaries) / count,
        "stderr": math.sqrt(sum(summary["stderr"] ** 2 for summary in summaries)) / count,
        "tasks": count,
    }
