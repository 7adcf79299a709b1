"""The configuration of an adapter: a method, the modules it is put on, and the hyperparameters its class declares.

The method classes (``mtl_lora.adapter.layer.methods``) need torch and are imported only when a configuration is made.
"""

import dataclasses
import math
import typing
from collections.abc import Sequence

from mtl_lora.config import Config, Flag, closest
from mtl_lora.errors import UserError, within

if typing.TYPE_CHECKING:
    from mtl_lora.adapter.layer import AdapterLayer

# Files of format 1 hold all of these hyperparameters, whatever the method, at the top level among the other fields.
_FORMAT_1 = ("num_B", "temperature", "lambda_shape", "num_experts", "task_embedding_dim")

SHARED_METHOD = "lora"  # the method of the layers that ``task_modules`` does not name, which all tasks share


@dataclasses.dataclass
class Hyperparameters(Config):
    """The settings of one method in addition to rank, alpha and dropout, declared as fields with ``flag``.

    A field that is added later declares ``before=value``: the value to use for earlier files, which lack the field.
    """


@dataclasses.dataclass
class AdapterConfig(Config):
    """Which method is put on which linear layers, with which hyperparameters.

    method: its name, such as ``mtl_lora`` (arXiv 2410.09437) or ``lora``.
    rank, alpha: r and alpha; the update is scaled by alpha / r, or alpha / sqrt(r) with use_rslora (arXiv 2312.03732).
    dropout: probability of dropping an element of the low-rank path's input; 0 is off.
    target_modules: a list of names, name endings or regular expressions that must match a whole name, each of which
        must find a linear layer; or one string: an expression, or ``all-linear`` for every linear layer that can carry
        an adapter of the method, except the output head.
    tasks: the names of the tasks, in id order.
    modules_to_save: modules that are trained and saved whole with the adapter. The method ``none`` trains only these
        and ignores target_modules, dropout, rank and alpha.
    task_modules: names or name endings of the adapted layers in which tasks differ; the other adapted layers are LoRA
        layers, shared by all tasks. Empty: tasks differ in all.
    hyperparameters: the settings that the method's class declares; passed by name (``num_B=3``) and read as attributes
        (``config.num_B``).

    Raises ``UserError`` for an unknown method or setting, and for a value that breaks a rule, naming the setting.
    """

    method: str
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str] | str
    tasks: list[str]
    use_rslora: bool = dataclasses.field(metadata={"before": False})
    modules_to_save: list[str] = dataclasses.field(metadata={"before": ()})
    task_modules: list[str] = dataclasses.field(metadata={"before": ()})
    hyperparameters: Hyperparameters

    recorded = False  # whether it was read from a file, whose adapter layers are what they are

    def __init__(
        self,
        method: str = "mtl_lora",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.05,
        target_modules: Sequence[str] | str = ("q_proj", "k_proj", "v_proj", "o_proj"),
        tasks: Sequence[str] = (),
        use_rslora: bool = False,
        modules_to_save: Sequence[str] = (),
        task_modules: Sequence[str] = (),
        hyperparameters: Hyperparameters | dict | None = None,
        **own,
    ):
        layer = _layer_class(method)
        self.method, self.rank, self.alpha, self.dropout = layer.method, rank, alpha, dropout
        self.target_modules, self.tasks = target_modules, tasks
        if not isinstance(target_modules, str) and [*target_modules] == ["all-linear"]:
            self.target_modules = "all-linear"
        if not layer.adapts:
            self.target_modules, self.dropout, task_modules = [], 0.0, ()
        self.use_rslora, self.modules_to_save, self.task_modules = use_rslora, modules_to_save, task_modules
        if isinstance(hyperparameters, Hyperparameters):
            hyperparameters = hyperparameters.to_json()
        values = {**(hyperparameters or {}), **own}
        declared = [flag.name for flag in layer.Hyperparameters.flags()]
        if unknown := [name for name in values if name not in declared]:
            known = [field.name for field in dataclasses.fields(self)][:-1] + declared
            raise UserError(f"{unknown[0]} is not a setting of the method {layer.method}{closest(unknown[0], known)}")
        self.hyperparameters = layer.Hyperparameters(**values)
        self.__post_init__()

    def __getattr__(self, name: str):
        # Called only for names that are not attributes; while copy or pickle builds an instance, it has none at all.
        own = self.__dict__.get("hyperparameters")
        if own is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(own, name)

    def validate(self) -> None:
        self.require("rank", "at least 1", self.rank >= 1)
        self.require("alpha", "greater than 0", self.alpha > 0)
        self.require("dropout", "at least 0 and below 1", 0 <= self.dropout < 1)
        self.require("tasks", "a list of different names", len(set(self.tasks)) == len(self.tasks))
        layer = _layer_class(self.method)
        found = bool(self.target_modules) or not layer.adapts
        self.require("target_modules", "at least one name of a linear layer", found)
        alone = isinstance(self.target_modules, str) or "all-linear" not in self.target_modules
        self.require("target_modules", "names and expressions, or all-linear alone", alone)
        rule = f"the names of the tasks in id order, at least one, since {layer.title} has weights for each task"
        self.require("tasks", rule, bool(self.tasks) or not (layer.needs_task_ids or layer.only_streams))
        self.require("modules_to_save", "names that are not empty", "" not in self.modules_to_save)
        layer.check_config(self)

    @property
    def scale(self) -> float:
        """The factor on the low-rank update: alpha / r, or alpha / sqrt(r) with use_rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @staticmethod
    def is_at(name: str, entries: Sequence[str]) -> bool:
        """Whether one of the entries is the module name ``name`` or an ending of it."""
        return any(f".{name}".endswith(f".{entry}") for entry in entries)

    def at(self, name: str) -> "AdapterConfig":
        """Return the configuration of the adapter layer on the module ``name``: this one, or that of a shared layer.

        See ``task_modules``.
        """
        if not self.task_modules or self.is_at(name, self.task_modules):
            return self
        shared = (self.rank, self.alpha, self.dropout, self.target_modules, self.tasks, self.use_rslora)
        return AdapterConfig(SHARED_METHOD, *shared, modules_to_save=self.modules_to_save)

    @classmethod
    def from_json(cls, value: object, source: str = "the adapter configuration", complete: bool = True) -> typing.Self:
        """Build a configuration from a JSON object of this format or of format 1; errors name ``source`` and the key.

        Every field without a ``before`` must be present: if a lost alpha took its default, every output would change.
        """
        if not isinstance(value, dict) or "method" not in value:
            return super().from_json(value, source, complete)
        with within(source):
            declared = _layer_class(value["method"]).Hyperparameters
        if "hyperparameters" not in value:
            names = {flag.name for flag in declared.flags()}
            own = {name: entry for name, entry in value.items() if name in names.intersection(_FORMAT_1)}
            value = {key: entry for key, entry in value.items() if key not in _FORMAT_1} | {"hyperparameters": own}
        own = declared.from_json(value["hyperparameters"], f"{source}, 'hyperparameters'", complete)
        config = super().from_json({**value, "hyperparameters": own}, source, complete)
        config.recorded = True
        return config


def hyperparameter_flags() -> list[Flag]:
    """Return the hyperparameters of all methods as flags, each once; its help names the methods that use it.

    Raises ``TypeError`` if two methods declare the same name with different types or defaults.
    """
    from mtl_lora.adapter.layer import methods

    flags: dict[str, Flag] = {}
    titles: dict[str, dict[str, list[str]]] = {}  # of the methods, by flag name and help text
    for layer in methods().values():
        for flag in layer.Hyperparameters.flags():
            first = flags.setdefault(flag.name, flag)
            if (flag.type, flag.default) != (first.type, first.default):
                raise TypeError(f"{layer.title} declares {flag.name} with another type or default than other methods")
            titles.setdefault(flag.name, {}).setdefault(flag.metadata["help"], []).append(layer.title)
    about = {name: "; ".join(f"{', '.join(who)}: {text}" for text, who in by.items()) for name, by in titles.items()}
    return [dataclasses.replace(flag, metadata={**flag.metadata, "help": about[name]}) for name, flag in flags.items()]


def _layer_class(method: object) -> "type[AdapterLayer]":
    from mtl_lora.adapter.layer import layer_class

    return layer_class(method)
