"""Questions: examples with the prompt ids that training would give them, and the batches in which they are answered."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.config import AUTO
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import Example, data_file, load_examples
from mtl_lora.language.metrics import extract_answer, strict_answer
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet
from mtl_lora.metrics import same_text, text_f1

TOKEN_BUDGET = 2048  # tokens of a batch with --batch_size auto on a CPU, where larger ones are no faster
GPU_TOKEN_BUDGET = 65536


@dataclasses.dataclass
class Question:
    """One example, ready for a model."""

    task: Task
    example: Example
    prompt_ids: list[int]
    prompt_sha256: str

    @property
    def key(self) -> tuple[str, int]:
        """The task's name and the example's index: different for every question of an evaluation."""
        return self.task.name, self.example.index

    @property
    def options(self) -> tuple[str, ...]:
        """The answers that this question allows; empty for free text."""
        return self.task.options_of(self.example.instruction)

    def answer_in(self, text: str) -> dict:
        """What is extracted from generated text, as a prediction line holds it."""
        answer = {"parsed": extract_answer(self.task, text), "text": text}
        if self.options:
            return answer | {"strict": strict_answer(self.task, self.options, text)}
        return answer | {"f1": text_f1(answer["parsed"], self.example.answer)}

    def line(self, answer: Mapping) -> dict:
        """The question's line in the predictions: its target as ``answer``, and what was answered.

        answer: of ``answer_in``; or of scoring: ``parsed``, ``normalised`` (the length-normalised choice), ``scores``.
        """
        target, parsed = self.example.answer, answer["parsed"]
        correct = parsed == target if self.options else same_text(parsed, target)
        line = {"task": self.task.name, "index": self.example.index, "answer": target, "correct": correct}
        line |= {**answer, "prompt_sha256": self.prompt_sha256}
        if "kind" in self.example.extra:
            line["kind"] = self.example.extra["kind"]
        return line

    def answered_by(self, line: Mapping | None) -> bool:
        """Whether a line, perhaps of an earlier version of the test set, answers this very prompt and target."""
        expected = self.prompt_sha256, self.example.answer
        said = line and line.get("text", line.get("parsed"))
        return isinstance(said, str) and (line.get("prompt_sha256"), line.get("answer")) == expected

    def extract_again(self, line: dict) -> dict:
        """A line of this question with its answer extracted from its text by today's rules."""
        return self.line(self.answer_in(line["text"])) if "text" in line else line


def encode_questions(
    examples: Sequence[Example], tasks: TaskSet, encoder: Encoder, source: str | Path
) -> list[Question]:
    """Questions of examples; raises ``UserError`` naming ``source`` and the example whose prompt cannot be made."""
    try:
        prompts = encoder.encode(examples, with_answers=False)
    except UserError as error:
        raise UserError(f"{source}, {error}") from None
    return [
        Question(tasks[example.task_id], example, encoded.prompt_ids, files.sha256_of(str(encoded.prompt_ids).encode()))
        for example, encoded in zip(examples, prompts, strict=True)
    ]


@dataclasses.dataclass
class QuestionSets:
    """The questions to answer; by task the sha256 of its test file, and the number of examples in it."""

    questions: list[Question] = dataclasses.field(default_factory=list)
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def load_questions(
    data_dir: str | Path, tasks: TaskSet, chosen: Sequence[str], encoder: Encoder, limit: int = 0
) -> QuestionSets:
    """``data_dir/<task>/test.json``, or .jsonl, .csv ..., of the chosen tasks, all if none is chosen.

    limit: the first n of each, 0 all.

    Raises ``UserError`` for an unknown task, a missing file and a broken example.
    """
    found = QuestionSets()
    for task in [tasks[name] for name in dict.fromkeys(chosen)] or list(tasks):
        path = data_file(Path(data_dir) / task.name, "test")
        if not path.is_file():
            raise UserError(
                f"there is no test file {path}; "
                + ("make it with `mtl-lora prepare commonsense`, or " if tasks.names == COMMONSENSE.names else "")
                + "pass --data_dir DIR, or --tasks with the tasks that have one"
            )
        with files.unchanged(path) as digest:
            examples = load_examples(path, tasks, task.name, closed=True)
        found.sha256[task.name], found.sizes[task.name] = digest, len(examples)
        found.questions += encode_questions(examples[:limit] if limit else examples, tasks, encoder, path)
    return found


def plan_batches(questions: Sequence[Question], batch_size: int | str, token_budget: int) -> list[list[Question]]:
    """Batches of at most ``batch_size`` questions, or with ``auto`` of at most ``token_budget`` prompt tokens.

    Each holds questions of one task, the longest first, so that they share a prompt prefix and little padding; a batch
    has one question at least. The order of ``questions`` does not matter.
    """
    batches = []
    by_task: dict[int, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task.id, []).append(question)
    for rows in by_task.values():
        rows.sort(key=lambda question: (-len(question.prompt_ids), question.key))
        start = 0
        while start < len(rows):
            longest = len(rows[start].prompt_ids)
            size = max(token_budget // longest, 1) if batch_size == AUTO else batch_size
            batches.append(rows[start : start + size])
            start += size
    return batches
