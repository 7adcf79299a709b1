"""From generated text to an answer, and from answers to metrics: pure functions, tested without a model.

A metric is a function of predictions and targets in a table by name; a task names the one that decides its result.
"""

import collections
import functools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mtl_lora.estimates import proportion_error
from mtl_lora.results import TaskResult

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
        found = re.search(re.escape(prefix), text, re.IGNORECASE) if prefix else None
        parts = [text[found.end() :], text] if found else [text]
        return next(filter(None, (_whole_option(task.options, part) for part in parts)), "")
    if task.answer_pattern:
        match = re.search(task.answer_pattern, text)
        return match.group(0) if match else ""
    lines = text.splitlines()
    return lines[0].removeprefix(task.answer_prefix).strip() if lines else ""


def _whole_option(options: tuple[str, ...], text: str) -> str:
    """The option that stands first in a text as it is written, or, if none does, in other case; ``""`` for none."""
    for pattern in _whole_options(options):
        if match := pattern.search(text):
            (index,) = (int(name[1:]) for name, value in match.groupdict().items() if value is not None)
            return options[index]
    return ""


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
        exact.append(before + written + after + (r"(?! (?!is\b)[a-z])" if option in ("A", "I") else ""))
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


# ---- free text ----

_KEPT = re.compile(
    r"(?<!\w)[-.]+(?=\d)"  # the sign or point before a number: -5, .5
    r"|(?<=\d)[.,:/^*-](?=\d)"  # the signs inside one: 1.5, 1/2, 12:30
    r"|(?<=\b[^\W\d_])[+#-]+(?!\w)"  # those behind a single letter: C++, F#, A-
    rf"|[^{re.escape(string.punctuation)}]"
)


def free_text_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD (1606.05250) compares answers, with three exceptions.

    Signs that belong to a number or to a single letter count (-1.5 is not 15, C++ is not C); ``a``, ``an`` and ``the``
    count at the end, where they are no article (vitamin A); and text of punctuation alone is compared as it is.
    """
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower().replace("\N{MINUS SIGN}", "-"))
    words = "".join(_KEPT.findall(plain)).split()
    kept = [word for word in words[:-1] if word not in ("a", "an", "the")] + words[-1:]
    return kept or plain.split()


def same_text(text: str, target: str) -> bool:
    """Whether two free texts have the same words, see ``free_text_words``; an empty text equals nothing."""
    words = free_text_words(text)
    return bool(words) and words == free_text_words(target)


def text_f1(text: str, target: str) -> float:
    """2 P R / (P + R) of the words that two free texts share, each counted as often as it occurs in both (SQuAD)."""
    given, wanted = free_text_words(text), free_text_words(target)
    if not given or not wanted:
        return 0.0
    return 2 * sum((collections.Counter(given) & collections.Counter(wanted)).values()) / (len(given) + len(wanted))


# ---- metrics: (predictions, targets), non-empty and of equal length -> (value, standard error) ----

Metric = Callable[[Sequence[str], Sequence[str]], tuple[float, float]]


def proportion(outcomes: Sequence[bool]) -> tuple[float, float]:
    """(p, ``proportion_error``) of n outcomes."""
    share = sum(outcomes) / len(outcomes)
    return share, proportion_error(share, len(outcomes))


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of n values from 0 to 1; for zeros and ones that is ``proportion``."""

    def error(values: Sequence[float]) -> float:
        center = sum(values) / len(values)
        return math.sqrt(sum((value - center) ** 2 for value in values)) / len(values)

    return sum(values) / len(values), max(error(values), error([*values, 0, 0, 1, 1]))


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> tuple[float, float]:
    """The proportion of predictions that are their target."""
    return proportion([given == target for given, target in zip(predictions, targets, strict=True)])


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> tuple[float, float]:
    """The proportion of free texts with the words of their target, see ``same_text``."""
    return proportion([same_text(given, target) for given, target in zip(predictions, targets, strict=True)])


def f1(predictions: Sequence[str], targets: Sequence[str]) -> tuple[float, float]:
    """The mean token F1 of free texts and their targets, see ``text_f1``."""
    return mean([text_f1(given, target) for given, target in zip(predictions, targets, strict=True)])


METRICS: dict[str, Metric] = {"accuracy": accuracy, "exact_match": exact_match, "f1": f1}


# ---- results ----


def task_result(task: "Task", lines: Sequence[dict]) -> TaskResult:
    """One task's result from its prediction lines (see ``questions.Question.line``), at least one.

    majority: the metric of always giving the majority class of these questions. correct: the number of right answers.
    unparsed: the proportion of texts without an answer. predicted: how often each answer was given. strict (generated
    options): the metric and ``unparsed`` if the whole text must be the answer. acc_norm (scores): of the
    length-normalised choice. f1 (free text): mean token F1. groups: the metric by ``kind``, where questions have one.
    """
    targets = [line["answer"] for line in lines]
    ((majority_class, _),) = collections.Counter(targets).most_common(1)
    majority, _ = METRICS[task.metric_name]([majority_class] * len(lines), targets)
    others = {}
    for name, key in (("strict", "strict"), ("acc_norm", "normalised")):
        if all(key in line for line in lines):
            others[name] = _measure(task.metric_name, lines, key, unparsed=_proportion_empty(lines, key))
    kinds = sorted({line["kind"] for line in lines if line.get("kind")})
    groups = {kind: [line for line in lines if line.get("kind") == kind] for kind in kinds}
    return _measure(
        task.metric_name,
        lines,
        majority=majority,
        others=others,
        groups={kind: _measure(task.metric_name, part) for kind, part in groups.items()},
        unparsed=_proportion_empty(lines, "parsed"),
        predicted=dict(sorted(collections.Counter(line["parsed"] for line in lines).items())),
        **({"f1": mean([line["f1"] for line in lines])[0]} if all("f1" in line for line in lines) else {}),
    )


def _measure(
    metric: str, lines: Sequence[dict], key: str = "parsed", majority=None, others=(), groups=(), **measured
) -> TaskResult:
    """A metric of one kind of answer in prediction lines."""
    value, stderr = METRICS[metric]([line[key] for line in lines], [line["answer"] for line in lines])
    if key == "parsed":
        measured = {"correct": sum(line["correct"] for line in lines), **measured}
    return TaskResult(metric, value, stderr, len(lines), majority, dict(groups), dict(others), measured)


def _proportion_empty(lines: Sequence[dict], key: str) -> float:
    return sum(line[key] == "" for line in lines) / len(lines)
