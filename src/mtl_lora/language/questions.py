"""Questions: examples with the same prompt ids that training would use."""

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
    """One example prepared for a model."""

    @property
    def options(self) -> tuple[str, ...]:
        """The answers that this question allows; empty for free text."""
        return self.task.options_of(self.example.instruction)

    def answer_in(self, text: str) -> dict:
        """The answer fields of a prediction line, extracted from generated text."""
        answer = {"parsed": extract_answer(self.task, text), "text": text}
        if self.options:
            return answer | {"strict": strict_answer(self.task, self.options, text)}
        return answer | {"f1": text_f1(answer["parsed"], self.example.answer)}

    def line(self, answer: Mapping) -> dict:
        """The question's prediction line: the target as ``answer``, whether it was met, and the given answer's fields.

        answer: the result of ``answer_in`` or, from scoring, ``parsed``, ``normalised`` (the length-normalised choice)
        and ``scores``.
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
        """Whether a line answers this exact prompt and target; it may come from an earlier version of the test set."""
        expected = self.prompt_sha256, self.example.answer
        said = line and line.get("text", line.get("parsed"))
        return isinstance(said, str) and (line.get("prompt_sha256"), line.get("answer")) == expected

    def extract_again(self, line: dict) -> dict:
        """A line of this question, with its answer extracted again by today's rules, or kept if it was scored."""
        if "text" in line:
            return self.line(self.answer_in(line["text"]))
        return self.line({key: line[key] for key in ("parsed", "normalised", "scores") if key in line})


def encode_questions(
    examples: Sequence[Example], tasks: TaskSet, encoder: Encoder, source: str | Path
) -> list[Question]:
    """Encode examples as questions; raises ``UserError`` naming ``source`` and an example that cannot be encoded."""
    try:
        prompts = encoder.encode(examples, with_answers=False)
    except UserError as error:
        raise UserError(f"{source}, {error}") from None
    found = []
    for example, encoded in zip(examples, prompts, strict=True):
        digest = files.sha256_of(str(encoded.prompt_ids).encode())
        row = {"removed": encoded.removed}
        found.append(Question(tasks[example.task_id], example, encoded.prompt_ids, digest, row))
    return found
