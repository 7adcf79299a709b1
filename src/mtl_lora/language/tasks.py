"""Language tasks as data: the only place that defines their names, ids, options, answer patterns and metrics.

The eight commonsense tasks are the table below; any other task set is read from a JSON file with the same fields.
"""

import dataclasses
import re
import typing

from mtl_lora import tasks
from mtl_lora.errors import UserError
from mtl_lora.language.metrics import in_any_case, whole_option
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

    also_known = ("labels",)

    def __post_init__(self):
        self.require_texts("options", "none for free text")
        super().__post_init__()
        self.require_text("pattern")
        self.require_text("answer_prefix")
        self.require_text("question")
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

    def to_json(self) -> dict:
        return {key: value for key, value in super().to_json().items() if key != "question" or value}

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
        """The first version of the answer extraction rules that extracts this task's answers as today's rules do.

        1: a pattern's first match, or a first line. 2: options as whole words; a first line after a prefix that begins
        with white space or contains a line break. 3: options that the prefix contains too, such as "correct" in "the
        correct answer is". 4: lower-case options in any case; the option "a", which may also be the article. 5: free
        text compared with more of its signs, see ``metrics.free_text_words``.
        """
        if not self.options and self.metric_name in ("exact_match", "f1"):
            return 5
        if self.is_matched_by_pattern:
            return 1
        has_case = any(option != option.upper() for option in self.options)
        if (has_case and in_any_case(self.options)) or "a" in map(str.strip, self.options):
            return 4
        if self.options:
            return 3 if whole_option(self.options, self.answer_prefix) else 2
        return 2 if self.has_white_prefix else 1

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
