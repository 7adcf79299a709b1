"""The questions of an evaluation: test records with the prompt ids that training would give them."""

import dataclasses
import hashlib
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.encode import Encoder
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import Task, TaskSet


@dataclasses.dataclass
class Question:
    """One test record, ready for a model."""

    task: Task
    example: Example
    prompt_ids: list[int]
    prompt_sha256: str

    @property
    def key(self) -> tuple[str, int]:
        """What tells a question from every other of the evaluation."""
        return self.task.name, self.example.index

    @property
    def options(self) -> tuple[str, ...]:
        """The answers this record allows; empty for free text."""
        return self.task.options_of(self.example.instruction)


def test_file(data_dir: str | Path, task: Task) -> Path:
    """Where a task's test records lie; raises ``UserError`` if they do not."""
    path = Path(data_dir) / task.name / "test.json"
    if not path.is_file():
        raise UserError(
            f"there is no test file {path}; make it with data/commonsense/prepare.py, or pass --data_dir DIR, "
            "or --tasks with those that are there"
        )
    return path


def load_questions(
    data_dir: str | Path, tasks: TaskSet, chosen: list[str], encoder: Encoder, limit: int
) -> tuple[list[Question], dict[str, str]]:
    """(questions, sha256 of each task's test file) of the chosen tasks, all if none is chosen.

    Raises ``UserError`` for a task that is not there, a missing file and a broken record.
    """
    questions, hashes = [], {}
    for task in [tasks[name] for name in dict.fromkeys(chosen)] or list(tasks):
        path = test_file(data_dir, task)
        examples = load_examples(path, tasks, task.name, closed=True)
        examples = examples[:limit] if limit else examples
        hashes[task.name] = files.sha256(path)
        try:
            prompts = encoder.encode(examples, with_answers=False)
        except UserError as error:
            raise UserError(f"{path}, {error}") from None
        for example, encoded in zip(examples, prompts, strict=True):
            digest = hashlib.sha256(str(encoded.prompt_ids).encode()).hexdigest()
            questions.append(Question(task, example, encoded.prompt_ids, digest))
    return questions, hashes
