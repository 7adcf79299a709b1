"""From generated text to an answer, and from answers to a task's result: pure functions, tested without a model."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_lora.metrics import mean
from mtl_lora.results import TaskResult, measure

if TYPE_CHECKING:
    from mtl_lora.language.tasks import Task

# ---- answer extraction ----


def extract_answer(task: "Task", text: str) -> str:
    """The answer in generated text, or ``""``.

    For a task with a pattern, and for the eight commonsense tasks, the pattern's first match, as LLM-Adapters extracts.
    For options of one's own, the first that stands in the text as a whole word or number; behind the answer prefix,
    where the text has one in front of an option. A free-text task without a pattern takes the first line, without the
    answer prefix.
    """
    text = text.strip()
    if task.options and not task.is_matched_by_pattern:
        prefix = task.answer_prefix.strip()
        if whole_option(task.options, prefix):  # which is no answer itself
            before, *behind = re.split(re.escape(prefix), text, flags=re.IGNORECASE)
            parts = [*behind, before]
        else:
            found = re.search(re.escape(prefix), text, re.IGNORECASE) if prefix else None
            parts = [text[found.end() :], text] if found else [text]
        return next(filter(None, (whole_option(task.options, part) for part in parts)), "")
    if task.answer_pattern:
        match = re.search(task.answer_pattern, text)
        return match.group(0) if match else ""
    if task.extraction == 2:  # a prefix that no first line begins with
        text = text.removeprefix(task.answer_prefix.lstrip()).lstrip()
    lines = text.splitlines()
    return lines[0].removeprefix(task.answer_prefix).strip() if lines else ""


def whole_option(options: tuple[str, ...], text: str) -> str:
    """The option that stands first in a text; ``""`` for none.

    Options of lower-case words stand there in any case, for "Yes, ..." is a yes; of others, such as May or A, first
    those that are written as they are.
    """
    for pattern in _whole_options(options)[in_any_case(options) :]:
        if match := pattern.search(text):
            (index,) = (int(name[1:]) for name, value in match.groupdict().items() if value is not None)
            return options[index]
    return ""


def in_any_case(options: tuple[str, ...]) -> bool:
    """Whether the case of these options says nothing: all are in lower case, and none is a single character."""
    return all(len(option.strip()) > 1 and option == option.lower() for option in options)


# A character that makes a longer word of an option beside it: none of a script that puts no spaces between words.
_LETTER = r"[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"


@functools.cache
def _whole_options(options: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    """Patterns of options as whole words or numbers, in their own case and in any; an option is a group by its index.

    A single letter may be a word of its own ("A dog", "I think", "it is a cat"): such a word is no option.
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
    """The answer where the text is nothing but one of the question's options, else ``""``.

    The task's answer prefix before the option and a full stop behind it are allowed. Unlike ``extract_answer`` this
    finds no option in ``answer12``, in a denial or in a list of all of them.
    """
    given = text.strip().removeprefix(task.answer_prefix.strip()).strip()
    for option in options:
        if given in (option.strip(), f"{option.strip()}."):
            return option
    return ""


# ---- results ----


def task_result(task: "Task", lines: Sequence[dict]) -> TaskResult:
    """One task's result from its prediction lines (see ``questions.Question.line``), at least one.

    What ``results.measure`` gives, and: unparsed: the proportion of texts without an answer. strict (generated
    options): the metric and ``unparsed`` if the whole text must be the answer. acc_norm (scores): of the
    length-normalised choice. f1 (free text): mean token F1.
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
        **({"f1": mean([line["f1"] for line in lines])[0]} if all("f1" in line for line in lines) else {}),
    )
    return dataclasses.replace(result, others=result.others | others)


def _proportion_empty(lines: Sequence[dict], key: str) -> float:
    return sum(line[key] == "" for line in lines) / len(lines)
