"""Experiments with their scores, trainings and comparisons, as the figures and the page read them.

A study's ``study.json`` holds many; a folder of one training or evaluation is a study of one experiment.
"""

import dataclasses
from pathlib import Path

from mtl_lora.language.tasks import TaskSet
from mtl_lora.report.results import Trainable
from mtl_lora.report.training_records import Analysis, Log

OVER_SEEDS, OVER_QUESTIONS = "seeds", "questions"


@dataclasses.dataclass(frozen=True)
class Value:
    """An accuracy or a difference (fractions) with its interval, where one is known.

    of: what the interval is over: ``seeds`` (95 % t interval of the mean) or ``questions`` (one run: one standard
    error to each side, for an accuracy). sd: standard deviation over seeds.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    of: str | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """A row of a table: values by task name, and their average. label: what the row is of. group: its table."""

    label: str
    group: str
    tasks: dict[str, Value]
    average: Value | None


@dataclasses.dataclass(frozen=True)
class Run:
    """One training with its evaluation. facts: what its record says besides (commands, hashes, seconds), unchecked."""

    seed: int | None
    log: Log | None = None
    analysis: Analysis | None = None
    facts: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seed alone. against: this minus the baseline that its label names."""

    name: str
    method: str | None
    group: str
    scores: Scores
    runs: tuple[Run, ...]
    trainable: Trainable | None = None
    rank: int | None = None
    learning_rate: float | None = None
    against: Scores | None = None

    @property
    def has_log(self) -> bool:
        """Whether there is a training log of any run."""
        return any(run.log for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Study:
    """Experiments in table order. majority: accuracy of the most frequent answer by task. facts: the whole file."""

    path: Path
    name: str
    tasks: TaskSet
    experiments: tuple[Experiment, ...]
    transfer: tuple[Scores, ...] = ()
    majority: dict[str, float] = dataclasses.field(default_factory=dict)
    about: str = ""
    notes: tuple[str, ...] = ()
    facts: dict = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """The experiments' groups, in order."""
        return list(dict.fromkeys(experiment.group for experiment in self.experiments))

    @property
    def scored(self) -> list[str]:
        """Tasks, in column order, with a score in any experiment."""
        having = {name for experiment in self.experiments for name in experiment.scores.tasks}
        return [name for name in self.tasks.columns if name in having]

    def title(self, task: str) -> str:
        """A task's column heading; one the set does not know is shown as it is called."""
        return self.tasks[task].title if task in self.tasks.names else task
