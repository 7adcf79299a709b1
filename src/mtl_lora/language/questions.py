"""Questions: examples with the prompt ids that training would give them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_lora import evaluation, files
from mtl_lora.errors import UserError
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import Example
from mtl_lora.language.metrics import extract_answer, strict_answer
from mtl_lora.language.tasks import TaskSet
from mtl_lora.metrics import same_text, text_f1


class Question(evaluation.Question):
    """One example, ready for a model."""

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
        as_written = self.options or self.task.metric_name == "accuracy"
        correct = parsed == target if as_written else same_text(parsed, target)
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
        """A line of this question with its answer extracted from its text by today's rules, or as it was scored."""
        if "text" in line:
            return self.line(self.answer_in(line["text"]))
        return self.line({key: line[key] for key in ("parsed", "normalised", "scores") if key in line})


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
