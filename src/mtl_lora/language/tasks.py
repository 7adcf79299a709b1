"""Language tasks as data: the only place that defines their names, ids, options, answer patterns and metrics; and how
an answer is extracted from generated text.

The eight commonsense tasks are the table below; any other task set is read from a JSON file with the same fields.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Sequence

from mtl_lora import tasks
from mtl_lora.errors import UserError
from mtl_lora.metrics import metrics_for

ANSWER_PREFIX = "the correct answer is "
OPTIONS_MARKER = "Answer format: "


@dataclasses.dataclass(frozen=True)
class Task(tasks.Task):
    """One task: its name, the answers it allows, and how an answer is extracted from generated text.

    options: every answer the task allows, also called ``labels`` in tasks files; empty for a free-text task.
    pattern: regular expression whose first match in generated text is the answer. If empty, the first option that
        occurs as a whole word is (for the commonsense tasks the first match of the options joined by ``|``, as in
        LLM-Adapters), and for a free-text task the first line.
    answer_prefix: the words before the answer in every ``output``.
    question: the question asked about an example that has ``text`` and ``label``; empty: which label fits the text.
    metric: one of ``metrics_for(options)``; empty: accuracy with options, exact_match for free text. With two options
        the last is the positive class.
    """

    options: tuple[str, ...] = ()
    pattern: str = ""
    answer_prefix: str = ANSWER_PREFIX
    question: str = ""

    also_known, written = ("labels",), ("options", "pattern", "answer_prefix")

    def __post_init__(self):
        self.require_texts("options", "none for free text")
        super().__post_init__()
        for field in ("pattern", "answer_prefix", "question"):
            self.require_text(field)
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"task {self.name!r} has a pattern that is not a regular expression: {error}") from None

    @classmethod
    def from_json(cls, entry: object, where: str) -> typing.Self:
        if isinstance(entry, dict):
            entry = dict(entry)
            if entry.pop("regression", None) is not None:
                raise UserError(f"{where} is a regression, which language models do not support; pass --system nlu")
            if {"labels", "options"} <= entry.keys():
                raise UserError(f"{where} has both 'labels' and 'options', which mean the same; keep one of them")
            if "labels" in entry:
                entry["options"] = entry.pop("labels")
        return super().from_json(entry, where)

    @property
    def metrics(self) -> list[str]:
        return metrics_for(self.options)

    @property
    def answer_pattern(self) -> str:
        """The regular expression that finds an answer in generated text; empty for free text without a pattern."""
        # The first alternative that matches is taken, so an option comes after the longer ones that begin with it.
        begins = {option: sum(other.startswith(option) for other in self.options) for option in self.options}
        return self.pattern or "|".join(re.escape(option) for option in sorted(self.options, key=begins.get))

    @property
    def is_matched_by_pattern(self) -> bool:
        """Whether ``answer_pattern`` extracts the answer: for a task with a pattern and for the commonsense tasks."""
        original = {(task.name, task.options) for task in COMMONSENSE}
        return bool(self.pattern) or (self.name, self.options) in original

    @property
    def extraction(self) -> int:
        """The version of the extraction rules: 1 if version 0.1.0 judged this task's answers alike, else 5.

        Since then options are whole words, a prefix of free text may have white space, and free text is compared with
        more of its signs, see ``metrics.free_text_words``.
        """
        if self.options:
            return 1 if self.is_matched_by_pattern else 5
        is_new = self.metric_name in ("exact_match", "f1") or (self.has_white_prefix and not self.pattern)
        return 5 if is_new else 1

    @property
    def has_white_prefix(self) -> bool:
        """Whether the first line of a stripped text cannot begin with the answer prefix."""
        return self.answer_prefix[:1].isspace() or "\n" in self.answer_prefix

    @property
    def metric_name(self) -> str:
        return self.metric or ("accuracy" if self.options else "exact_match")

    @property
    def extraction_key(self) -> tuple:
        return self.options, self.answer_pattern, self.answer_prefix, *filter(None, [self.question])

    def instruction_of(self, text: str, text_b: str | None = None) -> str:
        """The instruction that asks the task's question about a text, or about a pair of texts."""
        listed = f"{', '.join(self.options[:-1])} or {self.options[-1]}"
        about = "this text" if text_b is None else "these two texts"
        question = self.question or f"Which label fits {about}: {listed}?"
        return "\n".join([question, "", text] if text_b is None else [question, "", text, text_b])

    def options_of(self, instruction: str) -> tuple[str, ...]:
        """The options of one question: those listed in its ``Answer format: a/b`` ending, else all of the task's.

        A few ARC questions have three or five options instead of four, so the list in the question takes precedence.
        """
        _, marker, listed = instruction.rpartition(OPTIONS_MARKER)
        options = tuple(listed.strip().split("/")) if marker else ()
        if len(options) > 1 and len(set(options)) == len(options) and set(options) <= set(self.options):
            return options
        return self.options


class TaskSet(tasks.TaskSet[Task]):
    task_class = Task


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


# The ids are those in the data of the original MTL-LoRA; patterns, given or derived from options, are LLM-Adapters'.
COMMONSENSE = TaskSet(
    tasks=(
        Task("boolq", 0, ("true", "false"), title="BoolQ"),
        Task("piqa", 1, _numbered("solution", 2), title="PIQA"),
        Task("social_i_qa", 2, _numbered("answer", 3), "answer1|answer2|answer3|answer4|answer5", title="SIQA"),
        Task("hellaswag", 3, _numbered("ending", 4), title="HellaSwag"),
        Task("winogrande", 4, _numbered("option", 2), title="WinoGrande"),
        Task("ARC-Challenge", 5, _numbered("answer", 5), title="ARC-c"),
        Task("ARC-Easy", 6, _numbered("answer", 5), title="ARC-e"),
        Task("openbookqa", 7, _numbered("answer", 4), "answer1|answer2|answer3|answer4|answer5", title="OBQA"),
    ),
    columns=("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"),
)


# ---- answer extraction ----


def extract_answer(task: Task, text: str) -> str:
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

    If all options are lower-case and have two or more letters, case is ignored, since "Yes, ..." means yes. Otherwise,
    as with May or A, an option in exactly its own case is looked for first, and only then one in any case.
    """
    in_any_case = all(len(option.strip()) > 1 and option == option.lower() for option in options)
    for pattern in _whole_options(options)[in_any_case:]:
        if match := pattern.search(text):
            (index,) = (int(name[1:]) for name, value in match.groupdict().items() if value is not None)
            return options[index]
    return ""


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


def strict_answer(task: Task, options: Sequence[str], text: str) -> str:
    """The option that makes up the whole text, or ``""`` if the text is anything else.

    The task's answer prefix before the option and a full stop after it are allowed. Unlike ``extract_answer`` this
    finds no option in ``answer12``, in a denial or in a list of all options.
    """
    given = text.strip().removeprefix(task.answer_prefix.strip()).strip()
    for option in options:
        if given in (option.strip(), f"{option.strip()}."):
            return option
    return ""
