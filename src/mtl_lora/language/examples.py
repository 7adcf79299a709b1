"""Read and validate examples; every error names the file, the example and the field in one sentence."""

import dataclasses
import functools
from collections.abc import Sequence

from mtl_lora.data_files import examples_of, label_of, refuse_slips, task_id_of, text_of
from mtl_lora.errors import UserError
from mtl_lora.language.tasks import Task, TaskSet, extract_answer
from mtl_lora.metrics import METRICS
from mtl_lora.samples import Records


@dataclasses.dataclass(frozen=True)
class Example:
    """One example: the four text fields of LLM-Adapters' files, the task id, and the index of the example in its file.

    context: the messages before the user's last one, if the example was given as ``messages``. extra: any further
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
        """The JSON object from which ``parse_example`` builds this example again."""
        fields = {key: getattr(self, key) for key in FIELDS}
        if self.context:
            turns = {"user": fields.pop("instruction") + fields.pop("input"), "assistant": fields.pop("output")}
            turns = [{"role": role, "content": content} for role, content in turns.items() if content]
            fields = {"messages": [*self.context, *turns], **fields}
        return fields | self.extra


FIELDS = ("instruction", "input", "output", "answer", "task_id")
OF_ENCODERS = ("text", "text_b", "label")
ROLES = ("system", "user", "assistant")


def parse_example(
    value: object,
    index: int,
    source: str,
    tasks: TaskSet,
    task: str | None = None,
    closed: bool = False,
    answered: bool = True,
) -> Example:
    """Build one example from its JSON value; raises ``UserError`` naming ``source``, the example and the field.

    An example has ``instruction`` and ``output``, or ``messages``, or, for a task with options, ``text`` and ``label``.
    task: the task of all examples; without it each example has ``task_id`` or ``task``, unless there is only one task.
    closed: as for evaluation, require an answer, which must be one of the example's options if it has any, and no
    output. answered: False for an example to predict, whose ``output`` and ``answer`` are neither needed nor kept.
    """
    where = f"{source}, example {index}"
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with {', '.join(FIELDS)}, not {type(value).__name__}")
    extra = {key: entry for key, entry in value.items() if key not in (*FIELDS, "task", "messages")}
    value = {key: entry for key, entry in value.items() if entry is not None}  # a null means that the field is absent
    has_messages = "messages" in value
    if "text" in value and value.keys().isdisjoint({"messages", *["output", "answer"] * answered}):
        value = _from_text(value, where, tasks[task_id_of(value, where, tasks, task)], answered)
        extra = {key: entry for key, entry in extra.items() if key in value or key not in OF_ENCODERS}
    if has_messages:
        value = _from_messages(value, where)
    elif answered and not closed and "output" not in value and "answer" in value:
        prefix = tasks[task_id_of(value, where, tasks, task)].answer_prefix
        value["output"] = prefix + text_of(value["answer"], f"{where}: 'answer'")
    needed = {"instruction": not value.get("input"), "input": False}
    if answered:  # an evaluation needs the answer, training the output
        needed |= {"output": not closed, "answer": closed and not has_messages}
    texts = _texts(value, needed, where, " (the assistant's last message)" if has_messages else "")
    task_id = task_id_of(value, where, tasks, task)
    if answered:
        texts["answer"] = _answer(texts, tasks[task_id], closed, has_messages, where)
    return Example(*texts.values(), task_id, index, extra, tuple(value.get("context", ())) if has_messages else ())


def _texts(value: dict, needed: dict[str, bool], where: str, hint: str) -> dict[str, str]:
    """Return the text fields, empty where they are absent. needed: the fields to read, and whether they must be there;
    hint: what a missing one is."""
    texts = dict.fromkeys(FIELDS[:-1], "")
    for field, required in needed.items():
        if field in value:
            texts[field] = text_of(value[field], f"{where}: {field!r}")
        elif required:
            raise UserError(f"{where} has no field {field!r}{hint}")
    if not (texts["instruction"] + texts["input"]).strip():
        raise UserError(f"{where}: 'instruction' is empty")
    if needed.get("output") and not texts["output"].strip():
        raise UserError(f"{where}: 'output' is empty")
    return texts


def _from_text(value: dict, where: str, task: Task, answered: bool) -> dict:
    """Convert an example with ``text``, optional ``text_b``, and ``label`` (the encoders' format) to the usual fields.

    An example of a task without options that has an instruction is returned unchanged.
    """
    both = [key for key in ("instruction", "input") if value.get(key) is not None]
    if both and not task.options:
        return value
    if both:
        raise UserError(f"{where} has both 'text' and {both[0]!r}; keep only one of them")
    if not task.options:
        raise UserError(f"{where} has 'text', but the task {task.name} has no labels; write an 'instruction'")
    refuse_slips(value, where)
    texts = [text_of(value[key], f"{where}: {key!r}") for key in ("text", "text_b") if value.get(key) is not None]
    if not texts[0].strip():
        raise UserError(f"{where}: 'text' is empty")
    fields = {"instruction": task.instruction_of(*texts)}
    if answered:
        label = label_of(value, task.options, where, task.name)
        fields |= {"output": task.answer_prefix + label, "answer": label}
    return {key: entry for key, entry in value.items() if key not in OF_ENCODERS} | fields


def _from_messages(value: dict, where: str) -> dict:
    """Convert an example with ``messages`` to the usual fields.

    The user's last message becomes the instruction, the assistant's answer to it the output, and all earlier messages
    the ``context``.
    """
    if both := value.keys() & {"instruction", "input", "output"}:
        raise UserError(f"{where} has both 'messages' and {sorted(both)[0]!r}; keep only one of them")
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
        raise UserError(f"{where}: 'messages' must end with a user message, or with the assistant's answer to one")
    return {**value, **output, "instruction": turns.pop()["content"], "context": turns}


def _answer(texts: dict[str, str], task: Task, closed: bool, has_messages: bool, where: str) -> str:
    """Return an example's right answer; raises ``UserError`` if an evaluation could not find it."""
    answer, options = texts["answer"], task.options_of(texts["instruction"])
    if closed and has_messages and not answer:
        answer = extract_answer(task, texts["output"])
    # An option may have white space around it, to fit behind the answer prefix; the answer may leave it out.
    answer = {option.strip(): option for option in options}.get(answer, answer)
    if options:
        if answer not in (options if closed else [*options, ""]):
            raise UserError(f"{where}: the answer {answer!r} is not one of its options {'/'.join(options)}")
        if not closed:
            _check_output(texts["output"], answer, task, options, where)
    elif closed:
        if not answer.strip():
            way_out = "end with the assistant's answer" if has_messages else "write one"
            raise UserError(f"{where}: 'answer' is empty, so no prediction could be right; {way_out}")
        _check_free_text(answer, task, where)
    return answer


def _check_free_text(answer: str, task: Task, where: str) -> None:
    """Raise ``UserError`` for an answer that no generated text could match in an evaluation."""
    found, metric = extract_answer(task, answer), task.metric_name
    # f1 gives partial credit; any other metric must accept what is extracted from the answer itself.
    if metric == "f1" or METRICS[metric].score(found, answer):
        return
    if found or not task.pattern:  # a pattern may need text around the answer
        rule = "by the task's pattern" if task.pattern else "its first line without outer spaces and answer prefix"
        raise UserError(
            f"{where}: from the answer {answer!r} an evaluation would extract only {found!r} ({rule}), so no "
            "prediction could be right; shorten the answer to that"
        )


def _check_output(output: str, answer: str, task: Task, options: Sequence[str], where: str) -> None:
    """Raise ``UserError`` if an evaluation would not extract the example's answer from the output."""
    prefix = task.answer_prefix.strip()
    if prefix not in output:  # scoring puts options after the prefix, which training would never show
        raise UserError(
            f"{where}: the output {output!r} lacks the task's answer prefix {prefix!r}; write it before "
            'the answer, or declare "answer_prefix": "" in the tasks file'
        )
    found = extract_answer(task, output)
    if found not in options or (answer and found != answer):
        wanted = repr(answer) if answer else f"one of {'/'.join(options)}"
        raise UserError(
            f"{where}: an evaluation would extract the answer {found!r} from the output {output!r}, not "
            f"{wanted}; make output and answer agree"
        )


load_examples = functools.partial(examples_of, parse_example)
DATA = functools.partial(Records, load_examples)  # the data that studies sample from
