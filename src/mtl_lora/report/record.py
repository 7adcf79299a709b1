"""A JSON object from a file, taken key by key: every complaint names the file and the key."""

import dataclasses
import math
import reprlib
from collections.abc import Callable
from pathlib import Path

from mtl_lora.errors import UserError


def one_line(text: str) -> str:
    return " ".join(text.split())


@dataclasses.dataclass(frozen=True)
class Record:
    """A JSON object that knows its file and its place in it, so that every complaint can name both."""

    path: Path
    place: str
    value: dict

    def take(self, key: str, holds: Callable[[object], bool], rule: str, optional: bool = False):
        """The value of ``key`` if it ``holds``; None for an optional key that is absent or null."""
        if optional and self.value.get(key) is None:
            return None
        if key not in self.value:
            raise UserError(f"{self.path}: the key {self.place}{key} is missing; it must be {rule}")
        if not holds(self.value[key]):
            raise UserError(f"{self.path}: {self.place}{key} is {reprlib.repr(self.value[key])}; it must be {rule}")
        return self.value[key]

    def text(self, key: str, optional: bool = False) -> str | None:
        text = self.take(key, lambda text: isinstance(text, str) and text.strip(), "a non-empty string", optional)
        return None if text is None else one_line(text)

    def fraction(self, key: str, optional: bool = False) -> float | None:
        return self.take(key, is_fraction, "a fraction from 0 to 1", optional)

    def number(self, key: str, optional: bool = False) -> float | None:
        return self.take(key, is_number, "a number", optional)

    def stderr(self, optional: bool = False) -> float | None:
        return self.take("stderr", is_fraction, "a standard error, a fraction from 0 to 1", optional)

    def count(self, key: str, least: int = 1) -> int:
        return self.take(key, lambda count: type(count) is int and count >= least, f"a whole number from {least}")

    def child(self, key: str) -> "Record | None":
        """The object under an optional ``key``."""
        value = self.take(key, is_object, "an object", optional=True)
        return None if value is None else Record(self.path, f"{self.place}{key}.", value)

    def children(self, key: str, optional: bool = False) -> "dict[str, Record]":
        """The objects under ``key``, which is an object of objects."""
        values = self.take(key, is_object, "an object", optional) or {}
        holder = Record(self.path, f"{self.place}{key}.", values)
        return {
            name: Record(self.path, f"{holder.place}{name}.", holder.take(name, is_object, "an object"))
            for name in values
        }

    def records(self, key: str, optional: bool = False) -> "list[Record]":
        """The objects in the list under ``key``."""
        rule = "a list of objects"
        values = self.take(key, lambda value: isinstance(value, list) and all(map(is_object, value)), rule, optional)
        return [Record(self.path, f"{self.place}{key}[{index}].", value) for index, value in enumerate(values or [])]


def is_object(value: object) -> bool:
    return isinstance(value, dict)


def is_fraction(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
