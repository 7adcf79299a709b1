"""Configuration as flat dataclasses: typed, validated, and the same after a trip through JSON."""

import dataclasses
import difflib
import math
import types
import typing

from mtl_lora.errors import UserError

# The table of methods: name -> module:class. A new method is one file and one line here.
METHODS = {
    "lora": "mtl_lora.adapter.lora:LoraLayer",
    "dora": "mtl_lora.adapter.dora:DoraLayer",
    "multilora": "mtl_lora.adapter.multilora:MultiLoraLayer",
    "moelora": "mtl_lora.adapter.moelora:MoeLoraLayer",
    "mtl_lora": "mtl_lora.adapter.mtl_lora:MtlLoraLayer",
}
DTYPES = ("auto", "bf16", "fp32", "fp64")
LAMBDA_SHAPES = ("full", "diagonal")
METHOD_ALIASES = {"mlora": "mtl_lora"}


REQUIRED = dataclasses.MISSING


def flag(default, help: str, **metadata):
    """A dataclass field with its one-line documentation (meaning, unit, off value).

    default: ``REQUIRED`` for a flag without one. metadata: ``affects``, what the flag can change: ``weights`` or
    ``answers`` (the default of a configuration is its ``affects``), ``content`` for a path whose content decides, or
    ``nothing``; ``positional=True`` for the list of the arguments without a name; ``aliases``, earlier names.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _matches(value: object, expected: object) -> bool:
    """Whether ``value`` has the declared type; a bool is no number, an int is a valid float."""
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in typing.get_args(expected))
    if origin is list:
        (element,) = typing.get_args(expected)
        return isinstance(value, list) and all(_matches(entry, element) for entry in value)
    if expected is float:
        return type(value) in (int, float) and math.isfinite(value)
    if expected is types.NoneType:
        return value is None
    return type(value) is expected


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
    """A declared type in words, for messages and help texts."""
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(option) for option in typing.get_args(expected))
    if origin is list:
        (element,) = typing.get_args(expected)
        return f"a list of {_PLURALS[element]}"
    return _NAMES.get(expected, str(expected))


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a configuration: ``default`` is ``REQUIRED`` where there is none."""

    name: str
    type: object
    default: object
    metadata: dict

    @property
    def required(self) -> bool:
        """Whether the flag must be passed."""
        return self.default is REQUIRED


class Config:
    """Base of every configuration: types are checked on construction, ``validate`` adds the rules between fields."""

    affects = "nothing"  # what a field changes that does not say so itself

    @classmethod
    def flags(cls) -> list[Flag]:
        """The fields that can be written as flags, with types and defaults, in order."""
        hints = typing.get_type_hints(cls)
        found = []
        for field in dataclasses.fields(cls):
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            found.append(Flag(field.name, hints[field.name], default, {"help": "", **field.metadata}))
        return found

    @classmethod
    def names_affecting(cls, what: str) -> set[str]:
        """The names of the flags that can change ``what``: weights, answers, content or nothing."""
        return {flag.name for flag in cls.flags() if flag.metadata.get("affects", cls.affects) == what}

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = list(value)
                object.__setattr__(self, field.name, value)
            if not _matches(value, hints[field.name]):
                raise UserError(f"{field.name} must be {type_name(hints[field.name])}, not {value!r}", field.name)
        self.validate()

    def validate(self) -> None:
        """Raise ``UserError`` for values that do not fit; overridden by each configuration."""

    def require(self, name: str, rule: str, holds: bool) -> None:
        """Raise ``UserError`` naming field, rule and value unless ``holds``."""
        if not holds:
            raise UserError(f"{name} must be {rule}, not {getattr(self, name)!r}", name)

    def to_json(self) -> dict:
        """A JSON object that ``from_json`` reads back to an equal configuration."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object, source: str = "the configuration", complete: bool = False) -> typing.Self:
        """Build from a JSON object; an unknown key is an error that names it and ``source``.

        complete: every field must be there, so that none silently takes its default.
        """
        if not isinstance(value, dict):
            raise UserError(f"{source} must be a JSON object, not {type(value).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise UserError(f"{source} has the unknown key {key!r}{closest(key, known)}")
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if (required or complete) and field.name not in value:
                raise UserError(f"{source} lacks the key {field.name!r}")
        try:
            return cls(**value)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def closest(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)``, or the whole list of what is known."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else f"; known are {', '.join(known)}"


@dataclasses.dataclass
class AdapterConfig(Config):
    """What is put on which linear layers; the methods' papers stand in their files.

    rank r and alpha give the scale alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732). tasks: names in
    id order. target_modules: names or name endings of linear layers; or, as one string, a regular expression that
    the whole name must match, or ``all-linear`` for every one but the output head. num_B: MTL-LoRA's up-projections,
    MultiLoRA's parallel modules. temperature and lambda_shape (a ``full`` r x r or a ``diagonal`` Lambda_t) are
    MTL-LoRA's; num_experts and task_embedding_dim are MoELoRA's.
    """

    method: str = "mtl_lora"
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: list[str] | str = dataclasses.field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    tasks: list[str] = dataclasses.field(default_factory=list)
    num_B: int = 3
    temperature: float = 0.1
    lambda_shape: str = "full"
    num_experts: int = 8
    task_embedding_dim: int = 64
    use_rslora: bool = False

    def __post_init__(self):
        if isinstance(self.method, str):
            self.method = METHOD_ALIASES.get(self.method, self.method)
        super().__post_init__()

    def validate(self) -> None:
        self.require("method", f"one of {', '.join(METHODS)}", self.method in METHODS)
        self.require("rank", "at least 1", self.rank >= 1)
        self.require("alpha", "greater than 0", self.alpha > 0)
        self.require("dropout", "at least 0 and below 1", 0 <= self.dropout < 1)
        self.require("temperature", "greater than 0", self.temperature > 0)
        self.require("num_B", "at least 1", self.num_B >= 1)
        self.require("target_modules", "at least one name of a linear layer", bool(self.target_modules))
        self.require("tasks", "a list of different names", len(set(self.tasks)) == len(self.tasks))
        self.require("lambda_shape", f"one of {', '.join(LAMBDA_SHAPES)}", self.lambda_shape in LAMBDA_SHAPES)
        self.require("num_experts", "at least 1", self.num_experts >= 1)
        self.require("task_embedding_dim", "at least 1", self.task_embedding_dim >= 1)
        if self.method in ("mtl_lora", "moelora"):
            self.require("tasks", f"the task names in id order, at least one, for {self.method}", bool(self.tasks))
        if self.method == "moelora":
            rule = f"a multiple of the {self.num_experts} experts (num_experts) for moelora"
            self.require("rank", rule, self.rank % self.num_experts == 0)

    @property
    def scale(self) -> float:
        """The factor on the low-rank product: alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
