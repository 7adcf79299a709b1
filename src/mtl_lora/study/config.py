"""Configuration of a study: its flags, and the grid file that describes its experiments, read and checked."""

import dataclasses
import re
import shlex
from pathlib import Path

from mtl_lora import files
from mtl_lora.config import REQUIRED, Config, closest, flag
from mtl_lora.errors import UserError, within
from mtl_lora.metrics import METRICS, one_unit
from mtl_lora.systems import SYSTEMS, part
from mtl_lora.tasks import TaskSet

GRIDS = {path.stem: path for path in sorted(Path(__file__).with_name("grids").glob("*.json"))}
# Flags that both commands have: a grid sets them once, in its train.
FROM_TRAIN = ("base_model", "tasks_file", "template", "cutoff_len")
# Flags that a grid cannot set, because the study sets them itself or takes them from elsewhere, followed by the flags
# that must be equal in all rows of one table.
_ALWAYS = ("output_dir", "check", "local_rank", "trust_remote_code")
_OWN = {"train": {"seed", "resume_from_checkpoint", "overwrite_output_dir", *_ALWAYS}}
_OWN["evaluate"] = {"checkpoint", "peft", "name", "limit", "split", "overwrite", *FROM_TRAIN, *_ALWAYS}
_WAYS_OUT = dict.fromkeys(FROM_TRAIN, "comes from the grid's train; leave it out")
_WAYS_OUT |= {"trust_remote_code": "cannot be set in a grid; pass --trust_remote_code True to the study"}
# A training may set image_size if the grid's evaluate does: trained at several sizes, scored at one.
_SHARED = {"train": {"data_path", "image_size", *FROM_TRAIN}}
_SHARED["evaluate"] = {"data_dir", "mode", "max_new_tokens", "num_beams", "image_size"}


@dataclasses.dataclass
class StudyConfig(Config):
    """Run every experiment of a grid file over its seeds, and write study.json and table.md."""

    grid: str = flag(REQUIRED, f"JSON file that describes the experiments, or one of {', '.join(GRIDS)}")
    output_dir: str | None = flag(None, "folder for runs, study.json and table.md; none: output/study/<grid's name>")
    only: list[str] = flag([], "run only these experiments, as a,b; empty: all")
    check: bool = flag(False, "check the grid and every job's flags, print the plan, then stop")
    report: bool = flag(False, "start nothing: write study.json and table.md of the finished runs")
    overwrite: bool = flag(
        False, "repeat runs made with another configuration (unchanged trainings are kept) and half-done evaluations"
    )
    parallel: int = flag(1, "jobs to run at a time, each with its part of the CPU threads; they may share GPUs", min=1)
    trust_remote_code: bool = flag(False, "let every job run code that comes with a base model; a grid cannot set this")
    collect: str | None = flag(None, "folder to share: at the end study.json, table.md and figures are written there")

    def validate(self) -> None:
        if self.check and self.report:
            raise UserError("--check stops before anything is written and --report writes; pass one")


@dataclasses.dataclass(frozen=True)
class SearchConfig(Config):
    """How to choose the value of one training ``flag`` for each experiment: by short trainings on each of ``values``,
    scored on at most ``records`` (0: all) questions of each task of the development set ``data_dir``.

    widen: how often another value is tried beyond the smallest or largest one if that is the best. train: flags of the
    short trainings. seed: of every one of them.
    """

    values: list[float]
    data_dir: str
    flag: str = "learning_rate"
    train: dict = dataclasses.field(default_factory=dict)
    records: int = dataclasses.field(default=0, metadata={"min": 0})
    seed: int = 0
    widen: int = dataclasses.field(default=2, metadata={"min": 0})

    def beyond(self, values: list[float], best: float) -> float | None:
        """Return the next value beyond the edge, at the ratio of the edge to its inner neighbour, if ``best`` is the
        smallest or largest of ``values``; None if it is not, or if the edge or that neighbour is zero."""
        *_, inside, edge = sorted(values, reverse=best == min(values))
        if best != edge or not inside or not edge:
            return None
        found = float(f"{edge * edge / inside:.6g}")
        return int(found) if found.is_integer() and all(isinstance(value, int) for value in values) else found

    def validate(self) -> None:
        self.require("values", "at least two different numbers", len(set(self.values)) == len(self.values) > 1)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Config):
    """One row of the table: one configuration over all seeds; with ``train`` null, the base model without training.

    In a ``Grid``, what is in effect: ``baseline`` names an experiment or is empty, ``search`` names one or is False.
    """

    name: str
    train: dict | None
    evaluate: dict = dataclasses.field(default_factory=dict)
    group: str = flag("main", "the table that it belongs to")
    baseline: str = flag("", "replaces the grid's")
    only_tasks: list[str] = flag([], "train on these tasks' examples only")
    alone: bool = flag(False, "train on every task separately and score each training on its own task")
    search: bool | str = flag(True, "False: keep the searched flag as it is; an experiment's name: its chosen value")
    seeds: list[int] = flag([], "replace the grid's")

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_.")

    @property
    def run_seeds(self) -> list[int] | list[None]:
        """The seeds of its runs; [None] for the base model, in which nothing is random."""
        return [None] if self.train is None else self.seeds

    def validate(self) -> None:
        self.require("name", "a name with a letter or digit, not none", self.slug not in ("", "none", "null"))
        for key in ("only_tasks", "seeds"):
            self.require(key, "all different", not _repeated(getattr(self, key)))
        for key in ("only_tasks", "alone", "seeds"):
            if self.train is None and getattr(self, key):
                raise UserError(f"{key} needs a training, but train is null")
        if self.alone and "tasks" in self.evaluate:
            raise UserError("alone scores each training on its own task; leave out evaluate's tasks")


@dataclasses.dataclass(frozen=True)
class GridConfig(Config):
    """What a grid file says; ``Grid`` is the study that it describes."""

    name: str
    about: str
    seeds: list[int]
    train: dict
    evaluate: dict
    experiments: list[dict]
    system: str = flag(next(iter(SYSTEMS)), "what is trained", choices=SYSTEMS)
    notes: list[str] = flag([], "what a reader of the table must know")
    launcher: str = flag("python", "program that starts the commands, such as torchrun --nproc_per_node 8")
    prepare: str = flag("", "command that makes the data, for error messages")
    baseline: str = ""
    train_records: int = flag(0, "most training examples of each task, the same for all experiments; 0: all", min=0)
    test_records: int = flag(0, "most questions of each task, the same for all experiments; 0: all", min=0)
    search: dict | None = None

    def validate(self) -> None:
        self.require("name", "letters, digits, '_', '-' or '.'", bool(re.fullmatch(r"\w[\w.\-]*", self.name)))
        self.require("seeds", "at least one seed, all different", bool(self.seeds) and not _repeated(self.seeds))
        try:
            program = shlex.split(self.launcher)
        except ValueError:  # open quotes
            program = []
        self.require("launcher", "a command such as python or torchrun --nproc_per_node 8", bool(program))
        self.require("experiments", "at least one experiment", bool(self.experiments))


class Grid:
    """A study as a grid file describes it, checked; ``train`` and ``evaluate`` are the flags of all experiments.

    tasks: their task set. scored: the names of the tasks in a complete average. content: of the file when it was read.
    """

    def __init__(self, config: GridConfig, path: Path, sha256: str, content: dict, trust_remote_code: bool):
        self.path, self.sha256, self.content = path, sha256, content
        self.name, self.about, self.notes, self.system = config.name, config.about, config.notes, config.system
        self.launcher, self.prepare = config.launcher, config.prepare
        self.train_records, self.test_records = config.train_records, config.test_records
        flags = self._checked(config.train, "train", for_all=True)
        train = self.flags_of("train").from_json(flags, "train")
        self.train = {"base_model": train.base_model, "data_path": train.data_path, **flags}
        self.tasks: TaskSet = train.task_set()
        flags = self._checked(config.evaluate, "evaluate", for_all=True)
        evaluate = self.flags_of("evaluate").from_json({"checkpoint": "any", **flags}, "evaluate")
        self.evaluate = {"data_dir": evaluate.data_dir, **flags}
        self.scored: list[str] = evaluate.tasks or self.tasks.names
        if len(evaluate.protocols) > 1:
            raise UserError("evaluate: mode is both, but a table shows one mode; choose generate or score")
        self.search = None if config.search is None else self._search(config.search)
        self.experiments = [  # as the file has them
            ExperimentConfig.from_json(value, f"experiment {value.get('name', index)!r}")
            for index, value in enumerate(config.experiments)
        ]
        slugs = [each.slug for each in self.experiments]
        groups = [each.group for each in self.experiments if each.alone]
        for words, values in (("have the folder", slugs), ("with alone have the group", groups)):
            if repeated := _repeated(values):
                raise UserError(f"two experiments {words} {repeated[0]!r}; they must differ")
        self.experiments = [self._in_effect(each, config) for each in self.experiments]
        if trust_remote_code:
            self.train["trust_remote_code"] = self.evaluate["trust_remote_code"] = True

    def experiment(self, name: str) -> ExperimentConfig:
        """Return an experiment by name; raises ``UserError`` that names the known ones."""
        named = {experiment.name: experiment for experiment in self.experiments}
        if name not in named:
            raise UserError(f"the grid {self.name} has no experiment {name!r}{closest(name, list(named))}")
        return named[name]

    def flags_of(self, step: str) -> type[Config]:
        """Return the configuration class of ``train`` or ``evaluate`` in the grid's system."""
        return getattr(part(self.system, "config"), {"train": "TrainConfig", "evaluate": "EvalConfig"}[step])

    def _search(self, value: dict) -> SearchConfig:
        search = SearchConfig.from_json(value, "search")
        with within("search"):
            (flag,) = self._checked({search.flag: 0}, "train")
            train = self._checked(search.train, "train")
        metrics = {self.tasks[name].metric_name for name in self.scored}
        if not one_unit(metrics) or any(METRICS[metric].lower_is_better for metric in metrics):
            found = f"no average of the tasks' metrics ({', '.join(sorted(metrics))}) can be maximised"
            raise UserError(f"search: {found}; leave out search, and set {flag} in train")
        if Path(search.data_dir).resolve() == Path(self.evaluate["data_dir"]).resolve():
            raise UserError(f"search: data_dir is {self.evaluate['data_dir']}, the test sets; pass a development set")
        return dataclasses.replace(search, flag=flag, train=train)

    def _in_effect(self, experiment: ExperimentConfig, config: GridConfig) -> ExperimentConfig:
        """Return an experiment, checked, with what it takes from the grid and, by name, from other experiments."""
        with within(f"experiment {experiment.name!r}"):
            train = None if experiment.train is None else self._checked(experiment.train, "train")
            evaluate = self._checked(experiment.evaluate, "evaluate")
            flags = {"checkpoint": "any", **self.evaluate, **evaluate}
            named = self.flags_of("evaluate").from_json(flags, "evaluate").tasks if "tasks" in evaluate else []
            own, listed = [*named, *(experiment.only_tasks if experiment.alone else [])], self.evaluate.get("tasks", [])
            for task in [*experiment.only_tasks, *listed, *own]:
                if self.tasks[task].name in own and listed and task not in listed:
                    raise UserError(f"{task} must be scored, but the grid's evaluate lists only the tasks {listed}")
            baseline = experiment.baseline or config.baseline
            baseline = self.experiment(baseline).name if baseline not in ("", experiment.name) else ""
            search = self._search_of(experiment)
        seeds = [] if train is None else experiment.seeds or config.seeds
        found = {"train": train, "evaluate": evaluate, "baseline": baseline, "search": search, "seeds": seeds}
        return dataclasses.replace(experiment, **found)

    def _search_of(self, experiment: ExperimentConfig) -> str | bool:
        """Return the name of the experiment whose search chooses the flag's value for ``experiment``, or False."""
        flag = self.search.flag if self.search else None
        names = {name for each in self.flags_of("train").flags() if each.name == flag for name in each.names}
        trained = [each for each in self.experiments if names and each.train is not None]
        free = {each.name for each in trained if not names & each.train.keys()}
        searched = {each.name for each in trained if each.name in free and each.search in (True, each.name)}
        name = experiment.search if isinstance(experiment.search, str) else experiment.name
        is_searched = experiment.name in free and name in searched
        if isinstance(experiment.search, str) and not is_searched:
            found = f"search names {name!r}, for which nothing is searched, or train sets the searched flag itself"
            raise UserError(f"{found}; leave out search, or the flag")
        return name if is_searched else False

    def _checked(self, flags: dict, step: str, for_all: bool = False) -> dict:
        """Check a command's flags and return them under today's names. for_all: whether all experiments share them."""
        flags = self.flags_of(step).named(flags, step)
        for key in flags:
            if key in _OWN[step]:
                by_study = "is set by the study; leave it out (see seeds, test_records)"
                raise UserError(f"{step}: {key} {_WAYS_OUT.get(key, by_study)}")
            if key in _SHARED[step] and not for_all and not (step == "train" and key in self.evaluate):
                raise UserError(f"{step}: {key} must be equal for all experiments; set it in the grid's own flags")
        return flags


def read_grid(name: str, trust_remote_code: bool = False) -> Grid:
    """Read and check a grid, given by its path or by the name of a grid of the package; raises ``UserError`` naming the
    file, experiment and key that is wrong. trust_remote_code: whether every job may run a base model's own code."""
    path = Path(name) if Path(name).is_file() else GRIDS.get(name)
    if not path:
        raise UserError(f"there is no grid file {name}; the package has the grids {', '.join(GRIDS)}")
    with files.unchanged(path) as digest:
        content = files.read_json(path, "the grid")
    config = GridConfig.from_json(content, f"the grid {path}")
    with within(f"the grid {path}"):
        return Grid(config, path, digest, content, trust_remote_code)


def _repeated(values: list) -> list:
    return [value for value in values if values.count(value) > 1]
