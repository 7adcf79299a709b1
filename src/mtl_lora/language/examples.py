"""Examples from a file, validated: an error names the file, the example and the field in one sentence."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.data_files import label_of, read_examples, refuse_slips, task_id_of, text_of
from mtl_lora.errors import UserError
from mtl_lora.language.metrics import extract_answer
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.metrics import METRICS
from mtl_lora.samples import Records


@dataclasses.dataclass(frozen=True)
class Example:
    """One example: the five fields with which LLM-Adapters' files are written, and its place in the file.

    context: the messages before the user's last, of an example that was given as ``messages``. extra: any further
    fields, kept for reports (for example ``kind`` in the quick-start data).
    """

    instruction: str
    input: str
    output: str
    answer: str
    task_id: int
    index: int
    extra: dict = dataclasses.field(default_factory=dict, compare=False)
    context: tuple[dict[str, str], ...] = ()

    def text(self) -> dict:
        """The fields that a prompt template reads."""
        return {"instruction": self.instruction, "input": self.input, "context": self.context}

    def record(self) -> dict:
        """A record that ``parse_example`` reads back."""
        fields = {key: getattr(self, key) for key in FIELDS}
        if self.context:
            turns = {"user": fields.pop("instruction") + fields.pop("input"), "assistant": fields.pop("output")}
            turns = [{"role": role, "content": content} for role, content in turns.items() if content]
            fields = {"messages": [*self.context, *turns], **fields}
        return fields | self.extra


FIELDS = ("instruction", "input", "output", "answer", "task_id")
ROLES = ("system", "user", "assistant")


def load_examples(path: str | Path, tasks: TaskSet, task: str | None = None, closed: bool = False) -> list[Example]:
    """Read the examples of a file, see ``data_files.read_values``; raises ``UserError`` naming file, example and field.

    An example has ``instruction`` and ``output``, or ``messages``, or, of a task with options, ``text`` and ``label``.
    task: the name of the task when the file holds one task alone; else each example has ``task_id`` or ``task``,
    unless there is only one task. closed: require an answer, one of its example's options, and no output (evaluation).
    """
    values = read_examples(path)
    return [parse_example(value, index, str(path), tasks, task, closed) for index, value in enumerate(values)]


# ---- examples ----


DATA = functools.partial(Records, load_examples)  # what a study takes samples of


def parse_example(
    value: object,
    index: int,
    source: str,
    tasks: TaskSet,
    task: str | None = None,
    closed: bool = False,
    answered: bool = True,
) -> Example:
    """One example from its JSON value; arguments and errors as ``load_examples``, which names ``source``.

    answered: False for an example to predict: ``output`` and ``answer`` are neither needed nor kept.
    """
    where = f"{source}, example {index}"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS)}, not {type(value).__name__}")
    extra = {key: entry for key, entry in value.items() if key not in (*FIELDS, "task", "messages")}
    empty = {key for key, entry in extra.items() if entry is None} - {"text", "text_b", "label"}
    value = {key: entry for key, entry in value.items() if entry is not None}  # a null is no field
    told = "messages" in value
    if "text" in value and value.keys().isdisjoint({"messages", *["output", "answer"] * answered}):
        value = _from_text(value, where, tasks[task_id_of(value, where, tasks, task)], answered)
        extra = {key: entry for key, entry in extra.items() if key in value or key in empty}
    if told:
        value = _from_messages(value, where)
    needed = {"instruction": not value.get("input"), "input": False}
    if answered:  # only an evaluation compares answers, and it needs no output
        needed |= {"output": not closed, "answer": closed and not told}
    texts = dict.fromkeys(FIELDS[:-1], "")
    for field, must in needed.items():
        if must and field not in value:
            hint = " (the assistant's last message)" if told else ""
            raise UserError(f"{where} has no field {field!r}{hint}")
        if must or value.get(field) is not None:
            texts[field] = text_of(value[field], f"{where}: {field!r}")
    if not (texts["instruction"] + texts["input"]).strip():
        raise UserError(f"{where}: 'instruction' is empty")
    if needed.get("output") and not texts["output"].strip():
        raise UserError(f"{where}: 'output' is empty")
    task_id = task_id_of(value, where, tasks, task)
    options = tasks[task_id].options_of(texts["instruction"])
    if closed and told and not texts["answer"]:
        texts["answer"] = extract_answer(tasks[task_id], texts["output"])
    # White space around an option is how it stands behind the prefix, and need not be in the answer.
    texts["answer"] = {option.strip(): option for option in options}.get(texts["answer"], texts["answer"])
    if options and answered and texts["answer"] not in (options if closed else [*options, ""]):
        raise UserError(f"{where}: the answer {texts['answer']!r} is not one of its options {'/'.join(options)}")
    if closed and not texts["answer"].strip():
        way_out = "end with the assistant's answer" if told else "write one"
        raise UserError(f"{where}: 'answer' is empty, so no answer would be right; {way_out}")
    if closed and not options:
        _check_free_text(texts["answer"], tasks[task_id], where)
    if options and answered and not closed:
        _check_output(texts, tasks[task_id], options, where)
    return Example(*texts.values(), task_id, index, extra, tuple(value.get("context", ())) if told else ())


def _from_text(value: dict, where: str, task: Task, answered: bool) -> dict:
    """A record of ``text``, perhaps ``text_b``, and ``label``, which an encoder reads too, as the fields of an example.

    One that has an instruction and no options to choose from stays as it is.
    """
    both = [key for key in ("instruction", "input") if value.get(key) is not None]
    if both and not task.options:
        return value
    if both:
        raise UserError(f"{where} has 'text' and {both[0]!r}; leave one of them")
    if not task.options:
        raise UserError(f"{where} has 'text', but the task {task.name} has no labels; write an 'instruction'")
    refuse_slips(value, "text_b", where)
    texts = [text_of(value[key], f"{where}: {key!r}") for key in ("text", "text_b") if value.get(key) is not None]
    if not texts[0].strip():
        raise UserError(f"{where}: 'text' is empty")
    fields = {"instruction": task.instruction_of(*texts)}
    if answered:
        label = label_of(value, task.options, where, task.name)
        fields |= {"output": task.answer_prefix + label, "answer": label}
    return {key: entry for key, entry in value.items() if key not in ("text", "text_b", "label")} | fields


def _from_messages(value: dict, where: str) -> dict:
    """A record of ``messages`` as the fields of an example: the user's last message is the instruction, what the
    assistant says to it the output, and what was said before the ``context``."""
    if both := value.keys() & {"instruction", "input", "output"}:
        raise UserError(f"{where} has 'messages' and {sorted(both)[0]!r}; leave one of them")
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'messages' must be a list of {{role, content}}, not {turns!r:.200}")
    for number, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise UserError(f"{where}: message {number} has the role {role!r:.50}; it must be {', '.join(ROLES)}")
        text_of(turn.get("content"), f"{where}: the content of message {number}")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    output = {"output": turns.pop()["content"]} if turns[-1]["role"] == "assistant" else {}
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{where}: 'messages' must end with one of the user, or with the assistant's answer to it")
    return {**value, **output, "instruction": turns.pop()["content"], "context": turns}


def _check_free_text(answer: str, task: Task, where: str) -> None:
    """Raise ``UserError`` for an answer that an evaluation could not read from any text."""
    found, metric = extract_answer(task, answer), task.metric_name
    if metric == "f1" or METRICS[metric].score(found, answer):  # a part of the words counts, or all do
        return
    if found or not task.pattern:  # a pattern may ask for what stands around it
        rule = "the task's pattern" if task.pattern else "its first line without spaces and the answer prefix,"
        raise UserError(
            f"{where}: of the answer {answer!r} an evaluation would read {found!r}, {rule} alone, so no text would be "
            "right; write that"
        )


def _check_output(texts: dict[str, str], task: Task, options: Sequence[str], where: str) -> None:
    """Raise ``UserError`` where an evaluation would extract another answer from the output than the example's."""
    output, answer, prefix = texts["output"], texts["answer"], task.answer_prefix.strip()
    if prefix not in output:  # scoring asks for the option behind it, which would never be trained
        raise UserError(
            f"{where}: the output {output!r} lacks the task's answer prefix {prefix!r}; write it before "
            'the answer, or declare "answer_prefix": "" in the tasks file'
        )
    found = extract_answer(task, output)
    if found not in options or (answer and found != answer):
        wanted = repr(answer) if answer else f"one of {'/'.join(options)}"
        raise UserError(
            f"{where}: an evaluation would read the answer {found!r} from the output {output!r}, not "
            f"{wanted}; let output and answer agree"
        )
