"""Configurations as flat dataclasses: typed, validated, and unchanged by a round trip through JSON."""

import dataclasses
import difflib
import functools
import types
import typing

from mtl_lora.errors import UserError, within

_MOST_NAMED = 24  # an error lists the known names only if there are no more than this
DTYPES = ("auto", "bf16", "fp16", "fp32", "fp64")
REQUIRED = dataclasses.MISSING


def flag(default, help: str, **metadata):
    """Return a dataclass field with its one-line help text (meaning, unit, off value).

    default: ``REQUIRED`` for a flag without a default. metadata:

    - ``affects``: what the flag can change: ``weights``, ``answers``, ``nothing``, or ``content`` for a path of which
      the content matters, not the name; by default the configuration's ``affects``
    - ``min``, ``max``, ``above``, ``choices``: the allowed values
    - ``positional=True``: the flag is the list of positional arguments
    - ``aliases``: other names, such as earlier ones
    - ``group``: a heading in the help text, above this flag and those that follow
    - ``before``: the value for files that were written before the field existed
    - ``by_outcome=True``: a run may be resumed with another value, because only the flag's effect is compared
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def is_number(value: object, whole: bool = False) -> bool:
    """Return whether a value from a file is a usable number: an int that fits in a tensor or, unless it must be
    ``whole``, a float whose square is finite. A bool is not a number."""
    return (type(value) is int and abs(value) < 2**63) or (not whole and type(value) is float and abs(value) < 1e100)


def _matches(value: object, expected: object) -> bool:
    """Return whether ``value`` has the declared type; a bool is not a number, an int is a valid float."""
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in typing.get_args(expected))
    if origin is list:
        (element,) = typing.get_args(expected)
        return isinstance(value, list) and all(_matches(entry, element) for entry in value)
    if expected in (float, int):
        return is_number(value, whole=expected is int)
    return type(value) is expected or (isinstance(value, Config) and isinstance(value, expected))


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    dict: "an object",
    types.NoneType: "none",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings", dict: "objects"}


def type_name(expected: object) -> str:
    """Return a declared type in words, for messages and help texts."""
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(option) for option in typing.get_args(expected))
    if origin is list:
        (element,) = typing.get_args(expected)
        return f"a list of {_PLURALS[element]}"
    return _NAMES.get(expected, str(expected))


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a configuration; ``default`` is ``REQUIRED`` for a flag without a default."""

    name: str
    type: object
    default: object
    metadata: dict

    @property
    def required(self) -> bool:
        """Whether the flag must be passed."""
        return self.default is REQUIRED

    @property
    def names(self) -> tuple[str, ...]:
        """The flag's name and its aliases."""
        return (self.name, *self.metadata.get("aliases", ()))


class Config:
    """Base of every configuration: types are checked on construction, ``validate`` adds the rules between fields."""

    affects = "nothing"  # what a field can change if its metadata does not say
    idle = {}  # noqa: RUF012 - flags without effect here, and why: they are refused and left out of the help

    @classmethod
    @functools.cache
    def flags(cls) -> list[Flag]:
        """Return the fields that can be written as flags, with types and defaults, in order. A field that a subclass
        declares again inherits the metadata that it does not give itself."""
        hints, found = typing.get_type_hints(cls), []
        metadata = {field.name: {"help": ""} for field in dataclasses.fields(cls)}
        for base in reversed(cls.__mro__):
            for field in vars(base).get("__dataclass_fields__", {}).values():
                metadata[field.name] |= field.metadata
        for field in dataclasses.fields(cls):
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            found.append(Flag(field.name, hints[field.name], default, metadata[field.name]))
        return found

    @classmethod
    def names_affecting(cls, what: str) -> set[str]:
        """Return the names of the flags that affect ``what``: weights, answers, content or nothing."""
        return {flag.name for flag in cls.flags() if flag.metadata.get("affects", cls.affects) == what}

    def contents(self) -> dict[str, str | None]:
        """Return hashes of the files named by flags whose content affects the result, except data sets, tasks and the
        base model; None for a missing file."""
        return {}

    def __post_init__(self):
        for flag in self.flags():
            value = getattr(self, flag.name)
            if isinstance(value, tuple):
                value = list(value)
                object.__setattr__(self, flag.name, value)
            if not _matches(value, flag.type):
                raise UserError(f"{flag.name} must be {type_name(flag.type)}, not {value!r}", flag.name)
            if flag.name in self.idle and value != flag.default:
                raise UserError(f"--{flag.name} {self.idle[flag.name]}; leave it out")
            self._check_rules(flag.name, value, flag.metadata)
        self.validate()

    def _check_rules(self, name: str, value: object, rules: dict) -> None:
        if value is None or (isinstance(value, str) and "choices" not in rules):
            return
        if "min" in rules:
            self.require(name, f"at least {rules['min']}", value >= rules["min"])
        if "max" in rules:
            self.require(name, f"at most {rules['max']}", value <= rules["max"])
        if "above" in rules:
            self.require(name, f"greater than {rules['above']}", value > rules["above"])
        if "choices" in rules:
            self.require(name, f"one of {', '.join(rules['choices'])}", value in rules["choices"])

    def validate(self) -> None:
        """Raise ``UserError`` for values that do not fit together; overridden by each configuration."""

    def require(self, name: str, rule: str, holds: bool) -> None:
        """Raise ``UserError`` that names field, rule and value unless ``holds``."""
        if not holds:
            raise UserError(f"{name} must be {rule}, not {getattr(self, name)!r}", name)

    def to_json(self) -> dict:
        """Return a JSON object that ``from_json`` reads back as an equal configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def named(cls, values: dict, source: str) -> dict:
        """Return ``values`` under the flags' current names; raises ``UserError`` naming ``source`` for an unknown
        key."""
        names = {name: flag.name for flag in cls.flags() for name in flag.names}
        for key in values:
            if key not in names:
                raise UserError(f"{source} has the unknown key {key!r}{closest(key, list(names))}")
            if both := [other for other in values if other != key and names.get(other) == names[key]]:
                raise UserError(f"{source} has {key!r} and {both[0]!r}, which are the same flag; remove one")
        return {names[key]: value for key, value in values.items()}

    @classmethod
    def from_json(cls, value: object, source: str = "the configuration", complete: bool = False) -> typing.Self:
        """Build a configuration from a JSON object; raises ``UserError`` naming ``source`` and the key that is wrong.

        complete: require every field except those with a ``before``, so that none silently takes its default.
        """
        if not isinstance(value, dict):
            raise UserError(f"{source} must be a JSON object, not {type(value).__name__}")
        flags, value = {flag.name: flag for flag in cls.flags()}, cls.named(value, source)
        for name in (name for name in flags if name not in value):
            if "before" in flags[name].metadata:
                value = {**value, name: flags[name].metadata["before"]}
            elif complete or flags[name].required:
                raise UserError(f"{source} lacks the key {name!r}")
        with within(source):
            return cls(**value)


# The names of other libraries (transformers' Trainer, TRL, PEFT) -> ours, of which the first known one is suggested.
_ELSEWHERE = {
    "per_device_train_batch_size": ["batch_size"],
    "per_device_eval_batch_size": ["batch_size"],
    "train_batch_size": ["batch_size"],
    "num_train_epochs": ["num_epochs"],
    "epochs": ["num_epochs"],
    "lr": ["learning_rate"],
    "save_steps": ["save_step"],
    "gradient_checkpointing": ["use_gradient_checkpointing"],
    "resume": ["resume_from_checkpoint"],
    "bf16": ["dtype"],
    "fp16": ["dtype"],
    "model": ["base_model"],
    "model_name": ["base_model"],
    "model_name_or_path": ["base_model"],
    "max_length": ["cutoff_len"],
    "max_seq_length": ["cutoff_len"],
    "dataset_name": ["data_path"],
    "train_file": ["data_path"],
    "r": ["lora_r", "rank"],
    "lora_rank": ["lora_r"],
    "lora_alpha": ["alpha"],
    "lora_dropout": ["dropout"],
    "use_dora": ["adapter_name"],
    "peft_type": ["adapter_name", "method"],
}


def closest(word: str, known: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for a typing error or the name of another library, or a list of the known words
    unless it is long.

    Each part of the word must be close to a part of the known word: eval_steps is not a misspelled max_steps.
    """
    plain = {each.casefold().replace("-", "_"): each for each in known}
    word = word.casefold().replace("-", "_")
    for match in [plain[name] for name in _ELSEWHERE.get(word, ()) if name in plain]:
        return f" (did you mean {match!r}?)"

    def alike(other: str) -> bool:
        return all(difflib.get_close_matches(part, other.split("_"), n=1) for part in word.split("_"))

    for match in filter(alike, difflib.get_close_matches(word, list(plain))):
        return f" (did you mean {plain[match]!r}?)"
    return f"; known are {', '.join(known)}" if 0 < len(known) <= _MOST_NAMED else ""
