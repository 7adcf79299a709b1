"""What a study is: its flags, and the grid file that describes its experiments, read and checked."""

import dataclasses
import re
import shlex
from pathlib import Path

from mtl_lora import files
from mtl_lora.config import REQUIRED, Config, closest, flag
from mtl_lora.errors import UserError, within
from mtl_lora.metrics import METRICS, one_unit
from mtl_lora.systems import SYSTEMS, part

ABOUT = """Run every experiment of a grid file over its seeds, and write study.json and table.md."""
GRIDS = {path.stem: path for path in sorted(Path(__file__).with_name("grids").glob("*.json"))}
# Flags of both commands: a grid gives them once, in its train.
FROM_TRAIN = ("base_model", "tasks_file", "template", "cutoff_len")
# Flags that the study sets itself or takes from elsewhere, and those that must be equal for all rows of one table.
_ALWAYS = ("output_dir", "check", "local_rank", "trust_remote_code")
_OWN = {"train": {"seed", "resume_from_checkpoint", "overwrite_output_dir", *_ALWAYS}}
_OWN["evaluate"] = {"checkpoint", "peft", "name", "limit", "split", "overwrite", *FROM_TRAIN, *_ALWAYS}
_WAYS_OUT = dict.fromkeys(FROM_TRAIN, "comes from the grid's train; leave it out")
_WAYS_OUT |= {"trust_remote_code": "is no grid's to ask for; pass --trust_remote_code True to the study"}
_SHARED = {"train": {"data_path", "image_size", *FROM_TRAIN}}  # trained at several sizes, scored at the grid's one
_SHARED["evaluate"] = {"data_dir", "mode", "max_new_tokens", "num_beams", "image_size"}


@dataclasses.dataclass
class StudyConfig(Config):
    """The flags of ``mtl-lora study``."""

    grid: str = flag(REQUIRED, f"JSON file that describes the experiments, or one of {', '.join(GRIDS)}")
    output_dir: str | None = flag(None, "folder for runs, study.json and table.md; none: output/study/<grid's name>")
    only: list[str] = flag([], "run these experiments alone, as a,b; empty: all")
    check: bool = flag(False, "check the grid and every job's flags, print the plan, then stop")
    report: bool = flag(False, "start nothing: write study.json and table.md of the finished runs")
    overwrite: bool = flag(
        False, "repeat runs of another configuration, keeping what training is the same, and half-done evaluations"
    )
    parallel: int = flag(1, "jobs side by side, each with its part of the CPU threads; they may share GPUs", min=1)
    trust_remote_code: bool = flag(False, "let every job run code that comes with a base model; no grid can ask for it")
    collect: str | None = flag(None, "at the end, a folder for what can be shared: study.json, table.md and figures")

    def validate(self) -> None:
        if self.check and self.report:
            raise UserError("--check stops before anything is written and --report writes; pass one")


@dataclasses.dataclass
class SearchConfig(Config):
    """How one training flag's value is chosen for each experiment: short trainings, scored on a development set.

    flag, values: what is tried; widen: how often, where the smallest or the largest is best, one more is tried beyond
    it. data_dir: the development set; records: most questions of each task, 0 all. train: flags of the short trainings.
    seed: of every trial.
    """

    values: list[float]
    data_dir: str
    flag: str = "learning_rate"
    train: dict = dataclasses.field(default_factory=dict)
    records: int = dataclasses.field(default=0, metadata={"min": 0})
    seed: int = 0
    widen: int = dataclasses.field(default=2, metadata={"min": 0})

    def beyond(self, values: list[float], best: float) -> float | None:
        """The value beyond the edge at which the best lies, as far as the next one inside; None where it lies inside,
        and beside zero."""
        *_, inside, edge = sorted(values, reverse=best == min(values))
        if best != edge or not inside or not edge:
            return None
        found = float(f"{edge * edge / inside:.6g}")
        return int(found) if found.is_integer() and all(isinstance(value, int) for value in values) else found

    def validate(self) -> None:
        self.require("values", "at least two different numbers", len(set(self.values)) == len(self.values) > 1)


@dataclasses.dataclass
class ExperimentConfig(Config):
    """One row of the table: one configuration over all seeds; ``train`` null is the base model alone.

    group: the table it belongs to. only_tasks: trained on these tasks' examples. alone: a training for every task by
    itself, scored on that task. baseline, seeds: instead of the grid's. search: False keeps the flag as it is; a name
    takes that experiment's choice. The grid completes it: ``baseline`` and ``search`` are then names of experiments
    or empty, and ``seeds`` are those of its runs, [None] for the base model, in which nothing is random.
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
        self.slug = re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_.")  # the name as a folder
        self.require("name", "a name with a letter or digit, not none", self.slug not in ("", "none", "null"))
        for key in ("only_tasks", "seeds"):
            self.require(key, "all different", not _repeated(getattr(self, key)))
        for key in ("only_tasks", "alone", "seeds"):
            if self.train is None and getattr(self, key):
                raise UserError(f"{key} needs a training, and train is null")
        if self.alone and "tasks" in self.evaluate:
            raise UserError("alone scores each training on its own task; leave out evaluate's tasks")


@dataclasses.dataclass
class Grid(Config):
    """A whole study. ``train`` and ``evaluate`` are the flags that all experiments share.

    system: what is trained. notes: what a reader of the table must know. launcher: what starts the commands, such as
    ``torchrun --nproc_per_node 8``. prepare: the command that makes the data, for errors. train_records,
    test_records: most examples and questions of each task, a fixed sample for all experiments; 0 takes all.
    Validated, it has ``SearchConfig`` and ``ExperimentConfig`` in place of objects, ``tasks``, the task set of all
    experiments, and ``scored``, the names of the tasks that a whole average needs.
    """

    name: str
    about: str
    seeds: list[int]
    train: dict
    evaluate: dict
    experiments: list[dict]
    system: str = flag(next(iter(SYSTEMS)), "what is trained", choices=SYSTEMS)
    notes: list[str] = dataclasses.field(default_factory=list)
    launcher: str = "python"
    prepare: str = ""
    baseline: str = ""
    train_records: int = flag(0, "most training examples of each task", min=0)
    test_records: int = flag(0, "most questions of each task", min=0)
    search: dict | None = None

    path = Path("grid.json")  # the file it was read from

    def validate(self) -> None:
        self.require("name", "letters, digits, '_', '-' or '.'", bool(re.fullmatch(r"\w[\w.\-]*", self.name)))
        self.require("seeds", "at least one seed, all different", bool(self.seeds) and not _repeated(self.seeds))
        try:
            program = shlex.split(self.launcher)
        except ValueError:  # open quotes
            program = []
        self.require("launcher", "a command such as python or torchrun --nproc_per_node 8", bool(program))
        self.require("experiments", "at least one experiment", bool(self.experiments))
        flags = self._checked(self.train, "train", for_all=True)
        train = self.flags_of("train").from_json(flags, "train")
        self.train = {"base_model": train.base_model, "data_path": train.data_path, **flags}
        self.tasks = train.task_set()
        flags = self._checked(self.evaluate, "evaluate", for_all=True)
        evaluate = self.flags_of("evaluate").from_json({"checkpoint": "any", **flags}, "evaluate")
        self.evaluate = {"data_dir": evaluate.data_dir, **flags}
        self.scored = evaluate.tasks or self.tasks.names
        if len(evaluate.protocols) > 1:
            raise UserError("evaluate: mode is both, and a table has one; choose generate or score")
        if self.search is not None:
            self.search = SearchConfig.from_json(self.search, "search")
            with within("search"):
                (self.search.flag,) = self._checked({self.search.flag: 0}, "train")
                self.search.train = self._checked(self.search.train, "train")
            metrics = {self.tasks[name].metric_name for name in self.scored}
            if not one_unit(metrics) or any(METRICS[metric].lower_is_better for metric in metrics):
                found = f"{', '.join(sorted(metrics))} of its tasks have no average by which one value is the best"
                raise UserError(f"search: {found}; leave out search, and set {self.search.flag} in train")
            if Path(self.search.data_dir).resolve() == Path(evaluate.data_dir).resolve():
                raise UserError(f"search: data_dir is {evaluate.data_dir}, the test sets; choose by a development set")
        self.experiments = [
            ExperimentConfig.from_json(value, f"experiment {value.get('name', index)!r}")
            for index, value in enumerate(self.experiments)
        ]
        slugs = [experiment.slug for experiment in self.experiments]
        groups = [experiment.group for experiment in self.experiments if experiment.alone]
        for key, values in (("folder", slugs), ("group, and alone,", groups)):
            if repeated := _repeated(values):
                raise UserError(f"two experiments have the {key} {repeated[0]!r}")
        for experiment in self.experiments:
            with within(f"experiment {experiment.name!r}"):
                self._complete(experiment, evaluate.tasks)

    def _complete(self, experiment: ExperimentConfig, scored: list[str]) -> None:
        """Check the flags and the names of tasks and experiments, and put the grid's where it has none itself."""
        if experiment.train is not None:
            experiment.train = self._checked(experiment.train, "train")
        experiment.evaluate = self._checked(experiment.evaluate, "evaluate")
        flags = {"checkpoint": "any", **self.evaluate, **experiment.evaluate}
        named = self.flags_of("evaluate").from_json(flags, "evaluate").tasks if "tasks" in experiment.evaluate else []
        own = [*named, *(experiment.only_tasks if experiment.alone else [])]
        for task in [*experiment.only_tasks, *scored, *own]:
            if self.tasks[task].name in own and scored and task not in scored:
                raise UserError(f"{task} is to be scored, and the grid's evaluate has the tasks {scored} alone")
        baseline = experiment.baseline or self.baseline
        experiment.baseline = self.experiment(baseline).name if baseline and baseline != experiment.name else ""
        experiment.seeds = [None] if experiment.train is None else experiment.seeds or self.seeds
        flag = self.search.flag if self.search else None
        free = {each.name for each in self.experiments if flag and each.train is not None and flag not in each.train}
        if isinstance(name := experiment.search, str):
            if not {name, experiment.name} <= free or self.experiment(name).search not in (True, name):
                raise UserError(
                    f"search names {name!r}, for which nothing is searched, or train sets the searched flag itself; "
                    "leave out search, or the flag"
                )
        else:
            experiment.search = experiment.name if experiment.search and experiment.name in free else ""

    def experiment(self, name: str) -> ExperimentConfig:
        """An experiment by name; raises ``UserError`` that lists the names."""
        named = {experiment.name: experiment for experiment in self.experiments}
        if name not in named:
            raise UserError(f"the grid {self.name} has no experiment {name!r}{closest(name, list(named))}")
        return named[name]

    def flags_of(self, step: str) -> type[Config]:
        """The class of the flags of ``train`` or ``evaluate``."""
        return getattr(part(self.system, "config"), {"train": "TrainConfig", "evaluate": "EvalConfig"}[step])

    def _checked(self, flags: dict, step: str, for_all: bool = False) -> dict:
        """Flags of a command under today's names. for_all: those of all experiments."""
        flags = self.flags_of(step).named(flags, step)
        for key in flags:
            if key in _OWN[step]:
                by_study = "is set by the study; leave it out (see seeds, test_records)"
                raise UserError(f"{step}: {key} {_WAYS_OUT.get(key, by_study)}")
            if key in _SHARED[step] and not for_all and not (step == "train" and key in self.evaluate):
                raise UserError(f"{step}: {key} must be equal for all experiments; set it in the grid's own flags")
        return flags


def read_grid(name: str, trust_remote_code: bool = False) -> Grid:
    """Read and check a grid by its path, or by the name of one of the package's. trust_remote_code: of every job.
    Raises ``UserError`` naming the file, the experiment and the key that is wrong."""
    path = Path(name) if Path(name).is_file() else GRIDS.get(name)
    if not path:
        raise UserError(f"there is no grid file {name}; grids that are found by name are {', '.join(GRIDS)}")
    grid = Grid.from_json(files.read_json(path, "the grid"), f"the grid {path}")
    grid.path = path
    for flags in (grid.train, grid.evaluate) if trust_remote_code else ():
        flags["trust_remote_code"] = True
    return grid


def _repeated(values: list) -> list:
    return [value for value in values if values.count(value) > 1]
