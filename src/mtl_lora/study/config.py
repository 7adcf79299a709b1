"""What a study is: its flags, and the grid file that describes its experiments, read and checked."""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path

from mtl_lora import files
from mtl_lora.config import Config, closest, flag
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.tasks import TaskSet

ABOUT = """Run every experiment of a grid file over its seeds, and write study.json and table.md."""
GRIDS = Path(__file__).with_name("grids")
# Flags that a study sets itself, and those that must be equal for all rows of one table.
_OWN_TRAIN = ("output_dir", "seed", "resume_from_checkpoint", "overwrite_output_dir", "check", "local_rank")
_SHARED_TRAIN = ("base_model", "data_path", "tasks_file", "template", "cutoff_len")
_OWN_EVALUATE = ("checkpoint", "peft", "output_dir", "name", "limit", "overwrite", "check", "local_rank")
_SHARED_EVALUATE = ("data_dir", "mode", "max_new_tokens", "num_beams")
# Flags of both commands: a grid gives them once, in its train.
FROM_TRAIN = ("base_model", "tasks_file", "template", "cutoff_len")


@dataclasses.dataclass
class StudyConfig(Config):
    """The flags of ``mtl-lora study``."""

    grid: str | None = flag(None, "JSON file that describes the experiments, or the name of a grid of the package")
    output_dir: str | None = flag(None, "folder for all runs, study.json and table.md; none: output/study/<grid name>")
    only: list[str] = flag([], "run these experiments alone, as a,b; empty: all")
    check: bool = flag(False, "check the grid and every job's flags, print the plan, then stop")
    report: bool = flag(False, "start nothing: write study.json and table.md of the finished runs")
    overwrite: bool = flag(
        False, "delete and repeat runs of another configuration; one whose evaluation alone differs keeps its training"
    )
    parallel: int = flag(1, "runs side by side, each with its part of the CPU threads or a GPU of its own")
    collect: str | None = flag(None, "at the end, copy what can be shared to this folder: tables and figures, no data")

    def validate(self) -> None:
        if not self.grid:
            raise UserError(f"pass --grid, the path of a grid file or one of {', '.join(grid_names())}")
        self.require("parallel", "at least 1", self.parallel >= 1)
        if self.check and self.report:
            raise UserError("--check stops before anything is written and --report writes; pass one")


@dataclasses.dataclass
class Search(Config):
    """How one training flag's value is chosen for each experiment: short trainings, scored on a development set.

    flag, values: what is tried. data_dir: the development set; records: most questions of each task, 0 all. train:
    flags of the short trainings. seed: of every trial.
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
        _check_flags({self.flag: 0, **self.train}, TrainConfig, _OWN_TRAIN, _SHARED_TRAIN)


@dataclasses.dataclass
class Experiment(Config):
    """One row of the table: one configuration over all seeds; ``train`` null is the base model alone.

    group: the table it belongs to. only_tasks: trained on these tasks' examples. alone: a training for every task by
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
        if self.alone and "tasks" in self.evaluate:
            raise UserError("alone scores each training on its own task; leave out evaluate's tasks")
        _check_flags(self.train or {}, TrainConfig, _OWN_TRAIN, _SHARED_TRAIN)
        _check_flags(self.evaluate, EvalConfig, _OWN_EVALUATE, _SHARED_EVALUATE)

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_.")


@dataclasses.dataclass
class Grid(Config):
    """A whole study. ``train`` and ``evaluate`` are the flags that all experiments share.

    notes: what a reader of the table must know. launcher: the program that starts the two commands, such as
    ``torchrun --nproc_per_node 8``. prepare: the command that makes the data, for messages. train_records,
    test_records: most examples and questions of each task, a fixed sample for all experiments; 0 takes all.
    """

    name: str
    about: str
    seeds: list[int]
    train: dict
    evaluate: dict
    experiments: list[dict]  # ``Experiment`` after validation
    notes: list[str] = dataclasses.field(default_factory=list)
    launcher: str = "python"
    prepare: str = ""
    baseline: str = ""
    train_records: int = 0
    test_records: int = 0
    search: dict | None = None  # ``Search`` after validation

    path = Path("grid.json")

    def validate(self) -> None:
        self.require("name", "letters, digits, '_', '-' or '.'", bool(re.fullmatch(r"\w[\w.\-]*", self.name)))
        self.require("seeds", "at least one whole number", bool(self.seeds))
        self.require("launcher", "a command such as python or torchrun --nproc_per_node 8", bool(self.launcher.strip()))
        self.require("experiments", "at least one experiment", bool(self.experiments))
        _check_seeds(self)
        for name in ("train_records", "test_records"):
            self.require(name, "at least 0", getattr(self, name) >= 0)
        with _naming("train"):
            _check_flags(self.train, TrainConfig, _OWN_TRAIN, ())
            TrainConfig.from_json(self.train)
        with _naming("evaluate"):
            _check_flags(self.evaluate, EvalConfig, _OWN_EVALUATE, ())
            if EvalConfig.from_json({"base_model": "any", **self.evaluate}).mode == "both":
                raise UserError("mode is both, and a table has one; choose generate or score")
        if self.search is not None:
            self.search = Search.from_json(self.search, "search")
            if Path(self.search.data_dir).resolve() == Path(self.test_dir).resolve():
                raise UserError(f"search: data_dir is {self.test_dir}, the test sets; choose by a development set")
        self.experiments = [
            Experiment.from_json(value, f"experiment {value.get('name', index)!r}")
            for index, value in enumerate(self.experiments)
        ]
        for key in ("name", "slug"):
            values = [getattr(experiment, key) for experiment in self.experiments]
            if repeated := next((value for value in values if values.count(value) > 1), None):
                raise UserError(f"two experiments have the {key} {repeated!r}; names must differ")
        groups_alone = [experiment.group for experiment in self.experiments if experiment.alone]
        for group in groups_alone:
            if groups_alone.count(group) > 1:
                raise UserError(f"the group {group!r} has two experiments with alone; a group may have one")
        if self.baseline:
            self.experiment(self.baseline)
        for experiment in self.experiments:
            with _naming(f"experiment {experiment.name!r}"):
                self._check_names(experiment)

    def _check_names(self, experiment: Experiment) -> None:
        """Names of other experiments and of tasks, and what a search that is named is for."""
        self.baseline_of(experiment)
        scored = self.evaluate.get("tasks", [])
        own = [*experiment.evaluate.get("tasks", []), *(experiment.only_tasks if experiment.alone else [])]
        for task in [*experiment.only_tasks, *scored, *own]:
            self.tasks[task]
        if unscored := [task for task in own if scored and task not in scored]:
            raise UserError(f"{unscored[0]} is to be scored, and the grid's evaluate has the tasks {scored} alone")
        if isinstance(experiment.search, str):
            if self.search is None:
                raise UserError(f"search names {experiment.search!r}, and the grid has no search")
            if self.search.flag in (experiment.train or {}):
                raise UserError(f"search names {experiment.search!r}, and train sets {self.search.flag} itself")
            named = self.experiment(experiment.search)
            if self.searched_as(named) is not named:
                raise UserError(f"search names {experiment.search!r}, for which nothing is searched")

    @functools.cached_property
    def tasks(self) -> TaskSet:
        """The tasks that all experiments share; raises ``UserError`` for a bad tasks file."""
        return TrainConfig.from_json(self.train).task_set()

    @property
    def test_dir(self) -> str:
        """The folder of the test sets."""
        return self.evaluate.get("data_dir", EvalConfig(base_model="any").data_dir)

    @property
    def base_model(self) -> str:
        """The base model of all experiments."""
        return self.train.get("base_model", TrainConfig().base_model)

    @property
    def scored_tasks(self) -> list[str]:
        """Names of the tasks that a whole average needs."""
        return self.evaluate.get("tasks") or self.tasks.names

    def experiment(self, name: str) -> Experiment:
        """An experiment by name; raises ``UserError`` that lists the names."""
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        names = [experiment.name for experiment in self.experiments]
        raise UserError(f"the grid {self.name} has no experiment {name!r}{closest(name, names)}")

    def seeds_of(self, experiment: Experiment) -> list[int | None]:
        """The seeds of an experiment; [None] for the base model alone, in which nothing is random."""
        return [None] if experiment.train is None else experiment.seeds or self.seeds

    def baseline_of(self, experiment: Experiment) -> Experiment | None:
        """The experiment that this one is compared with."""
        name = experiment.baseline or self.baseline
        return self.experiment(name) if name and name != experiment.name else None

    def searched_as(self, experiment: Experiment) -> Experiment | None:
        """The experiment whose search decides the flag of this one; None if nothing is searched."""
        if self.search is None or experiment.train is None or experiment.search is False:
            return None
        if isinstance(experiment.search, str):
            return self.experiment(experiment.search)
        return None if self.search.flag in experiment.train else experiment


def grid_names() -> list[str]:
    """Names of the grids that the package carries."""
    return sorted(path.stem for path in GRIDS.glob("*.json"))


def read_grid(name: str) -> Grid:
    """Read and check a grid by its path, or by the name of one of the package's.

    Raises ``UserError`` naming the file, the experiment and the key that is wrong.
    """
    path = Path(name)
    if not path.is_file() and path.suffix != ".json":
        if name not in grid_names():
            raise UserError(f"there is no grid file {name} and no grid of that name{closest(name, grid_names())}")
        path = GRIDS / f"{name}.json"
    elif not path.is_file():
        raise UserError(f"there is no grid file {name}; the grids {', '.join(grid_names())} are found by name")
    grid = Grid.from_json(files.read_json(path, "the grid"), f"the grid {path}")
    grid.path = path
    return grid


def _check_flags(flags: dict, config: type[Config], own: tuple, shared: tuple) -> None:
    """Every flag of ``config`` by name: whether it exists, and whether a grid, experiment or search may set it."""
    known = [field.name for field in dataclasses.fields(config)]
    for key in flags:
        if key not in known:
            raise UserError(f"unknown flag {key!r}{closest(key, known)}")
        if config is EvalConfig and key in FROM_TRAIN:
            raise UserError(f"{key} is given once, in the grid's train; leave it out here")
        if key == "limit":
            raise UserError("limit takes the first questions; use the grid's test_records, a fixed sample")
        if key in own:
            raise UserError(f"{key} is set by the study; leave it out")
        if key in shared:
            raise UserError(f"{key} must be equal for all experiments; set it in the grid's own flags")


def _check_seeds(config: Grid | Experiment) -> None:
    different = len(set(config.seeds)) == len(config.seeds)
    config.require("seeds", "different whole numbers from 0", different and all(seed >= 0 for seed in config.seeds))


@contextlib.contextmanager
def _naming(place: str):
    """A block whose ``UserError`` begins with the place in the grid."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
