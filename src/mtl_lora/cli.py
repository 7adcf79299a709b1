"""One command line for all commands: ``mtl-lora train | evaluate | predict | export | report | study | prepare``.

A command's flags are the fields of its configuration dataclass (see ``mtl_lora.config.flag``), written ``--name value``
or ``--name=value``, and ``--name`` alone for True. Every argument is checked before any work starts.
"""

import ast
import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Sequence

from mtl_lora.config import Config, Flag, closest, type_name
from mtl_lora.errors import UserError, user_errors_to_exit_code
from mtl_lora.version import __version__

_TRUE, _FALSE, _NONE = ("true", "1", "yes"), ("false", "0", "no"), ("none", "null", "")
SYSTEMS = ("language",)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: ``module:function`` of its arguments, imported when it is called, and its one-line help."""

    home: str
    about: str


COMMANDS = {
    "train": Command("mtl_lora.language.commands:train", "fine-tune a base model on many tasks"),
    "evaluate": Command("mtl_lora.language.commands:evaluate", "score a checkpoint or a base model on test sets"),
    "predict": Command("mtl_lora.language.commands:predict", "answer the examples of a file with a checkpoint"),
    "export": Command("mtl_lora.export.cli:main", "PEFT LoRA per task, merged models, imports"),
    "report": Command("mtl_lora.report.cli:main", "tables, comparisons, figures, page"),
    "study": Command("mtl_lora.study.runner:main", "train and evaluate a grid of experiments over seeds"),
    "prepare": Command("mtl_lora.language.commands:prepare", "download, verify and tag a data set"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with user_errors_to_exit_code():
        if not arguments or arguments[0] in ("--help", "-h"):
            print("\n".join(_overview()))
            return
        name, *rest = arguments
        if name == "--version":
            print(f"mtl-lora {__version__}")
            return
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{closest(name, list(COMMANDS))}; see mtl-lora --help")
        module, _, function = COMMANDS[name].home.partition(":")
        getattr(importlib.import_module(module), function)(_without_system(rest) if name == "train" else rest)


def _overview() -> list[str]:
    width = max(map(len, COMMANDS))
    return [
        "usage: mtl-lora COMMAND [--flag value ...]",
        "",
        *(f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items()),
        "",
        "mtl-lora COMMAND --help lists the flags; mtl-lora --version prints the version",
    ]


def _without_system(arguments: list[str]) -> list[str]:
    """Arguments of ``train`` without ``--system``, of which there is one; a checkpoint names its system itself."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--system":
            value = value if equals else (arguments[index + 1] if index + 1 < len(arguments) else "")
            if value not in SYSTEMS:
                raise UserError(f"--system must be one of {', '.join(SYSTEMS)}, not {value!r}")
            return arguments[:index] + arguments[index + (1 if equals else 2) :]
    return arguments


Parsed = typing.TypeVar("Parsed", bound=Config)


def parse(config_class: type[Parsed], arguments: Sequence[str], about: str) -> Parsed:
    """The configuration that ``arguments`` (without the program's name) describe.

    Raises ``UserError`` for an unknown, stray, repeated, missing or wrongly typed argument. ``--help`` prints every
    flag with its meaning, unit and default, and exits.
    """
    if any(argument in ("--help", "-h") for argument in arguments):
        print(help_text(config_class, about))
        raise SystemExit(0)
    flags = {flag.name: flag for flag in config_class.flags()}
    raw, listed = _split(arguments, flags)
    values = {name: _convert(flags[name], text) for name, text in raw.items()}
    positional = _positional(flags)
    if positional and listed:
        values[positional.name] = listed
    for flag in flags.values():
        if flag.required and flag.name not in values:
            raise UserError(
                f"{flag.metadata['help']}: name at least one" if flag is positional else f"--{flag.name} is required"
            )
    return config_class(**values)


def help_text(config_class: type[Config], about: str) -> str:
    """Every flag with its type, its default as one would write it, and its meaning."""
    lines = [about, ""]
    flags = config_class.flags()
    for flag in flags:
        if flag.metadata.get("positional"):
            lines += [f"  {flag.name.upper()} ...", f"      {flag.metadata['help']}", ""]
    lines += ["Flags, as --name value or --name=value:", ""]
    for flag in flags:
        if not flag.metadata.get("positional"):
            default = "required" if flag.required else f"default: {_spelled(flag.default)}"
            lines += [f"  --{flag.name}  ({type_name(flag.type)}; {default})", f"      {flag.metadata['help']}"]
    return "\n".join(lines)


def _spelled(value: object) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, list):
        return ",".join(value) or "empty"
    return "none" if value is None else str(value)


def _positional(flags: dict[str, Flag]) -> Flag | None:
    """The flag that takes the arguments without a name, if the configuration has one."""
    return next((flag for flag in flags.values() if flag.metadata.get("positional")), None)


def _split(arguments: Sequence[str], flags: dict[str, Flag]) -> tuple[dict[str, str], list[str]]:
    """Flag names to raw values, and the positional arguments."""
    aliases = {alias: flag.name for flag in flags.values() for alias in flag.metadata.get("aliases", ())}
    raw, listed, waiting = {}, [], list(arguments)
    positional = _positional(flags)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument == "--":
            if positional is None:
                raise UserError(f"unexpected argument {argument!r}; write --name value")
            listed.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        name = aliases.get(name, name)
        if name not in flags or flags[name] is positional:
            raise UserError(f"unknown flag --{name}{closest(name, [key for key in flags if flags[key] != positional])}")
        if name in raw:
            raise UserError(f"the flag --{name} is given twice")
        if not equals:
            is_bool = flags[name].type is bool
            # Beside positional arguments a bare switch takes no value but True or False.
            takes_next = waiting and not waiting[0].startswith("--")
            if takes_next and is_bool and positional and waiting[0].lower() not in (*_TRUE, *_FALSE):
                takes_next = False
            if takes_next:
                value = waiting.pop(0)
            elif is_bool:
                value = "True"
            else:
                raise UserError(f"the flag --{name} needs a value: {type_name(flags[name].type)}")
        raw[name] = value
    return raw, listed


def _convert(flag: Flag, text: str) -> object:
    """A flag's text as its declared type; raises ``UserError`` that says what would be right."""
    expected = flag.type
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        options = typing.get_args(expected)
        if types.NoneType in options and text.lower() in _NONE:
            return None
        if str in options and int in options:
            return int(text) if text.lstrip("-").isdecimal() and text.count("-") < 2 else text
        (expected,) = [option for option in options if option is not types.NoneType]
    try:
        if expected is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        if expected in (int, float):
            return expected(text)
        if typing.get_origin(expected) is list:
            return _list(text)
    except (ValueError, KeyError, SyntaxError):
        raise UserError(f"--{flag.name} must be {type_name(flag.type)}, not {text!r}") from None
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
    # The commas inside (a,b), [a,b] and {1,2} belong to an expression.
    entries, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            entries.append("")
        else:
            entries[-1] += character
    return [entry.strip() for entry in entries if entry.strip()]
