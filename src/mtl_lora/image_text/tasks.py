"""Tasks on pictures as data: what is asked about a picture, and which kind of answer is wanted."""

import dataclasses
import json
from pathlib import Path

from mtl_lora import tasks
from mtl_lora.errors import UserError
from mtl_lora.metrics import metrics_for, metrics_needing

# Kinds of answers: any text; one of the task's labels; a description, which is not asked for in words of the example.
OPEN, CHOICE, CAPTION = "open", "choice", "caption"
ANSWERS = (OPEN, CHOICE, CAPTION)
# What a token of an answer weighs: an example weighs one, whatever its length; or all tokens weigh the same.
BY_EXAMPLE, BY_TOKEN = "example", "token"
GENERATED = 20  # tokens of an answer that is generated, where a task says nothing
_TEXT = "{text}"


@dataclasses.dataclass(frozen=True)
class Task(tasks.Task):
    """One task on pictures.

    prompt: the model's text, in which ``{text}`` stands for the example's; a caption's has none. answer: ``open``,
    ``choice`` (one of two or more ``labels``) or ``caption``. loss: ``example`` or ``token`` (the default of captions).
    max_text and max_answer: most tokens of a prompt and of an answer, with the special ones that the tokenizer puts
    around them; 0: the cutoff alone. metric: empty: accuracy of choices, exact_match, CIDEr of captions.
    """

    prompt: str = _TEXT
    answer: str = OPEN
    labels: tuple[str, ...] = ()
    loss: str = ""
    max_text: int = 0
    max_answer: int = 0

    def __post_init__(self):
        for field, allowed in (("answer", ANSWERS), ("loss", ("", BY_EXAMPLE, BY_TOKEN))):
            if getattr(self, field) not in allowed:
                found = f"task {self.name!r} has {field} {getattr(self, field)!r}"
                raise UserError(f"{found}; it must be one of {', '.join(filter(None, allowed))}")
        self.require_texts("labels", "none unless the answer is a choice")
        if bool(self.labels) != (self.answer == CHOICE):
            raise UserError(f'task {self.name!r} needs "labels": [...] if its "answer" is "{CHOICE}", and only then')
        self.require_text("prompt")
        wanted = 0 if self.answer == CAPTION else 1
        if self.prompt.count(_TEXT) != wanted or not self.prompt.strip():
            times = "once" if wanted else "not, for a caption has no text"
            raise UserError(f"task {self.name!r} has the prompt {self.prompt!r}; it must hold {_TEXT} {times}")
        for field in ("max_text", "max_answer"):
            value = getattr(self, field)
            if type(value) is not int or (value and value < 4):
                raise UserError(f"task {self.name!r} has {field} {value!r}; it must be a number of tokens from 4, or 0")
        if not self.loss:
            object.__setattr__(self, "loss", BY_TOKEN if self.answer == CAPTION else BY_EXAMPLE)
        super().__post_init__()

    @property
    def metrics(self) -> list[str]:
        """The metrics that it may have."""
        if self.answer == CAPTION:
            return metrics_needing("references")
        return metrics_for(self.labels) + (metrics_needing("answers") if self.answer == OPEN else [])

    @property
    def metric_name(self) -> str:
        """The metric in effect."""
        return self.metric or {OPEN: "exact_match", CHOICE: "accuracy", CAPTION: "cider"}[self.answer]

    @property
    def generated_tokens(self) -> int:
        """Most tokens of an answer that is generated."""
        return self.max_answer or GENERATED

    @property
    def extraction_key(self) -> tuple:
        return self.prompt, self.answer, self.labels, self.loss, self.max_text, self.max_answer

    def parts(self, text: str) -> tuple[str, str, str]:
        """(what stands before the text, the text, what stands behind it) of a prompt."""
        before, _, behind = self.prompt.partition(_TEXT)
        return before, text, behind


class TaskSet(tasks.TaskSet[Task]):
    """Tasks in id order (ids 0..T-1 without gaps); ``columns`` names them in the order of a results table."""

    task_class = Task


def _shipped(name: str) -> TaskSet:
    return TaskSet.from_json(json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8")), name)


VLBART = _shipped("vlbart_tasks.json")  # the original's four
OPEN_SETS = _shipped("open_tasks.json")  # easy-VQA, NLVR and the Flickr8k subset
