"""Prompt templates and tokenisation, shared by training and evaluation so that a prompt has the same ids in both.

Every checkpoint records the name of its template. Prompt and answer are tokenised separately and then joined, so no
token spans the boundary, and exactly the answer and EOS carry loss. A prompt that is too long loses tokens from the
middle of its instruction.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from mtl_lora.config import closest
from mtl_lora.errors import UserError, within
from mtl_lora.language.examples import Example
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.tokens import added_ids, control_ids, fixed_ends, refuse_control

if typing.TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens kept free for a free-text answer; with options, the longest option decides.
FREE_TEXT_RESERVE = 32
# The least number of tokens to which an instruction is shortened. Its outermost tokens may contain white space of the
# template, so cutting more could damage the template.
LEAST_INSTRUCTION = 8


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around an instruction; the answer follows ``closing`` directly.

    opening: the text before the instruction. If a record has a non-empty ``input``, ``opening_with_input`` replaces
    ``opening``, and ``input_marker`` stands between the instruction and the input.
    """

    opening: str
    opening_with_input: str
    input_marker: str
    closing: str

    def split(self, record: Mapping) -> tuple[str, str, str]:
        """(opening, middle, closing) of a record's prompt; only the middle may be shortened.

        Raises ``UserError`` for a record with messages before the user's last one, which the template cannot hold.
        """
        if record.get("context"):
            raise UserError("it has messages before the user's last one, which only --template chat supports")
        if record.get("input"):
            return self.opening_with_input, record["instruction"] + self.input_marker + record["input"], self.closing
        return self.opening, record["instruction"], self.closing

    def prompt(self, record: Mapping) -> str:
        """The complete prompt of a record with ``instruction`` and, optionally, ``input``."""
        return "".join(self.split(record))


# Put before a chat template, this fixes the date that some templates write into the prompt, which would change daily.
_ONE_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class ChatTemplate:
    """The chat template of a tokenizer, which produces the whole text of a conversation.

    source: the template. lead: the text that it puts between the generation prompt and every answer; it is treated as
    part of the prompt. end_id: the control token that ends an answer. Raises ``UserError`` unless the text of a
    training example begins with exactly the generation prompt, and for text that contains a control token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer, self.lead = tokenizer, ""
        try:
            self.source = tokenizer.get_chat_template()
        except ValueError:
            raise UserError("the tokenizer has no chat template; pass another --template, such as alpaca") from None
        known = tokenizer.added_tokens_decoder
        self._control = {str(token) for token in known.values() if token.special} | set(tokenizer.all_special_tokens)
        question, answer = {"instruction": "Is it?"}, "It is."
        prompt = self.prompt(question)
        self.lead, found, self._ending = self._whole(question, answer).removeprefix(prompt).partition(answer)
        if not found:
            raise UserError("the tokenizer's chat template leaves out the assistant's answer; pass another --template")
        self.answer(question, prompt + self.lead, answer)
        ids = tokenizer(self._ending, add_special_tokens=False)["input_ids"]
        self.end_id = next((each for each in ids if each in known), tokenizer.eos_token_id)
        self._control.add(tokenizer.convert_ids_to_tokens(self.end_id))

    def _messages(self, record: Mapping) -> list[dict[str, str]]:
        text = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
        messages = [*record.get("context", ()), {"role": "user", "content": text}]
        for message in messages:
            self._refuse_control(message["content"])
        return messages

    def _refuse_control(self, text: str) -> None:
        if found := [token for token in self._control if token in text]:
            raise UserError(
                f"its text contains the control token {min(found)!r}; remove it, as --template chat adds it"
            )

    def _render(self, messages: list[dict[str, str]], prompt: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": prompt}
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=_ONE_DAY + self.source, **options)
        except Exception as error:  # a template is a program and may raise any error
            raise UserError(f"the tokenizer's chat template refuses its messages ({error})") from None

    def _whole(self, record: Mapping, output: str) -> str:
        self._refuse_control(output)
        return self._render([*self._messages(record), {"role": "assistant", "content": output}], prompt=False)

    def prompt(self, record: Mapping) -> str:
        """The complete prompt of a record with ``instruction`` and, optionally, ``input`` and ``context``."""
        return self._render(self._messages(record), prompt=True) + self.lead

    def split(self, record: Mapping) -> tuple[str, str, str]:
        """As ``Template.split``; the middle is the user's last message."""
        return self.prompt(record).rpartition(self._messages(record)[-1]["content"].strip())

    def answer(self, record: Mapping, prompt: str, output: str) -> str:
        """The text of the answer as the template writes it after the record's prompt; some templates strip it."""
        whole = self._whole(record, output)
        answer = whole.removeprefix(prompt).removesuffix(self._ending)
        if whole != prompt + answer + self._ending or answer.strip() != output.strip():
            raise UserError(
                "with the tokenizer's chat template the text of a training example does not begin exactly with the "
                "prompt for generation, so training and evaluation would differ; pass another --template"
            )
        return answer


_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."


def _template(trailing: str, trailing_with_input: str, margin: str) -> Template:
    """Alpaca's template with other white space: a trailing one after the sentences, ``margin`` before each line."""
    section = f"\n{margin}\n{margin}"
    opening = f"\n\n{margin}### Instruction:\n{margin}"
    return Template(
        opening=_TASK + _REQUEST + trailing + opening,
        opening_with_input=_TASK + _INPUT + _REQUEST + trailing_with_input + opening,
        input_marker=f"{section}### Input:\n{margin}",
        closing=f"{section}### Response:\n{margin}",
    )


TEMPLATES = {
    # Stanford Alpaca's layout, without superfluous white space, which would cost tokens.
    "alpaca": _template("", "", ""),
    # Byte for byte the prompt of LLM-Adapters and the original MTL-LoRA: two spaces after the sentence, one if there is
    # an input, and sections indented by 16 spaces, as are the blank lines between them.
    "original": _template("  ", " ", " " * 16),
    # For your own tasks with short texts, where the words of the other templates would be half of each row.
    "plain": Template(
        opening="Task:\n", opening_with_input="Task:\n", input_marker="\nInput:\n", closing="\nAnswer:\n"
    ),
}
CHAT = "chat"


def template(name: str) -> Template | type[ChatTemplate]:
    """A template by name, or the class ``ChatTemplate`` for ``chat``; raises ``UserError`` for an unknown name."""
    if name not in (*TEMPLATES, CHAT):
        raise UserError(f"unknown prompt template {name!r}{closest(name, [*TEMPLATES, CHAT])}")
    return TEMPLATES.get(name, ChatTemplate)


@dataclasses.dataclass
class Encoded:
    """One example as token ids, ``prompt_ids + answer_ids``; removed: the number of prompt tokens that were cut."""

    prompt_ids: list[int]
    answer_ids: list[int]
    task_id: int
    removed: int = 0


class Encoder:
    """Encodes prompts and answers for one tokenizer, template and cutoff.

    cutoff_len: the maximum number of tokens of prompt, answer and EOS together. The room kept for the answer depends
    only on the task, so training and evaluation shorten a prompt alike. The exception is training on an output longer
    than that room, such as free text of more than ``FREE_TEXT_RESERVE`` tokens, because it must fit. Raises
    ``UserError`` for an unsuitable tokenizer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template_name: str, cutoff_len: int, tasks: TaskSet):
        self._control = control_ids(tokenizer)
        self.tokenizer, self.cutoff_len, self.tasks = tokenizer, cutoff_len, tasks
        if template_name == CHAT:  # which adds BOS and the end of an answer itself, and refuses control tokens
            self.template = ChatTemplate(tokenizer)
            self.prefix, self.end_id, self._control = [], self.template.end_id, set()
        else:
            self.template = template(template_name)
            self.prefix, self.end_id = added_ids(tokenizer)[0], tokenizer.eos_token_id
        self._answers: dict[str, list[int]] = {}
        self._chat_texts: dict[str, str] = {}  # answers as a chat template writes them
        self.reserves = {task.id: self._reserve(task) for task in tasks}

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # A control token spelled out in a text is split as text, or EOS in an instruction would end it; a chat template
        # writes real ones.
        plain = not isinstance(self.template, ChatTemplate)
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    def _reserve(self, task: Task) -> int:
        if not task.options:
            return FREE_TEXT_RESERVE
        return max(len(self.option_ids(task, option)) for option in task.options)

    def option_ids(self, task: Task, option: str) -> list[int]:
        """The ids of the answer that consists of one of a task's options, encoded as in training."""
        text = task.answer_prefix + option
        if isinstance(self.template, ChatTemplate) and text not in self._chat_texts:  # which may strip it
            question = {"instruction": "Is it?"}
            self._chat_texts[text] = self.template.answer(question, self.template.prompt(question), text)
        return self.answer_ids(self._chat_texts.get(text, text))

    def answer_ids(self, text: str) -> list[int]:
        """The ids of an answer, including the EOS token at its end; results are cached by text."""
        if text not in self._answers:
            self._answers[text] = [*self._ids([text])[0], self.end_id]
        return self._answers[text]

    def encode(self, examples: Sequence[Example], with_answers: bool = True) -> list[Encoded]:
        """Encode the prompts of examples; ``with_answers`` adds ``output`` and EOS (training).

        Raises ``UserError`` naming an example whose answer, alone or with the template, does not fit in the cutoff, or
        whose text this tokenizer always encodes as a control token.
        """
        texts = [self._texts(example, with_answers) for example in examples]
        prompts = self._ids(["".join(parts) for parts, _ in texts])
        encoded = []
        for example, (parts, output), ids in zip(examples, texts, prompts, strict=True):
            answer = self.answer_ids(output) if with_answers else []
            refuse_control(self.tokenizer, self._control, [*ids, *answer[:-1]], example.index)
            if len(answer) > self.cutoff_len:
                raise UserError(
                    f"example {example.index}: the answer alone has {len(answer)} tokens, more than the cutoff_len "
                    f"{self.cutoff_len}; raise cutoff_len or shorten the output"
                )
            room = self.cutoff_len - max(len(answer), self.reserves[example.task_id]) - len(self.prefix)
            with within(f"example {example.index}"):
                prompt = self.prefix + self._shorten(ids, parts, room)
            encoded.append(Encoded(prompt, answer, example.task_id, len(self.prefix) + len(ids) - len(prompt)))
        return encoded

    def _texts(self, example: Example, with_answer: bool) -> tuple[tuple[str, str, str], str]:
        """The (opening, middle, closing) of an example's prompt, and its answer."""
        record = example.text()
        with within(f"example {example.index}"):
            parts = self.template.split(record)
            if with_answer and isinstance(self.template, ChatTemplate):
                return parts, self.template.answer(record, "".join(parts), example.output)
        return parts, example.output

    def _shorten(self, ids: list[int], parts: tuple[str, str, str], room: int) -> list[int]:
        """Cut ``ids`` in the middle of the instruction to at most ``room`` tokens; ``UserError`` if too few remain."""
        if len(ids) <= room:
            return ids
        head, tail = fixed_ends(ids, parts[0], parts[2], self._ids)
        kept = room - head - tail
        if kept < LEAST_INSTRUCTION:
            raise UserError(
                f"cutoff_len {self.cutoff_len} leaves no room for an instruction beside the template's {head + tail} "
                f"tokens and the answer; raise cutoff_len to {self.cutoff_len + LEAST_INSTRUCTION - kept} or more"
            )
        first = head + (kept + 1) // 2
        return ids[:first] + ids[len(ids) - tail - kept // 2 :]
