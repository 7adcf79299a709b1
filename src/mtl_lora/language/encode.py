"""Prompt templates, and text to token ids: one way for training and evaluation, so a prompt has the same ids in both.

A template is recorded by name in every checkpoint. Prompt and answer are tokenised apart and joined: no token merges
across the boundary, and exactly the answer and EOS carry loss. A prompt that is too long loses tokens from the middle
of its instruction.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mtl_lora.config import closest
from mtl_lora.errors import UserError
from mtl_lora.language.examples import Example
from mtl_lora.language.tasks import Task, TaskSet

# Tokens kept free for a free-text answer; with options the longest one decides.
FREE_TEXT_RESERVE = 32
# Tokens that must remain of a shortened instruction. Its outermost tokens may hold white space of the template, merged
# with its own, so with fewer than this the template would suffer.
LEAST_INSTRUCTION = 8


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around an instruction; the answer follows ``closing`` directly.

    opening: before the instruction. opening_with_input and input_marker: used when a record's ``input`` is not empty.
    """

    opening: str
    opening_with_input: str
    input_marker: str
    closing: str

    def split(self, record: Mapping[str, str]) -> tuple[str, str, str]:
        """(opening, middle, closing) of a record's prompt; the middle is what may be shortened."""
        if record.get("input"):
            return self.opening_with_input, record["instruction"] + self.input_marker + record["input"], self.closing
        return self.opening, record["instruction"], self.closing

    def prompt(self, record: Mapping[str, str]) -> str:
        """The whole prompt of a record with ``instruction`` and, perhaps, ``input``."""
        return "".join(self.split(record))


_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."


def _template(trailing: str, margin: str) -> Template:
    """Alpaca's words; what differs is white space: ``trailing`` the sentences, ``margin`` of a section."""
    section = f"\n{margin}\n{margin}"
    opening = f"{trailing}\n\n{margin}### Instruction:\n{margin}"
    return Template(
        opening=_TASK + _REQUEST + opening,
        opening_with_input=_TASK + _INPUT + _REQUEST + opening,
        input_marker=f"{section}### Input:\n{margin}",
        closing=f"{section}### Response:\n{margin}",
    )


TEMPLATES = {
    # Stanford Alpaca's layout, with no white space that tokenizers would have to carry.
    "alpaca": _template("", ""),
    # The bytes with which LLM-Adapters and the original MTL-LoRA train: two spaces after the sentence, sections
    # indented by 16 spaces, which also stand on the blank line between them.
    "original": _template("  ", " " * 16),
    # For one's own tasks with short texts, of whose rows the others' words are a half.
    "plain": Template(
        opening="Task:\n", opening_with_input="Task:\n", input_marker="\nInput:\n", closing="\nAnswer:\n"
    ),
}


def template(name: str) -> Template:
    """A template by name; raises ``UserError`` that lists those there are."""
    if name not in TEMPLATES:
        raise UserError(f"unknown prompt template {name!r}{closest(name, list(TEMPLATES))}")
    return TEMPLATES[name]


@dataclasses.dataclass
class Encoded:
    """One example in token ids: ``prompt_ids + answer_ids``, and the number of prompt tokens that were cut."""

    prompt_ids: list[int]
    answer_ids: list[int]
    task_id: int
    removed: int = 0


class Encoder:
    """Encodes prompts and answers for one tokenizer, template and cutoff.

    cutoff_len: tokens of prompt, answer and EOS together. The room kept for the answer depends on the task alone,
    so that training and evaluation shorten a prompt alike; only a free-text answer longer than ``FREE_TEXT_RESERVE``
    takes more of it, in training, where it must fit. Raises ``UserError`` for a tokenizer that cannot be used so.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_name: str, cutoff_len: int, tasks: TaskSet):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.tokenizer, self.cutoff_len, self.tasks = tokenizer, cutoff_len, tasks
        self.template = template(template_name)
        self.prefix = self._special_prefix()
        special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._control = {*tokenizer.all_special_ids, *special} - {tokenizer.unk_token_id}
        self._answers: dict[str, list[int]] = {}
        self._reserves = {task.id: self._reserve(task) for task in tasks}
        self._fixed: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _special_prefix(self) -> list[int]:
        """The ids that the tokenizer puts before a text by itself (BOS), as a list that may be empty."""
        bare, full = self._ids(["a"])[0], self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise UserError(
            f"the tokenizer {self.tokenizer.name_or_path!r} merges its special tokens with the text behind them "
            f"(ids {full} for 'a', {bare} without them), so a prompt cannot be cut; use another tokenizer"
        )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        # What looks like a control token is text: EOS in an instruction would end it for the model.
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _reserve(self, task: Task) -> int:
        if not task.options:
            return FREE_TEXT_RESERVE
        return max(len(self.answer_ids(task.answer_prefix + option)) for option in task.options)

    def answer_ids(self, text: str) -> list[int]:
        """The ids of an answer with EOS at the end; each different answer is encoded once."""
        if text not in self._answers:
            self._answers[text] = [*self._ids([text])[0], self.tokenizer.eos_token_id]
        return self._answers[text]

    def encode(self, examples: Sequence[Example], with_answers: bool = True) -> list[Encoded]:
        """Encode examples; ``with_answers`` adds ``output`` and EOS (training).

        Raises ``UserError`` naming the example whose answer, alone or with the template, does not fit in the cutoff,
        or whose text this tokenizer cannot but read as a control token.
        """
        texts = [self.template.split(example.text()) for example in examples]
        prompts = self._ids(["".join(parts) for parts in texts])
        encoded = []
        for example, parts, ids in zip(examples, texts, prompts, strict=True):
            answer = self.answer_ids(example.output) if with_answers else []
            if found := self._control.intersection(ids) or self._control.intersection(answer[:-1]):
                token = self.tokenizer.convert_ids_to_tokens(found.pop())
                raise UserError(
                    f"example {example.index} holds {token!r}, which this tokenizer takes for a control token; "
                    "take it out"
                )
            if len(answer) > self.cutoff_len:
                raise UserError(
                    f"example {example.index}: the answer alone has {len(answer)} tokens, more than the cutoff_len "
                    f"{self.cutoff_len}; raise cutoff_len or shorten the output"
                )
            room = self.cutoff_len - max(len(answer), self._reserves[example.task_id]) - len(self.prefix)
            try:
                prompt = self.prefix + self._shorten(ids, parts, room)
            except UserError as error:
                raise UserError(f"example {example.index}: {error}") from None
            encoded.append(Encoded(prompt, answer, example.task_id, len(self.prefix) + len(ids) - len(prompt)))
        return encoded

    def _shorten(self, ids: list[int], parts: tuple[str, str, str], room: int) -> list[int]:
        """``ids`` with tokens cut from the middle of the instruction until they fit in ``room`` tokens."""
        if len(ids) <= room:
            return ids
        above, _, below = parts  # the template's own text around the instruction
        if (above, below) not in self._fixed:
            # A neighbour on the other side keeps white space from being tokenised differently than in the prompt.
            before, after = self._ids([above + "a", "a" + below])
            self._fixed[above, below] = before, after
        before, after = self._fixed[above, below]
        head, tail = len(common_prefix([ids, before])), len(common_prefix([ids[::-1], after[::-1]]))
        kept = room - head - tail
        if kept < LEAST_INSTRUCTION:
            raise UserError(
                f"cutoff_len {self.cutoff_len} leaves no room for an instruction beside the template's {head + tail} "
                f"tokens and the answer; raise cutoff_len to {self.cutoff_len + LEAST_INSTRUCTION - kept} or more"
            )
        first = head + (kept + 1) // 2
        return ids[:first] + ids[len(ids) - tail - kept // 2 :]


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in same]
