"""Prompt templates: one definition for training and for evaluation, recorded by name in every checkpoint."""

import dataclasses
from collections.abc import Mapping

from mtl_lora.config import closest
from mtl_lora.errors import UserError


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
