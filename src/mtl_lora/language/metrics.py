"""Answer extraction from generated text, and task results from answers: pure functions, tested without a model."""

import dataclasses
import functools
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.results import TaskResult, measure

if TYPE_CHECKING:
    from mtl_lora.language.tasks import Task

# ---- answer extraction ----


def extract_answer(task: "Task", text: str) -> str:
    """The answer in generated text, or ``""`` if there is none.

    - A task with a pattern, or one of the eight commonsense tasks: the pattern's first match, as in LLM-Adapters.
    - Any other task with options: the first option that occurs as a whole word or number, preferably after the answer
      prefix.
    - Free text without a pattern: the first line, without the answer prefix.
    """
    text = text.strip()
    if task.options and not task.is_matched_by_pattern:
        prefix = task.answer_prefix.strip()
        if whole_option(task.options, prefix):  # an option inside the prefix is not an answer
            before, *behind = re.split(re.escape(prefix), text, flags=re.IGNORECASE)
            parts = [*behind, before]
        else:
            found = re.search(re.escape(prefix), text, re.IGNORECASE) if prefix else None
            parts = [text[found.end() :], text] if found else [text]
        return next(filter(None, (whole_option(task.options, part) for part in parts)), "")
    if task.answer_pattern:
        match = re.search(task.answer_pattern, text)
        return match.group(0) if match else ""
    if task.has_white_prefix:
        text = text.removeprefix(task.answer_prefix.lstrip()).lstrip()
    lines = text.splitlines()
    return lines[0].removeprefix(task.answer_prefix).strip() if lines else ""


def whole_option(options: tuple[str, ...], text: str) -> str:
    """The option that occurs first in a text; ``""`` for none.

    If all options are lower-case words, case is ignored, because "Yes, ..." means yes. Otherwise, as with May or A, an
    option in exactly its own case is looked for first, and only then one in any case.
    """
    for pattern in _whole_options(options)[in_any_case(options) :]:
        if match := pattern.search(text):
            (index,) = (int(name[1:]) for name, value in match.groupdict().items() if value is not None)
            return options[index]
    return ""


def in_any_case(options: tuple[str, ...]) -> bool:
    """Whether these options are matched in any case: all are lower-case, and none is a single character."""
    return all(len(option.strip()) > 1 and option == option.lower() for option in options)


# A word character that, next to an option, makes it part of a longer word; scripts without spaces are excluded.
_LETTER = r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"


@functools.cache
def _whole_options(options: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    """Two patterns that match options as whole words or numbers: in exactly their case, and in any case.

    The group ``o<index>`` names the option. A single letter used as a word ("A dog", "I think", "it is a cat") is not
    matched.
    """
    exact, any_case = [], []
    for index in sorted(range(len(options)), key=lambda index: -len(options[index].strip())):  # the longest first
        option = options[index].strip()
        letter = len(option) == 1 and option.isalpha()
        before, after = rf"(?<!{_LETTER})", rf"(?!{_LETTER})"
        if option[0].isalnum():
            before += r"(?<!\w[-'’])" + (r"(?<!\d[.,:/])(?<![-.\N{MINUS SIGN}])" if option[0].isdigit() else "")
        if option[-1].isalnum():
            after += r"(?![-'’]\w|[+#])" + (r"(?![.,:/]\d)" if option[-1].isdigit() else "")
        written = rf"(?P<o{index}>{re.escape(option)})"
        exact.append(before + written + after + (r"(?! (?!is\b)[a-z])" if option in ("A", "I", "a") else ""))
        any_case.append(before + written + after + (r"(?=\s*(?:[).:]|$))" if letter else ""))
    return re.compile("|".join(exact)), re.compile("|".join(any_case), re.IGNORECASE)


def strict_answer(task: "Task", options: Sequence[str], text: str) -> str:
    """The option that makes up the whole text, or ``""`` if the text is anything else.

    The task's answer prefix before the option and a full stop after it are allowed. Unlike ``extract_answer`` this
    finds no option in ``answer12``, in a denial or in a list of all options.
    """
    given = text.strip().removeprefix(task.answer_prefix.strip()).strip()
    for option in options:
        if given in (option.strip(), f"{option.strip()}."):
            return option
    return ""


# ---- results ----


def task_result(task: "Task", lines: Sequence[dict]) -> TaskResult:
    """One task's result from its prediction lines (see ``questions.Question.line``), at least one.

    It holds the result of ``results.measure`` and these measures:

    - unparsed: the proportion of texts from which no answer was extracted.
    - strict (generated options): the metric and ``unparsed`` if the whole text must be the answer.
    - acc_norm (scored options): the metric of the length-normalised choice.
    - f1 (free text): the mean token F1.
    """
    others = {
        name: measure(task.metric_name, lines, task.options, key, unparsed=_proportion_empty(lines, key))
        for name, key in (("strict", "strict"), ("acc_norm", "normalised"))
        if all(key in line for line in lines)
    }
    result = measure(
        task.metric_name,
        lines,
        task.options,
        unparsed=_proportion_empty(lines, "parsed"),
        **({"f1": statistics.fmean(line["f1"] for line in lines)} if all("f1" in line for line in lines) else {}),
    )
    return dataclasses.replace(result, others=result.others | others)


def _proportion_empty(lines: Sequence[dict], key: str) -> float:
    return sum(line[key] == "" for line in lines) / len(lines)
