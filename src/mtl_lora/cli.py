"""Command line to configuration: fire builds it, and nothing starts before every argument was understood.

fire alone runs the function before it complains of an unknown flag, hands over strings unchecked and turns a bare
flag into True; its help cuts defaults short and offers one-letter flags that two flags may claim. So arguments are
checked first, values are converted by the declared type, the help is written here, and fire's part is to build the
configuration.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence

import fire

from mtl_lora.config import Config, closest, type_name
from mtl_lora.errors import UserError

_TRUE, _FALSE, _NONE = ("true", "1", "yes"), ("false", "0", "no"), ("none", "null", "")


def parse(config_class: type[Config], arguments: Sequence[str], about: str) -> Config:
    """The configuration that ``arguments`` (without the program's name) describe.

    Raises ``UserError`` for an unknown, stray, bare, repeated or wrongly typed argument. ``--help`` prints every
    flag with its meaning, unit and default, and exits.
    """
    if any(argument in ("--help", "-h") for argument in arguments):
        print(help_text(config_class, about))
        raise SystemExit(0)
    hints = typing.get_type_hints(config_class)
    raw = _split(arguments, hints)
    for name, value in raw.items():
        _convert(name, value, hints[name])  # refuse a wrong value before fire sees any
    command = [f"--{name}={value}" for name, value in raw.items()]
    return fire.Fire(_builder(config_class), command=command, serialize=lambda _: None)


def help_text(config_class: type[Config], about: str) -> str:
    """Every flag with its type, its default as one would write it, and its meaning."""
    hints = typing.get_type_hints(config_class)
    lines = [about, "", "Flags, as --name value or --name=value:", ""]
    for field in dataclasses.fields(config_class):
        lines.append(f"  --{field.name}  ({type_name(hints[field.name])}; default: {_spelled(_default(field))})")
        lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def _spelled(value: object) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(value) or "empty"
    return "none" if value is None else str(value)


def _split(arguments: Sequence[str], hints: dict[str, object]) -> dict[str, str]:
    """Flag names to raw values; accepts ``--name value``, ``--name=value`` and, for a bool, ``--name`` alone."""
    raw, waiting = {}, list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise UserError(f"the argument {argument!r} belongs to no flag; write --name value")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in hints:
            raise UserError(f"unknown flag --{name}{closest(name, list(hints))}")
        if name in raw:
            raise UserError(f"the flag --{name} is given twice")
        if not equals:
            if waiting and not waiting[0].startswith("--"):
                value = waiting.pop(0)
            elif hints[name] is bool:
                value = "True"
            else:
                raise UserError(f"the flag --{name} needs a value: {type_name(hints[name])}")
        raw[name] = value
    return raw


def _convert(name: str, text: str, expected: object) -> object:
    """A flag's text as its declared type; raises ``UserError`` that says what would be right."""
    declared = expected
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        options = typing.get_args(expected)
        if types.NoneType in options and text.lower() in _NONE:
            return None
        if str in options and int in options:
            return int(text) if text.lstrip("-").isdecimal() else text
        (expected,) = [option for option in options if option is not types.NoneType]
    try:
        if expected is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        if expected in (int, float):
            return expected(text)
        if typing.get_origin(expected) is list:
            return _list(text)
    except (ValueError, KeyError, SyntaxError):
        raise UserError(f"--{name} must be {type_name(declared)}, not {text!r}") from None
    return text


def _list(text: str) -> list[str]:
    """``a,b`` or ``["a", "b"]`` as a list of strings."""
    text = text.strip()
    quoted = '"' in text or "'" in text
    # A regular expression such as [qv]_proj begins with a bracket too, but does not end with one.
    if text.startswith("[") and (quoted or text.endswith("]")):
        if quoted:
            return [str(entry) for entry in ast.literal_eval(text)]
        text = text[1:-1]
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def _builder(config_class: type[Config]):
    """A function with one keyword a field, which fire calls with the values converted."""
    fields, hints = dataclasses.fields(config_class), typing.get_type_hints(config_class)

    def build(**values):
        return config_class(**values)

    build.__signature__ = inspect.Signature(
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field)) for field in fields
    )
    converters = {field.name: lambda text, name=field.name: _convert(name, text, hints[name]) for field in fields}
    return fire.decorators.SetParseFns(**converters)(build)


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
