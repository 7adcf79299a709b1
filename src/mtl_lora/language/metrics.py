"""From generated text to an answer and from answers to figures: pure functions, tested without a model."""

import collections
import math
import re
import string
from collections.abc import Iterable, Sequence

from mtl_lora.language.tasks import Task


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


def strict_answer(task: Task, options: Sequence[str], text: str) -> str:
    """The answer where the text is nothing but one of the record's options, else ``""``.

    The task's answer prefix before the option and a full stop behind it are allowed. Unlike ``extract_answer`` this
    reads no option into ``answer12``, a denial or a list of all of them.
    """
    said = text.strip().removeprefix(task.answer_prefix.strip()).strip()
    for option in options:
        if said in (option, f"{option}."):
            return option
    return ""


def free_text_words(text: str) -> list[str]:
    """Lower-case words without punctuation and the articles a, an, the, as SQuAD (1606.05250) compares answers."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def exact_match(text: str, right: str) -> bool:
    """Whether two free texts have the same words, see ``free_text_words``."""
    return free_text_words(text) == free_text_words(right)


def token_f1(text: str, right: str) -> float:
    """2 P R / (P + R) of the words two free texts share, each counted as often as it stands in both (SQuAD)."""
    given, wanted = free_text_words(text), free_text_words(right)
    if not given or not wanted:
        return float(given == wanted)
    return 2 * sum((collections.Counter(given) & collections.Counter(wanted)).values()) / (len(given) + len(wanted))


def standard_error(correct: int, total: int) -> float:
    """Standard error of an accuracy, sqrt(p (1 - p) / n)."""
    share = correct / total
    return math.sqrt(share * (1 - share) / total)


def accuracy(outcomes: Sequence[bool]) -> dict:
    """``accuracy`` (a fraction), ``stderr``, ``n`` and ``correct`` of a non-empty list of outcomes."""
    correct, total = sum(outcomes), len(outcomes)
    return {"accuracy": correct / total, "stderr": standard_error(correct, total), "n": total, "correct": correct}


def summarise_task(records: Sequence[dict]) -> dict:
    """One task's figures from its prediction records (see ``mtl_lora.language.evaluator``).

    majority: the accuracy of always giving the answer that is most frequent in these questions. unparsed: the
    share of texts without an answer. predicted: how often each answer was given. strict (generated options):
    accuracy and unparsed share if the whole text must be the answer. normalised (scores): accuracy of the choice by
    score per token. f1 (free text): mean token F1. groups: accuracy by ``kind``, where records have one.
    """
    right = collections.Counter(record["answer"] for record in records)
    summary = accuracy([record["correct"] for record in records])
    summary["unparsed"] = sum(record["parsed"] == "" for record in records) / len(records)
    summary["majority"] = right.most_common(1)[0][1] / len(records)
    summary["predicted"] = dict(sorted(collections.Counter(record["parsed"] for record in records).items()))
    for other in ("strict", "normalised"):
        if all(other in record for record in records):
            summary[other] = accuracy([record[other] == record["answer"] for record in records])
            summary[other]["unparsed"] = sum(record[other] == "" for record in records) / len(records)
    if all("f1" in record for record in records):
        summary["f1"] = sum(record["f1"] for record in records) / len(records)
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
