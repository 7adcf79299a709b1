"""A grid file: which experiments a study has, with which flags, read and checked key by key."""

import dataclasses
import re
from pathlib import Path

from mtl_lora import files
from mtl_lora.config import Config, closest
from mtl_lora.errors import UserError
from mtl_lora.evaluate.settings import EvalConfig
from mtl_lora.tasks import TaskSet
from mtl_lora.train.settings import TrainConfig

# Flags that the study sets itself, and those without which runs of one table would not be comparable.
OWN_TRAIN = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir", "check", "local_rank")
SHARED_TRAIN = ("base_model", "data_path", "tasks_file", "template", "cutoff_len")
OWN_EVALUATE = ("checkpoint", "peft", "output_dir", "name", "limit", "overwrite", "check", "local_rank")
FROM_TRAIN = ("base_model", "tasks_file", "template", "cutoff_len")
SHARED_EVALUATE = ("data_dir", "mode", "max_new_tokens", "num_beams")


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

    def train_flags(self, experiment: Experiment) -> dict:
        """The flags of finetune.py that the grid gives an experiment."""
        return {**self.grid.train, **experiment.train}

    def evaluate_flags(self, experiment: Experiment) -> dict:
        """The flags of commonsense_evaluate.py that the grid gives an experiment."""
        return {**self.grid.evaluate, **experiment.evaluate}


def read_grid(path: str | Path) -> Study:
    """Read and check a grid file; raises ``UserError`` naming the file, the experiment and the key that is wrong."""
    source = f"the grid {path}"
    grid = Grid.from_json(files.read_json(path, "the grid"), source)
    experiments = tuple(
        Experiment.from_json(value, f"{source}, experiment {value.get('name', index)!r}")
        for index, value in enumerate(grid.experiments)
    )
    for field in ("name", "slug"):
        values = [getattr(experiment, field) for experiment in experiments]
        if repeated := next((value for value in values if values.count(value) > 1), None):
            raise UserError(f"{source} has two experiments with the {field} {repeated!r}; names must differ")
    search = None if grid.search is None else Search.from_json(grid.search, f"{source}, search")
    _check_flags(grid, experiments, search, source)
    tasks = TrainConfig.from_json(grid.train, f"{source}, train").task_set()
    study = Study(Path(path), grid, experiments, search, tasks)
    _check_names(study, source)
    _check_search(study, source)
    return study


def _check_flags(grid: Grid, experiments: tuple[Experiment, ...], search: Search | None, source: str) -> None:
    """Every flag by itself: whether the script has it, and whether a grid, experiment or search may set it."""
    _check_keys(grid.train, TrainConfig, OWN_TRAIN, (), f"{source}, train")
    _check_keys(grid.evaluate, EvalConfig, OWN_EVALUATE, (), f"{source}, evaluate")
    for experiment in experiments:
        where = f"{source}, experiment {experiment.name!r}"
        _check_keys(experiment.train or {}, TrainConfig, OWN_TRAIN, SHARED_TRAIN, f"{where}, train")
        _check_keys(experiment.evaluate, EvalConfig, OWN_EVALUATE, SHARED_EVALUATE, f"{where}, evaluate")
    if search:
        _check_keys({search.flag: 0, **search.train}, TrainConfig, OWN_TRAIN, SHARED_TRAIN, f"{source}, search")


def _check_keys(flags: dict, config: type[Config], own: tuple, shared: tuple, source: str) -> None:
    known = [field.name for field in dataclasses.fields(config)]
    for key in flags:
        if key not in known:
            raise UserError(f"{source} has the unknown flag {key!r}{closest(key, known)}")
        if config is EvalConfig and key in FROM_TRAIN:
            raise UserError(f"{source}: {key} is said once, in the grid's train; leave it out here")
        if key == "limit":
            raise UserError(f"{source}: limit takes the first questions; use the grid's test_records, a fixed sample")
        if key in own:
            raise UserError(f"{source}: {key} is set by the study itself; leave it out")
        if key in shared:
            raise UserError(f"{source}: {key} must be the same for all experiments; set it in the grid's own flags")


def _check_names(study: Study, source: str) -> None:
    """Names of other experiments and of tasks, and one experiment of single tasks in a group."""
    if study.grid.baseline:
        study.experiment(study.grid.baseline)
    alone = set()
    for experiment in study.experiments:
        where = f"{source}, experiment {experiment.name!r}"
        study.baseline(experiment)
        for task in [*experiment.only_tasks, *study.evaluate_flags(experiment).get("tasks", [])]:
            if task not in study.tasks.names:
                raise UserError(f"{where}: there is no task {task!r}; the tasks are {study.tasks.describe()}")
        if experiment.alone:
            if experiment.group in alone:
                raise UserError(f"{where}: the group {experiment.group!r} has an experiment with alone already")
            if "tasks" in experiment.evaluate:
                raise UserError(f"{where}: alone asks each training its own task; leave out evaluate's tasks")
            alone.add(experiment.group)


def _check_search(study: Study, source: str) -> None:
    for experiment in study.experiments:
        if not isinstance(experiment.search, str):
            continue
        where = f"{source}, experiment {experiment.name!r}"
        if study.search is None:
            raise UserError(f"{where}: search names {experiment.search!r}, and the grid has no search")
        if study.searched_as(study.experiment(experiment.search)) != study.experiment(experiment.search):
            raise UserError(f"{where}: search names {experiment.search!r}, for which nothing is searched")
    if study.search is None:
        return
    evaluated = study.grid.evaluate.get("data_dir", EvalConfig(base_model="none").data_dir)
    if Path(study.search.data_dir).resolve() == Path(evaluated).resolve():
        raise UserError(
            f"{source}, search: data_dir is {study.search.data_dir}, the test sets themselves; choose by a development "
            "set"
        )
