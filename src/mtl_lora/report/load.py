"""The input of reports: ``study.json``, folders of single runs, their training logs and adapter analyses.

``mtl_lora.study`` writes ``study.json`` through these classes. Schema 1, which names no metrics, can still be read.
"""

import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.analysis import Analysis
from mtl_lora.errors import UserError
from mtl_lora.estimates import Difference, Estimate
from mtl_lora.metrics import METRICS, one_unit
from mtl_lora.results import Reader, Results, Sample, TaskNames, TaskResult, Text, Trainable, average_of, object_of
from mtl_lora.text_table import told_apart
from mtl_lora.train_log import Losses, read_losses

STUDY_SCHEMA = 2


@dataclasses.dataclass(frozen=True)
class Summary:
    """Estimates over the runs of an experiment: by task, and for the average if every task has a result."""

    tasks: dict[str, Estimate]
    average: Estimate | None = None

    @classmethod
    def over_seeds(cls, values: dict[str, list[float]], averages: Sequence[float | None]) -> "Summary":
        """Summarise the runs' values by task, and their averages if every run has one."""
        tasks = {task: Estimate.over_seeds(of_task) for task, of_task in values.items()}
        return cls(tasks, None if None in averages else Estimate.over_seeds(averages))


def gain_over(alone: Mapping[str, TaskResult], tasks: Mapping[str, TaskResult], names: Sequence[str]) -> float | None:
    """Return Delta_m, by how many percent ``tasks`` are better than ``alone``, on average over the tasks ``names``.

    100 / T sum_t s_t (M_t - S_t) / S_t, with M_t of ``tasks``, S_t of ``alone``, and s_t = -1 where lower is better
    (Maninis et al., arXiv 1904.08918). None if a task lacks a result, or its S_t is not above 0 or of unknown metric.
    """
    if not {*names} <= tasks.keys() & alone.keys():
        return None
    pairs = [(tasks[name].value, alone[name]) for name in names]
    if not all(each.value > 0 and each.has_known_metric for _, each in pairs):
        return None
    gains = [
        (-1 if METRICS[each.metric].lower_is_better else 1) * (value - each.value) / each.value for value, each in pairs
    ]
    return 100 * statistics.fmean(gains)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """An experiment minus its ``baseline``, by task and on average, with intervals over the questions. over_seeds: the
    differences of the values, seed by seed; None for a single pair of runs. delta_m: see ``gain_over``, over the seeds;
    None where the tasks' values have an average."""

    baseline: str = ""
    tasks: dict[str, Difference]
    average: Difference | None = None
    over_seeds: Summary | None = None
    delta_m: Estimate | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Differences):
    """Tasks trained together (``experiment``) minus each trained ``alone``. method: title of the method together."""

    group: Text
    method: str = ""
    experiment: str = ""
    alone: str = ""

    @property
    def label(self) -> str:
        """The experiment's name, after its group if the grid names groups and the name does not contain it."""
        name = self.experiment or self.method
        is_named = self.group == Experiment.group or re.search(rf"(?<!\w){re.escape(self.group)}(?!\w)", name)
        return name if is_named else f"{self.group}: {name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training with its evaluation: files (relative to the study's folder), commands, hashes.

    seconds, starts: duration and number of starts by step (``train``, ``evaluate``). steps: number of optimiser steps.
    """

    folder: str = ""
    results: str | None = None
    analysis: str | None = None
    log: str | None = None
    commands: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float | None] = dataclasses.field(default_factory=dict)
    starts: dict[str, int | None] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    train_commit: str | None = None
    train_data_sha256: str | None = None
    adapter_sha256: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Job):
    """An experiment with one seed. tasks: results by task; average: their mean, None unless every task has one; parts:
    one job per task for tasks that were trained alone, which the run itself sums up."""

    seed: int | None = None
    commit: str | None = None
    tasks: dict[str, TaskResult] = dataclasses.field(default_factory=dict)
    average: float | None = None
    parts: dict[str, Job] = dataclasses.field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        """The run itself, then its parts."""
        return [self, *self.parts.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that differ only in their seed. method: None for the base model; adapters: how many each run trains, with
    ``alone`` one per task; trained_on: names of tasks; against: this experiment minus its baseline."""

    name: Text
    method: Text | None = None
    group: Text = "main"  # where the grid names no groups
    alone: bool = False
    trainable: Trainable | None = None
    adapters: int = 0
    rank: int | None = None
    learning_rate: float | None = None
    trained_on: list[str] | None = None
    runs: list[Run]
    summary: Summary
    against: Differences | None = None

    @property
    def untrained(self) -> list[str]:
        """Tasks that have a result but had no training examples."""
        marked = {name for run in self.runs for name, task in run.tasks.items() if task.untrained}
        return [task for task in self.summary.tasks if task in marked or task not in (self.trained_on or [task])]

    def estimate(self, task: str | None) -> Estimate | None:
        """The summary's value of a task, or of the average (None); for a single run ± its standard error."""
        found = self.summary.average if task is None else self.summary.tasks.get(task)
        if found and found.low is None and len(self.runs) == 1:
            having = [self.runs[0].tasks.get(name) for name in (self.summary.tasks if task is None else [task])]
            if None not in having and (error := average_of(having).stderr) is not None:
                return Estimate(found.mean, None, found.mean - error, found.mean + error)
        return found


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One value of the searched flag with its results on development data: the average, and by task."""

    value: float
    dev: float
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)
    commands: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class SearchOutcome:
    """The candidates of the experiment ``name`` and the chosen value."""

    name: Text
    candidates: list[Candidate]
    chosen: object


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the value of ``flag`` by short trainings with the flags ``train``; questions: how many, by task."""

    flag: Text
    data_dir: str | None = None
    seed: int | None = None
    train: dict = dataclasses.field(default_factory=dict)
    questions: dict[str, int] = dataclasses.field(default_factory=dict)
    dev_data_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    experiments: list[SearchOutcome]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """``study.json``: experiments in table order and what they were made from.

    grid: its configuration. commit, versions, device: of the last evaluation; commits, devices: of all. data: the
    samples ``train`` and ``test``. path: the file, or a single run's folder. facts: what a single run's files hold.
    """

    name: Text
    about: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    base_model: str | None = None
    task_set: TaskNames
    grid: dict = dataclasses.field(default_factory=dict)
    grid_sha256: str | None = None
    commit: str | None = None
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    device: str | None = None
    commits: list[str | None] = dataclasses.field(default_factory=list)
    devices: list[str | None] = dataclasses.field(default_factory=list)
    data: dict[str, Sample] = dataclasses.field(default_factory=dict)
    experiments: list[Experiment]
    transfer: list[Transfer] = dataclasses.field(default_factory=list)
    search: Search | None = None
    path: Path = dataclasses.field(default=Path(), compare=False)
    facts: dict = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read a study's file, or the one in a folder; raises ``UserError`` naming the file and the key."""
        path = Path(path) / artifacts.STUDY if Path(path).is_dir() else Path(path)
        value = files.read_object(path, "the study")
        schema = value.get("schema")
        if value.get("kind") != "study" or type(schema) is not int or schema not in (1, STUDY_SCHEMA):
            raise UserError(f"{path} is not a study of schema 1 or {STUDY_SCHEMA}; write it with mtl-lora study")
        study = cls(**Reader(str(path), schema).fields(cls, value), path=path)
        if not study.experiments:
            raise UserError(f"{path}: experiments is empty; run the study first")
        return study

    def to_json(self) -> dict:
        """The content of ``study.json``, schema 2."""
        return {"schema": STUDY_SCHEMA, "kind": "study", **object_of(self)}

    @property
    def runs(self) -> list[Run]:
        """Every run of every experiment."""
        return [run for experiment in self.experiments for run in experiment.runs]

    @property
    def scored(self) -> list[str]:
        """Tasks, in column order, with a result in any experiment."""
        return [name for name in self.task_set.columns if any(name in e.summary.tasks for e in self.experiments)]

    @property
    def untrained_notes(self) -> list[str]:
        """A sentence for each experiment that had no training examples of some tasks."""
        found = ((each.name, ", ".join(each.untrained)) for each in self.experiments)
        return [f"{name} had no training examples of {tasks}." for name, tasks in found if tasks]

    @property
    def has_seeds(self) -> bool:
        """Whether an experiment has more than one run."""
        return any(len(experiment.runs) > 1 for experiment in self.experiments)

    @property
    def compared_over_seeds(self) -> bool:
        """Whether a difference of averages is known over seeds."""
        found = [*(each.against for each in self.experiments), *self.transfer]
        return any(each and each.over_seeds and each.over_seeds.average for each in found)

    @property
    def has_average(self) -> bool:
        """Whether the tasks' values can be averaged, see ``one_unit``."""
        return one_unit(self.metric(task) for task in self.scored)

    def metric(self, task: str | None) -> str:
        """The metric of a task; for the average (None), whose tasks have one unit, that of any; accuracy if unknown."""
        results = [pair for run in self.runs for pair in run.tasks.items()]
        return next((result.metric for name, result in results if task in (name, None)), "accuracy")

    @property
    def majority(self) -> dict[str | None, float]:
        """The majority class's value by task, from the first run that has one; under None their mean, if all do."""
        results = [(name, result.majority) for run in reversed(self.runs) for name, result in run.tasks.items()]
        found = {name: value for name, value in results if value is not None}
        known = [found[name] for name in self.scored if name in found]
        return found | ({None: sum(known) / len(known)} if known and len(known) == len(self.scored) else {})


def log_of(study: Study, run: Run) -> Losses | None:
    """The training log of a run; for tasks that were trained alone, the logs of all its parts together."""
    logs = [read_losses(_file(study, job, "log")) for job in run.jobs if job.log]
    # Each part has only its own task, so together they have no loss over all tasks.
    several = {"": {}} if len(logs) > 1 else {}
    return {task: curve for log in logs for task, curve in log.items()} | several if logs else None


def analysis_of(study: Study, run: Run) -> Analysis | None:
    """The analysis of a run's adapter, or None."""
    return Analysis.load(_file(study, run, "analysis")) if run.analysis else None


def _file(study: Study, job: Job, key: str) -> Path:
    path = study.path.parent / getattr(job, key)
    if not path.is_file():
        reason = f"{key} of the run {job.folder} names {getattr(job, key)}, which does not exist"
        raise UserError(f"{study.path}: {reason}; collect the study again")
    return path


def load_run(path: str | Path) -> Study:
    """Load a study, or the folder of one training, evaluation or both as a study of a single run; raises ``UserError``
    for a folder without the files of a run."""
    path = Path(path)
    if artifacts.is_study(path):
        return Study.load(path)
    folder = path.parent if path.name == artifacts.RESULTS else path
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; pass the folder of a study, a training or an evaluation")
    names = (artifacts.TRAIN_LOG, artifacts.ADAPTER_ANALYSIS, artifacts.RUN_CONFIG, artifacts.CHECKPOINT_CONFIG)
    log, analysis, *rest = ((folder / name).absolute() if (folder / name).is_file() else None for name in names)
    training, adapter = (files.read_object(file, "the configuration") if file else {} for file in rest)
    reader = Reader(str(folder / artifacts.RUN_CONFIG))
    unused = reader.read(list, training.pop("unused_settings", []), "unused_settings")
    settings = reader.read(dict, training.get("settings", {}), "settings")
    training |= {"settings": {key: value for key, value in settings.items() if key not in unused}}
    found = Results.load_all(path, needed=False)
    if not (found or log or analysis):
        raise UserError(f"{folder} holds none of {', '.join([artifacts.STUDY, artifacts.RESULTS, *names[:2]])}")
    facts = {f"evaluation {each.mode}" if len(found) > 1 else "evaluation": each.to_json() for each in found}
    facts |= {"training": training, "adapter": adapter or (found[0].adapter if found else None)}
    found = found or [_without_values(folder, training.get("tasks"), log, analysis)]
    experiments, of_training = [], {"log": log and str(log), "analysis": analysis and str(analysis)}
    for results in found:
        run = Run(folder=str(folder), results=results.path and str(results.path), tasks=results.tasks, **of_training)
        of_training = {}  # with several protocols, the training's figures are shown only once
        average = results.average if results.tasks else None
        values = {task: [result.value] for task, result in results.tasks.items()}
        summary = Summary.over_seeds(values, [average and average.value])
        about = {key: getattr(results, key) for key in ("name", "method", "trainable")}
        experiments.append(Experiment(**about, runs=[run], summary=summary))
    return Study(name=found[0].name, task_set=found[0].task_set, experiments=experiments, path=folder, facts=facts)


def _without_values(folder: Path, tasks: object, log: Path | None, analysis: Path | None) -> Results:
    """What stands for the results of a training that was not evaluated; ``tasks`` are of its configuration."""
    adapts = Analysis.load(analysis) if analysis else None
    # Without a configuration, the tasks are those that the analysis or the log names.
    known = adapts.tasks if adapts else [*filter(None, read_losses(log))] or ["task"]
    listed = tasks or {"tasks": [{"name": name, "id": id} for id, name in enumerate(known)]}
    task_set = TaskNames.from_json(listed, str(folder / artifacts.RUN_CONFIG))
    return Results(name=folder.absolute().name, method=adapts and adapts.method, tasks={}, task_set=task_set)


def load_studies(paths: Sequence[str | Path]) -> list[Study]:
    """Load the studies among ``paths``; all single runs together become one study, each as an experiment. Raises
    ``UserError`` for a folder without the files of a run, and for single runs with different tasks."""
    found = [load_run(path) for path in paths]
    studies, single = [each for each in found if not each.facts], [each for each in found if each.facts]
    TaskNames.require_one(single, "figures side by side need")
    TaskNames.require_one_measure((run.folder, run.tasks) for study in single for run in study.runs)
    pairs = [(experiment, study.path) for study in single for experiment in study.experiments]
    names, experiments = told_apart([each.name for each, _ in pairs], [path for _, path in pairs]), []
    tasks = {task for experiment, _ in pairs for task in experiment.summary.tasks}
    for name, (experiment, _) in zip(names, pairs, strict=True):
        # Averages over different tasks are not comparable.
        average = experiment.summary.average if tasks == {*experiment.summary.tasks} else None
        summary = dataclasses.replace(experiment.summary, average=average)
        experiments.append(dataclasses.replace(experiment, name=name, summary=summary))
    results = [Results.load(run.results) for study in single for run in study.runs if run.results]
    notes = ["The runs differ in their questions or in how these were answered."] * Results.differ(results)
    return studies + [dataclasses.replace(study, experiments=experiments, notes=notes) for study in single[:1]]
