"""The command line of all commands: ``mtl-lora train | evaluate | predict | export | report | study | features |
prepare``.

A command's flags are the fields of its configuration dataclass (see ``mtl_lora.config.flag``), written ``--name value``
or ``--name=value``; ``--name`` alone means True. Every argument is checked before any work starts.
"""

import ast
import dataclasses
import importlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mtl_lora.artifacts import RESULTS
from mtl_lora.config import Config, Flag, closest, type_name
from mtl_lora.errors import UserError, check_environment, user_errors_to_exit_code
from mtl_lora.systems import SYSTEMS, check, of_checkpoint, part
from mtl_lora.version import __version__

_TRUE, _FALSE, _NONE = ("true", "1", "yes"), ("false", "0", "no"), ("none", "null", "")
_HELP = ("--help", "-h")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its function, as ``module:function``, which is imported only when it is called, a one-line help, and
    the package's optional dependencies that it needs."""

    home: str
    about: str
    extra: str = "train"


COMMANDS = {
    "train": Command(
        "mtl_lora.cli:train",
        f"fine-tune a base model on many tasks; --system: {', '.join(SYSTEMS)} (default: {next(iter(SYSTEMS))})",
    ),
    "evaluate": Command("mtl_lora.cli:evaluate", "score a checkpoint or a base model on test sets"),
    "predict": Command("mtl_lora.cli:predict", "answer the examples of a file with a checkpoint"),
    "export": Command("mtl_lora.export.__main__:main", "export to PEFT LoRA or merged models, or import an adapter"),
    "report": Command("mtl_lora.report.__main__:main", "tables, comparisons, figures and a page of results", "report"),
    "study": Command(
        "mtl_lora.study.runner:main", "train and evaluate a grid of experiments over seeds", "train,report"
    ),
    "features": Command(
        "mtl_lora.image_text.extract:main", "extract grid features of images, for --system image_text", "train,image"
    ),
    "prepare": Command("mtl_lora.cli:prepare", "download, verify and tag a data set", "data"),
}
# The data sets that can be prepared; each module has a configuration ``Prepare`` and a function ``run(config)``.
SETS = {
    "commonsense": Command("mtl_lora.language.prepare.commonsense", "the eight commonsense tasks of LLM-Adapters"),
    "textclass": Command("mtl_lora.language.prepare.textclass", "six small text-classification tasks"),
    "glue": Command("mtl_lora.nlu.prepare", "eight tasks of GLUE; all nine with --hub"),
    "image_text": Command("mtl_lora.image_text.prepare", "questions, statements and captions of pictures (open sets)"),
    "vlbart": Command("mtl_lora.image_text.vlbart", "VQAv2, GQA, NLVR2 and COCO captions of VL-Adapter's data folder"),
    "coco128": Command(
        "mtl_lora.dense.coco128", "four maps of each of 100 + 100 photographs, from COCO's panoptic labels"
    ),
    "scenes": Command("mtl_lora.dense.scenes", "rendered scenes with five exact label maps; no download"),
}


def main(arguments: Sequence[str] | None = None, **options) -> None:
    """Run one command; a user's mistake ends with a one-sentence error and exit code 2.

    options: passed on to the command's function.
    """
    arguments = at_home(sys.argv[1:] if arguments is None else arguments)
    with user_errors_to_exit_code():
        if not arguments or arguments[0] in _HELP:
            print(_overview("COMMAND", COMMANDS), "mtl-lora --version prints the version", sep="\n")
            return
        name, *rest = arguments
        if name == "--version":
            print(f"mtl-lora {__version__}")
            return
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{closest(name, list(COMMANDS))}; see mtl-lora --help")
        module, _, function = COMMANDS[name].home.partition(":")
        check_environment()
        if not sys.stderr.isatty():  # in a log file, every state of a progress bar stays
            os.environ.setdefault("TQDM_MININTERVAL", "10")
        try:
            getattr(importlib.import_module(module), function)(rest, **options)
        except ModuleNotFoundError as error:
            if (error.name or "mtl_lora").startswith("mtl_lora"):
                raise
            extra = _BRINGS.get((error.name or "").partition(".")[0], COMMANDS[name].extra)
            raise UserError(
                f"mtl-lora {name} needs the package {error.name}; in a checkout of mtl-lora: pip install '.[{extra}]'"
            ) from None


_BRINGS = {"PIL": "dense", "h5py": "image", "pooch": "data"}  # package -> the extra that brings it


def _configuration(kind: str, arguments: list[str]) -> tuple[str, Config]:
    """Return the system that ``--system`` or the checkpoint names, and the other arguments as its configuration
    ``kind``; an error about a flag that only other systems have names those systems."""
    if arguments and arguments[0] in SYSTEMS:
        raise UserError(f"unexpected argument {arguments[0]!r}; write --system {arguments[0]}")
    named, arguments = take("system", arguments)
    checkpoint, _ = take("checkpoint", arguments)
    trained = of_checkpoint(checkpoint) if checkpoint else None  # None: the code that reads it reports what is broken
    if named is not None and trained not in (None, named):
        check(named)
        raise UserError(f"{checkpoint} belongs to the system {trained}; leave out --system {named}")
    first, *rest = SYSTEMS
    system = trained or first if named is None else named
    wanted = getattr(part(system, "config"), kind)
    also = f"\nThe other systems have flags of their own: --system {' or '.join(rest)}, with --help."
    try:
        return system, parse(wanted, arguments, wanted.__doc__ + also * (system == first))
    except UnknownFlag as error:
        of = {each: {flag.name for flag in getattr(part(each, "config"), kind).flags()} for each in SYSTEMS}
        if not (others := [each for each in SYSTEMS if error.field in of[each]]):
            raise
        found = f"--{error.field} is a flag of --system {' and '.join(others)}, not of {system}"
        if checkpoint is not None:
            raise UserError(f"{found}, the system of the checkpoint; leave the flag out") from None
        raise UserError(f"{found}; pass --system {' or '.join(others)}") from None


def train(arguments: list[str]) -> None:
    """Run ``mtl-lora train`` and ``finetune.py``."""
    _, config = _configuration("TrainConfig", arguments)
    config.check_files()
    from mtl_lora.training.distributed import destroy_process_group, prepare_process
    from mtl_lora.training.run import train as run

    prepare_process(config)
    run(config)
    destroy_process_group()


def evaluate(arguments: list[str]) -> None:
    """Run ``mtl-lora evaluate`` and ``commonsense_evaluate.py``; prints the results as tables at the end."""
    system, config = _configuration("EvalConfig", arguments)
    config.check_files()
    found = part(system, "evaluate").run(config)
    if not found:
        return
    from mtl_lora.report.__main__ import main as report

    results = [f"{config.protocols[protocol]}/{RESULTS}" for protocol in found]
    report(["table", *results])
    print()
    report(["details", *results])
    print(*config.closing_lines(found), sep="\n", end="")


def predict(arguments: list[str]) -> None:
    """Run ``mtl-lora predict``."""
    system, config = _configuration("PredictConfig", arguments)
    config.check_files()
    part(system, "evaluate").predict(config)


def prepare(arguments: Sequence[str], root: Path | None = None) -> None:
    """Run ``mtl-lora prepare SET``, which may also be written ``--set SET``.

    root: the folder to which the default output paths are relative; None: the current folder.
    """
    name, rest = take("set", list(arguments))
    if name is None and rest and not rest[0].startswith("-"):
        name, *rest = rest
    if name is None and any(argument in _HELP for argument in rest):
        print(_overview("prepare SET", SETS))
        return
    if name not in SETS:
        none = f"prepare needs the name of a data set; known are {', '.join(SETS)}"
        found = none if name is None else f"unknown data set {name!r}{closest(name, list(SETS))}"
        raise UserError(f"{found}; see mtl-lora prepare --help")
    module = importlib.import_module(SETS[name].home)
    places = [flag for flag in module.Prepare.flags() if flag.metadata.get("place")]
    defaults = {flag.name: str(root / flag.default) for flag in places} if root else {}
    module.run(parse(module.Prepare, rest, module.__doc__, defaults))


def parse_one_of(name: str, table: Mapping[str, type[Config]], arguments: Sequence[str]) -> Config | None:
    """Return the configuration of the subcommand of ``mtl-lora name`` with which the arguments begin; None if they ask
    for help, which is then printed."""
    chosen, *rest = arguments or _HELP
    if chosen in _HELP:
        print(_overview(f"{name} COMMAND", table))
        return None
    if chosen not in table:
        raise UserError(f"unknown command {chosen!r}{closest(chosen, list(table))}; see mtl-lora {name} --help")
    return parse(table[chosen], rest, table[chosen].__doc__)


def _overview(what: str, table: Mapping[str, Command | type[Config]]) -> str:
    """Return the help text of a command that has subcommands."""
    width = max(map(len, table))
    usage = f"mtl-lora {what}"
    lines = [f"usage: {usage} [--flag value ...]", ""]
    lines += [f"  {name:{width}}  {getattr(command, 'about', command.__doc__)}" for name, command in table.items()]
    return "\n".join([*lines, "", f"{usage} --help lists the flags"])


def take(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of ``--name``, or None if it is not given, and the other arguments.

    Raises ``UserError`` for a flag that is given twice.
    """
    if sum(argument.partition("=")[0] == f"--{name}" for argument in arguments) > 1:
        raise UserError(f"the flag --{name} is given twice")
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == f"--{name}":
            end = index + (1 if equals else 2)
            return value if equals else "".join(arguments[index + 1 : end]), arguments[:index] + arguments[end:]
    return None, arguments


class UnknownFlag(UserError):
    """Raised for a flag that the command does not have; ``field`` is its name."""


Parsed = typing.TypeVar("Parsed", bound=Config)


def parse(
    config_class: type[Parsed], arguments: Sequence[str], about: str, defaults: Mapping[str, object] | None = None
) -> Parsed:
    """Return the configuration that ``arguments`` (without the program's name) describe.

    about: the first lines of the help text. defaults: values that replace the dataclass's defaults. Raises
    ``UserError`` for an unknown, stray, repeated, missing or wrongly typed argument. ``--help`` prints every flag with
    its meaning, unit and default, and exits.
    """
    values, arguments = dict(defaults or {}), at_home(arguments)
    flags = {
        flag.name: dataclasses.replace(flag, default=values.get(flag.name, flag.default))
        for flag in config_class.flags()
    }
    if any(argument in _HELP for argument in arguments):
        print(help_text(list(flags.values()), about, config_class.idle))
        raise SystemExit(0)
    positional = next((flag for flag in flags.values() if flag.metadata.get("positional")), None)
    raw, listed = _split(arguments, flags, positional)
    values |= {name: _convert(flags[name], text) for name, text in raw.items()}
    if positional and listed:
        values[positional.name] = listed
    for flag in flags.values():
        if flag.required and values.get(flag.name, "") == "":
            raise UserError(
                f"name at least one of {flag.metadata['help']}" if flag is positional else f"--{flag.name} is required"
            )
    try:
        return config_class(**values)
    except UserError as error:
        flag = flags.get(error.field)
        if flag in (None, positional) or not str(error).startswith(f"{flag.name} "):
            raise
        given = {argument.partition("=")[0] for argument in arguments}
        written = next((name for name in flag.metadata.get("aliases", ()) if f"--{name}" in given), flag.name)
        raise UserError(f"--{written}{str(error).removeprefix(flag.name)}", error.field) from None


def at_home(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with a value's first ``~/`` as the home folder: behind ``=`` shells leave it as it is."""
    home = os.path.expanduser("~")
    return [re.sub(r"^(--[\w-]+=|)~(?=/)", lambda found: found[1] + home, argument) for argument in arguments]


def help_text(flags: Sequence[Flag], about: str, idle: Collection[str] = ()) -> str:
    """Return a help text with the type, default, aliases and meaning of every flag that is not idle."""
    lines = [about.strip(), ""]
    for flag in flags:
        if flag.metadata.get("positional"):
            lines += [f"  {flag.name.upper()} ...", f"      {flag.metadata['help']}", ""]
    if any(not flag.metadata.get("positional") for flag in flags):
        lines += ["Flags, written --name value or --name=value:", ""]
    for flag in flags:
        if "group" in flag.metadata:
            lines += [*[""] * (lines[-1] != ""), f"{flag.metadata['group']}:"]
        if not flag.metadata.get("positional") and flag.name not in idle:
            default = "required" if flag.required else f"default: {spelled(flag.default) or '[]'}"
            also = "".join(f", --{alias}" for alias in flag.metadata.get("aliases", ()))
            lines += [f"  --{flag.name}{also}  ({type_name(flag.type)}; {default})", f"      {flag.metadata['help']}"]
    return "\n".join(lines)


def spelled(value: object) -> str:
    """Return a flag's value as written on the command line; ``parse`` reads it back."""
    if isinstance(value, list):
        # Entries that would be split or changed when read back are quoted.
        plain = not any(set(str(entry)) & set(",[](){}'\"") for entry in value)
        return ",".join(map(str, value)) if plain else json.dumps(value, ensure_ascii=False)
    return "none" if value is None else str(value)


def _split(
    arguments: Sequence[str], flags: Mapping[str, Flag], positional: Flag | None
) -> tuple[dict[str, str], list[str]]:
    """Return the raw values by flag name, and the positional arguments."""
    aliases = {alias: flag.name for flag in flags.values() for alias in flag.metadata.get("aliases", ())}
    named = [name for name in flags if flags[name] is not positional]
    raw, listed, waiting = {}, [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument == "--":
            if positional is None:
                missing = [name for name in named if flags[name].required and name not in raw]
                written = f"--{missing[0]} {argument}" if len(missing) == 1 else "--name value"
                raise UserError(f"unexpected argument {argument!r}; write {written}")
            listed.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        name = aliases.get(name, name)
        if name not in named:
            raise UnknownFlag(f"unknown flag --{name}{closest(name, named) or '; --help lists the flags'}", name)
        if name in raw:
            raise UserError(f"the flag --{name} is given twice")
        raw[name] = value if equals else _value_after(flags[name], waiting, positional is not None)
        if not raw[name] and name in _NEVER_EMPTY:
            raise UserError(f"--{name} is empty; pass a value (is a variable of the shell unset?)")
    return raw, listed


_NEVER_EMPTY = {"base_model", "checkpoint", "data_dir", "data_path", "input", "output", "output_dir"}


def _value_after(flag: Flag, waiting: list[str], beside_positional: bool) -> str:
    """Return the value of a flag written without ``=``, taken from the arguments after it; a switch alone is True."""
    following = waiting[0] if waiting and not waiting[0].startswith("--") else None
    switch = bool in (flag.type, *typing.get_args(flag.type))
    # Before positional arguments, a switch takes only True or False as its value.
    if switch and beside_positional and following and following.lower() not in (*_TRUE, *_FALSE):
        following = None
    if following is not None:
        return waiting.pop(0)
    if switch:
        return "True"
    raise UserError(f"the flag --{flag.name} needs a value: {type_name(flag.type)}")


def _convert(flag: Flag, text: str) -> object:
    """Return a flag's text as its declared type; raises ``UserError`` that names the declared type."""
    expected = flag.type
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        options = typing.get_args(expected)
        if types.NoneType in options and text.lower() in _NONE:
            return None
        if str in options and int in options:
            return int(text) if text.removeprefix("-").isdecimal() and len(text) < 20 else text
        (expected,) = [option for option in options if option is not types.NoneType]
    try:
        if expected is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        if expected in (int, float):
            return expected(text)
        if typing.get_origin(expected) is list:
            (element,) = typing.get_args(expected)
            return [element(entry) for entry in _list(text)]
    except (ValueError, KeyError, SyntaxError, TypeError):
        raise UserError(f"--{flag.name} must be {type_name(flag.type)}, not {text!r}", flag.name) from None
    return text


def _list(text: str) -> list[str]:
    """Return ``a,b`` or ``["a", "b"]`` as a list of strings."""
    text = text.strip()
    quoted = '"' in text or "'" in text
    # A regular expression such as [qv]_proj also begins with a bracket but does not end with one.
    if text.startswith("[") and (quoted or text.endswith("]")):
        if quoted:
            return [str(entry) for entry in ast.literal_eval(text)]
        text = text[1:-1]
    # Commas inside (a,b), [a,b] and {1,2} belong to a regular expression.
    entries, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            entries.append("")
        else:
            entries[-1] += character
    return [entry.strip() for entry in entries if entry.strip()]
