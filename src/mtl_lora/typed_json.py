"""JSON files as dataclasses: read with every error naming the file and the key, written back key by key.

A field's type says what its key must hold. A field with a default may be missing or null; unknown keys are ignored,
so that a newer file can be read. A class with rules of its own defines ``read_json(reader, value, place)`` and
``to_json()``, which take the place of its fields.
"""

import dataclasses
import functools
import json
import math
import re
import reprlib
import types
import typing
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import read_json


class Rule(typing.NamedTuple):
    """What a value must be besides its type: ``text`` in words, for errors."""

    text: str
    holds: typing.Callable[[typing.Any], bool]


Text = typing.Annotated[str, Rule("a non-empty string", str.strip)]
Name = typing.Annotated[str, Rule("letters, digits, '_', '-' or '.'", re.compile(r"[\w.\-]+").fullmatch)]
Fraction = typing.Annotated[float, Rule("a fraction from 0 to 1", lambda number: 0 <= number <= 1)]
Error = typing.Annotated[float, Rule("a standard error from 0", lambda number: number >= 0)]
Count = typing.Annotated[int, Rule("a whole number from 1", lambda count: count >= 1)]
Index = typing.Annotated[int, Rule("a whole number from 0", lambda count: count >= 0)]
# Metadata of a field that is not a key of the file.
UNWRITTEN = {"unwritten": True}
_WORDS = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", list: "a list"}
_MISSING = type("_Missing", (), {"__repr__": lambda self: "missing"})()  # the value of a key that is not there


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the values of one file. source: the file in errors; schema: of the file, for classes that ask for it."""

    source: str
    schema: int = 1

    def read(self, expected: object, value: object, place: str = "") -> typing.Any:
        """``value`` as the type ``expected``; raises ``UserError`` naming the file, the key and what it must be."""
        origin, (first, *rest) = typing.get_origin(expected), typing.get_args(expected) or (expected,)
        if origin in (types.UnionType, typing.Union):
            return None if value is None else self.read(first, value, place)
        if origin is dict:
            entries = self.read(dict, value, place).items()
            return {key: self.read(rest[0], entry, f"{place}.{key}".lstrip(".")) for key, entry in entries}
        if origin is list:
            return [self.read(first, each, f"{place}[{i}]") for i, each in enumerate(self.read(list, value, place))]
        if hasattr(first, "read_json"):
            return first.read_json(self, value, place)
        if dataclasses.is_dataclass(first):
            return first(**self.fields(first, value, place))
        if not _is(first, value) or not all(rule.holds(value) for rule in rest):
            raise self.wrong(place, value, rest[0].text if rest else _WORDS.get(first, "an object"))
        return value

    def fields(self, cls: type, value: object, place: str = "") -> dict:
        """The arguments of a dataclass from the keys of an object."""
        entries = self.read(dict, value, place)
        return {
            name: self.key(entries, name, hint, place)
            for name, (hint, required) in _fields(cls).items()
            if required or entries.get(name) is not None
        }

    def key(self, entries: dict, key: str, expected: object, place: str = "") -> typing.Any:
        """The value of a required key of the object at ``place``."""
        return self.read(expected, entries.get(key, _MISSING), f"{place}.{key}".lstrip("."))

    def wrong(self, place: str, value: object, rule: str) -> UserError:
        """The error for a value that is not what it must be."""
        return UserError(f"{self.source}: {place or 'the file'} is {reprlib.repr(value)}; it must be {rule}")


def to_json(value: object) -> typing.Any:
    """A value of dataclasses as JSON holds it; ``Reader.read`` gives an equal value back."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return object_of(value)
    if isinstance(value, dict):
        return {key: to_json(entry) for key, entry in value.items()}
    return [to_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def object_of(value: object) -> dict:
    """The fields of a dataclass as the keys of an object."""
    return {name: to_json(getattr(value, name)) for name in _fields(type(value))}


def read_object(path: str | Path, what: str) -> dict:
    """The JSON object in a file; raises ``UserError`` naming ``what`` and the file."""
    value = read_json(path, what)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        # Half a surrogate pair can be read as JSON but never be written, so it would fail in the middle of a table.
        raise UserError(f"{what} {path} holds text that is not Unicode: {error}") from None
    return Reader(f"{what} {path}").read(dict, value)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[object, bool]]:
    """Names of the fields that are keys of the file, with their type and whether they are required."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: (hints[field.name], field.default is field.default_factory is dataclasses.MISSING)
        for field in dataclasses.fields(cls)
        if not field.metadata.get("unwritten")
    }


def _is(expected: object, value: object) -> bool:
    """Whether a value has a plain type; a bool is not a number, a whole number is one."""
    if expected is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is expected or (expected is object and value is not _MISSING)
