"""Declarations of image-text tasks: the prompt for a picture, and the kind of answer."""

import dataclasses
from pathlib import Path

from mtl_lora import tasks
from mtl_lora.errors import UserError
from mtl_lora.metrics import metrics_for, metrics_needing

# Kinds of answers: any text; one of the task's labels; a description, for which the example has no question.
OPEN, CHOICE, CAPTION = "open", "choice", "caption"
ANSWERS = (OPEN, CHOICE, CAPTION)
# The loss weights: every example has the same weight, whatever its length; or every token has the same weight.
BY_EXAMPLE, BY_TOKEN = "example", "token"
GENERATED = 20  # maximum tokens of a generated answer, unless the task sets max_answer
_TEXT = "{text}"


@dataclasses.dataclass(frozen=True)
class Task(tasks.Task):
    """One task on pictures.

    prompt: the model's prompt, in which ``{text}`` stands for the example's text; the prompt of a caption has no
    ``{text}``. answer: ``open``, ``choice`` (one of two or more ``labels``) or ``caption``. loss: ``example``, or
    ``token`` (the default for captions). max_text, max_answer: maximum tokens of a prompt and of an answer, including
    the tokenizer's special tokens; 0: the cutoff alone. metric: empty: accuracy for choices, exact_match for open
    answers, CIDEr for captions.
    """

    prompt: str = _TEXT
    answer: str = OPEN
    labels: tuple[str, ...] = ()
    loss: str = ""
    max_text: int = 0
    max_answer: int = 0

    written = ("prompt", "answer", "labels", "loss", "max_text", "max_answer")

    def __post_init__(self):
        for field, allowed in (("answer", ANSWERS), ("loss", ("", BY_EXAMPLE, BY_TOKEN))):
            if getattr(self, field) not in allowed:
                found = f"task {self.name!r} has {field} {getattr(self, field)!r}"
                raise UserError(f"{found}; it must be one of {', '.join(filter(None, allowed))}")
        self.require_texts("labels", "none unless the answer is a choice")
        if bool(self.labels) != (self.answer == CHOICE):
            raise UserError(f'task {self.name!r} needs "labels": [...] if its "answer" is "{CHOICE}", and only then')
        self.require_text("prompt")
        expected = 0 if self.answer == CAPTION else 1
        if self.prompt.count(_TEXT) != expected or not self.prompt.strip():
            rule = f"must contain {_TEXT} once" if expected else f"cannot contain {_TEXT} or be empty for a caption"
            raise UserError(f"task {self.name!r} has the prompt {self.prompt!r}; it {rule}")
        for field in ("max_text", "max_answer"):
            value = getattr(self, field)
            if type(value) is not int or (value and value < 4):
                raise UserError(f"task {self.name!r} has {field} {value!r}; it must be 0 or at least 4 tokens")
        if not self.loss:
            object.__setattr__(self, "loss", BY_TOKEN if self.answer == CAPTION else BY_EXAMPLE)
        super().__post_init__()

    @property
    def metrics(self) -> list[str]:
        if self.answer == CAPTION:
            return metrics_needing("references")
        return metrics_for(self.labels) + (metrics_needing("answers") if self.answer == OPEN else [])

    @property
    def metric_name(self) -> str:
        return self.metric or {OPEN: "exact_match", CHOICE: "accuracy", CAPTION: "cider"}[self.answer]

    @property
    def generated_tokens(self) -> int:
        """Maximum tokens of a generated answer."""
        return self.max_answer or GENERATED

    @property
    def extraction_key(self) -> tuple:
        return self.prompt, self.answer, self.labels, self.loss, self.max_text, self.max_answer

    def parts(self, text: str) -> tuple[str, str, str]:
        """Return a prompt as (words before the text, the text, words after it)."""
        before, _, behind = self.prompt.partition(_TEXT)
        return before, text, behind


class TaskSet(tasks.TaskSet[Task]):
    task_class = Task


VLBART = TaskSet.load(Path(__file__).with_name("vlbart_tasks.json"))  # the four tasks of the original
OPEN_SETS = TaskSet.load(Path(__file__).with_name("open_tasks.json"))  # easy-VQA, NLVR and the Flickr8k subset
