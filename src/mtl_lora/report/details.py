"""What stands behind one run's accuracies: how its answers were read, and which answers it gives."""

from collections.abc import Callable, Sequence

from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.report.render import MARKDOWN, NOTHING, markdown_table, percent
from mtl_lora.report.results import Results

_SHOWN_ANSWERS = 6


def details(results: Results) -> str:
    """One run as a markdown table, a line a task: accuracy, baseline, other readings, distribution of answers.

    Raises ``UserError`` if the results file's figures are not what an evaluation writes.
    """
    tasks = read_json(results.path, "the results file")["tasks"]
    names = [name for name in results.task_set.columns if name in tasks]
    columns: dict[str, Callable[[dict], str]] = {
        "Accuracy": lambda task: f"{percent(task['accuracy'])} ± {percent(task['stderr'])}",
        "Most frequent": lambda task: percent(task["majority"]),
        "Unparsed": lambda task: percent(task["unparsed"]),
    }
    if any("strict" in tasks[name] for name in names):
        columns["Strict"] = _other("strict", lambda other: percent(other["accuracy"]))
        columns["Strict - papers'"] = lambda task: _change(task, "strict")
        columns["Strict unparsed"] = _other("strict", lambda other: percent(other["unparsed"]))
    if any("normalised" in tasks[name] for name in names):
        columns["Per token"] = _other("normalised", lambda other: percent(other["accuracy"]))
        columns["Per token - sum"] = lambda task: _change(task, "normalised")
    if any("f1" in tasks[name] for name in names):
        columns["F1"] = lambda task: percent(task["f1"]) if "f1" in task else NOTHING
    columns["Answers given"] = lambda task: MARKDOWN.text(_distribution(task["predicted"]))
    try:
        lines = [
            [MARKDOWN.text(results.task_set[name].title), *(show(tasks[name]) for show in columns.values())]
            for name in names
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{results.path} lacks figures of an evaluation ({error}); evaluate again") from None
    title = MARKDOWN.text(f"{results.name} ({results.mode})")
    return f"{title}\n\n{markdown_table(['Task', *columns], lines)}\n"


def _other(reading: str, show: Callable[[dict], str]) -> Callable[[dict], str]:
    return lambda task: show(task[reading]) if reading in task else NOTHING


def _change(task: dict, reading: str) -> str:
    return percent(task[reading]["accuracy"] - task["accuracy"], signed=True) if reading in task else NOTHING


def _distribution(predicted: dict[str, int]) -> str:
    """``true 31, false 9``: the most frequent first; no answer is a dash."""
    ordered: Sequence = sorted(predicted.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{answer or NOTHING} {count}" for answer, count in ordered[:_SHOWN_ANSWERS]]
    return ", ".join(shown) + (", ..." if len(ordered) > _SHOWN_ANSWERS else "")
