"""Read and validate examples: pictures with a question, a statement or a caption."""

import dataclasses
import functools
import math

from mtl_lora.data_files import examples_of, task_id_of, text_of
from mtl_lora.errors import UserError
from mtl_lora.image_text.tasks import CAPTION, CHOICE, Task, TaskSet
from mtl_lora.samples import Records

FIELDS = ("image", "text", "answer", "answers", "annotators", "task", "task_id")


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of a data file.

    images: one or more image ids. text: the question or statement; empty for a caption. answers: every right answer
    with its soft score from 0 to 1, by which training weights the answer; empty for an example to predict. index: its
    position in the file. annotators: the answers that people gave, if the file has them, or all references of a
    caption. extra: any further fields (``kind`` groups results, ``group`` joins statements that count together for
    consistency).
    """

    images: tuple[str, ...]
    text: str
    answers: dict[str, float]
    task_id: int
    index: int
    annotators: tuple[str, ...] = ()
    extra: dict = dataclasses.field(default_factory=dict, compare=False)

    @property
    def answer(self) -> str:
        """The answer with the highest score, the first of several; empty if there is none."""
        return max(self.answers, key=self.answers.__getitem__, default="")

    def record(self) -> dict:
        """Return the example as a JSON object that ``parse_example`` reads back."""
        fields = {"image": list(self.images), "text": self.text, "answers": self.answers, "task_id": self.task_id}
        fields |= {"annotators": list(self.annotators)} if self.annotators else {}
        return {key: value for key, value in fields.items() if value != ""} | self.extra


def parse_example(
    value: object,
    index: int,
    source: str,
    tasks: TaskSet,
    task: str | None = None,
    closed: bool = False,
    answered: bool = True,
) -> Example:
    """Return one example from its JSON value; raises ``UserError`` naming ``source``, the example and the field.

    An example has ``image``, an id or a list of ids; ``text`` unless it is a caption; and ``answer``, a text, or
    ``answers``, either soft scores by text or a list of texts that are all right. task: the task of all examples;
    without it each example needs ``task`` or ``task_id``, unless there is only one task. closed: require an answer with
    a score above 0 (evaluation). answered: False for an example to predict, whose answers are not needed and not kept.
    """
    where = f"{source}, example {index}"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with image, text, answer and task, not {type(value).__name__}")
    value = {key: entry for key, entry in value.items() if entry is not None}
    task_id = task_id_of(value, where, tasks, task)
    of_task = tasks[task_id]
    answers = _answers(value, of_task, where) if answered else {}
    if closed and not any(answers.values()):
        raise UserError(f"{where} has no answer with a score above 0; remove the example from the test set")
    annotators = value.get("annotators", []) if answered else []
    if answered and of_task.answer == CAPTION and isinstance(value.get("answers"), list) and len(value["answers"]) > 1:
        annotators = [each.strip() for each in value["answers"]]
    # VQA accuracy leaves out one annotator at a time; an answer is fully right if three of the others gave it.
    least = 2 if of_task.answer == CAPTION else 4
    if not isinstance(annotators, list) or 0 < len(annotators) < least:
        raise UserError(f"{where}: 'annotators' must be a list of at least {least} answers, not {annotators!r:.200}")
    for each in annotators:
        text_of(each, f"{where}: 'annotators'")
    extra = {key: entry for key, entry in value.items() if key not in FIELDS}
    text = _text(value, of_task, where)
    return Example(_images(value, where), text, answers, task_id, index, tuple(annotators), extra)


def _images(value: dict, where: str) -> tuple[str, ...]:
    """Return the ids of the pictures; a whole number, as CSV and parquet may store an id, becomes its digits."""
    if "image" not in value:
        raise UserError(f"{where} has no field 'image'")
    given = value["image"]
    ids = [str(each) if type(each) is int else each for each in (given if isinstance(given, list) else [given])]
    if not ids or not all(isinstance(each, str) and each.strip() for each in ids):
        raise UserError(f"{where}: 'image' must be an id, or a list of ids, not {given!r:.200}")
    return tuple(text_of(each, f"{where}: 'image'") for each in ids)


def _text(value: dict, task: Task, where: str) -> str:
    text = text_of(value.get("text", ""), f"{where}: 'text'")
    if task.answer == CAPTION and text:
        raise UserError(f"{where} has 'text', but {task.name} is a caption task, whose prompt takes none; remove it")
    if task.answer != CAPTION and not text.strip():
        raise UserError(f"{where}: 'text' is empty" if "text" in value else f"{where} has no field 'text'")
    return text


def _answers(value: dict, task: Task, where: str) -> dict[str, float]:
    """Return the soft score of every right answer, without answers of score 0."""
    if "answer" in value and "answers" in value:
        raise UserError(f"{where} has 'answer' and 'answers'; keep one of them")
    if "answer" not in value and "answers" not in value:
        raise UserError(f"{where} has no field 'answer' (or 'answers')")
    field, given = ("answer", value["answer"]) if "answer" in value else ("answers", value["answers"])
    if field == "answer":
        answers = {_one(given, f"{where}: 'answer'"): 1.0}
    elif isinstance(given, list) and given:
        answers = dict.fromkeys((_one(each, f"{where}: 'answers'") for each in given), 1.0)
    elif isinstance(given, dict):
        answers = {}
        for each, number in given.items():  # of answers that are equal but for the spaces around, the highest score
            name, score = _one(each, f"{where}: 'answers'"), _score(number, each, where)
            answers[name] = max(score, answers.get(name, 0))
        answers = {each: score for each, score in answers.items() if score}
    else:
        raise UserError(
            f"{where}: 'answers' must be an object of soft scores by answer, or a list of answers, not {given!r:.200}"
        )
    if task.answer == CHOICE and (unknown := [each for each in answers if each not in task.labels]):
        raise UserError(
            f"{where}: the answer {unknown[0]!r:.80} is not a label of {task.name}, which are {', '.join(task.labels)}"
        )
    if task.answer == CHOICE and len(answers) != 1:
        raise UserError(f"{where}: a choice must have one right answer, not {len(answers)}")
    return answers


def _one(answer: object, what: str) -> str:
    answer = text_of(answer, what)
    if not answer.strip():
        raise UserError(f"{what} holds an empty text")
    return answer.strip()


def _score(score: object, answer: str, where: str) -> float:
    if not (type(score) in (int, float) and math.isfinite(score) and 0 <= score <= 1):
        raise UserError(f"{where}: the score of {answer!r:.80} is {score!r:.80}; it must be a number from 0 to 1")
    return float(score)


load_examples = functools.partial(examples_of, parse_example)
DATA = functools.partial(Records, load_examples)  # where a study draws its samples
