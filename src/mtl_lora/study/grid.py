"""What a grid file holds: experiments with the flags of their two scripts, seeds, samples, a search."""

import dataclasses
import re
from pathlib import Path

from mtl_lora.config import Config, closest
from mtl_lora.errors import UserError
from mtl_lora.language.tasks import TaskSet


@dataclasses.dataclass
class Search(Config):
    """How one training flag's value is chosen for each experiment: short trainings, scored on a development set.

    flag, values: what is tried. data_dir: the development set; records: most questions of each task, 0 all. train:
    flags of the short trainings. seed: of every candidate.
    """

    values: list[float]
    data_dir: str
    flag: str = "learning_rate"
    train: dict = dataclasses.field(default_factory=dict)
    records: int = 0
    seed: int = 0

    def validate(self) -> None:
        self.require("values", "at least two different numbers", len(set(self.values)) == len(self.values) > 1)
        for name in ("records", "seed"):
            self.require(name, "at least 0", getattr(self, name) >= 0)


@dataclasses.dataclass
class Experiment(Config):
    """One row of the table: a recipe over all seeds; ``train`` null is the base model alone.

    group: the table it belongs to. only_tasks: trained on these tasks' records. alone: a training for every task by
    itself, scored on that task. search: False keeps the flag as it is; a name takes that experiment's choice.
    baseline: the experiment it is compared with, instead of the grid's. seeds: instead of the grid's.
    """

    name: str
    train: dict | None
    evaluate: dict = dataclasses.field(default_factory=dict)
    group: str = "main"
    baseline: str = ""
    only_tasks: list[str] = dataclasses.field(default_factory=list)
    alone: bool = False
    search: bool | str = True
    seeds: list[int] = dataclasses.field(default_factory=list)

    def validate(self) -> None:
        self.require("name", "a name with a letter or digit", bool(self.slug))
        self.require("only_tasks", "different names", len(set(self.only_tasks)) == len(self.only_tasks))
        _check_seeds(self)
        for key in ("only_tasks", "alone", "seeds"):
            if self.train is None and getattr(self, key):
                raise UserError(f"{key} needs a training, and train is null")

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_.")


@dataclasses.dataclass
class Grid(Config):
    """A whole study. ``train`` and ``evaluate`` are the flags that all experiments share.

    notes: what a reader of the table must know. launcher: what starts finetune.py and commonsense_evaluate.py.
    prepare: the command that makes the data, for messages. train_records, test_records: most records of each task,
    a fixed sample for all experiments; 0 takes all.
    """

    name: str
    about: str
    seeds: list[int]
    train: dict
    evaluate: dict
    experiments: list[dict]
    notes: list[str] = dataclasses.field(default_factory=list)
    launcher: str = "python"
    prepare: str = ""
    baseline: str = ""
    train_records: int = 0
    test_records: int = 0
    search: dict | None = None

    def validate(self) -> None:
        self.require("name", "letters, digits, '_', '-' or '.'", bool(re.fullmatch(r"\w[\w.\-]*", self.name)))
        self.require("seeds", "at least one whole number", bool(self.seeds))
        self.require("launcher", "a command such as python or torchrun --nproc_per_node 8", bool(self.launcher.strip()))
        self.require("experiments", "at least one experiment", bool(self.experiments))
        _check_seeds(self)
        for name in ("train_records", "test_records"):
            self.require(name, "at least 0", getattr(self, name) >= 0)


def _check_seeds(config: "Grid | Experiment") -> None:
    different = len(set(config.seeds)) == len(config.seeds)
    config.require("seeds", "different whole numbers from 0", different and all(seed >= 0 for seed in config.seeds))


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid file that was read and checked: ``grid`` as in the file, its experiments, search and tasks."""

    path: Path
    grid: Grid
    experiments: tuple[Experiment, ...]
    search: Search | None
    tasks: TaskSet

    def experiment(self, name: str) -> Experiment:
        """An experiment by name; raises ``UserError`` that lists those there are."""
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        raise UserError(f"the grid {self.path} has no experiment {name!r}{closest(name, self.names)}")

    @property
    def names(self) -> list[str]:
        """Names of the experiments, in table order."""
        return [experiment.name for experiment in self.experiments]

    def seeds(self, experiment: Experiment) -> list[int | None]:
        """The seeds of an experiment; [None] for the base model alone, which has nothing to draw."""
        return [None] if experiment.train is None else experiment.seeds or self.grid.seeds

    def baseline(self, experiment: Experiment) -> Experiment | None:
        """The experiment that this one is compared with."""
        name = experiment.baseline or self.grid.baseline
        return self.experiment(name) if name and name != experiment.name else None

    def searched_as(self, experiment: Experiment) -> Experiment | None:
        """The experiment whose search decides the flag of this one; None if nothing is searched."""
        if self.search is None or experiment.train is None or experiment.search is False:
            return None
        if isinstance(experiment.search, str):
            return self.experiment(experiment.search)
        return None if self.search.flag in experiment.train else experiment
