"""From experiments to jobs: one training and its evaluation, as the two commands a user would type."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from mtl_lora.evaluate.settings import EvalConfig
from mtl_lora.study.data import Part, StudyData
from mtl_lora.study.grid import FROM_TRAIN, Experiment, Study
from mtl_lora.train.settings import TrainConfig

# Flags that touch no result (data and tasks are told by their content): changing one makes no other recipe.
FREE_TRAIN = {"data_path", "tasks_file", "output_dir", "cache_dir", "save_step", "save_total_limit", "logging_steps"}
FREE_TRAIN |= {"wandb_project", "tensorboard"}
FREE_EVALUATE = {"checkpoint", "data_dir", "tasks_file", "output_dir", "name", "batch_size", "share_opening"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training and its evaluation in one folder; ``train`` None: an evaluation of the base model alone.

    label: for progress lines. kind: jobs of one kind take about as long. train, evaluate: flags of the two scripts.
    data: the parts that are read, by name.
    """

    label: str
    kind: str
    folder: Path
    train: dict | None
    evaluate: dict
    launcher: str
    data: dict[str, Part]
    tasks: dict

    @property
    def recipe(self) -> dict[str, object]:
        """What decides the result, flat: ``train.lora_r``, ..., with data by its hashes."""
        recipe = {f"train.{key}": value for key, value in (self.train or {}).items() if key not in FREE_TRAIN}
        recipe |= {f"evaluate.{key}": value for key, value in self.evaluate.items() if key not in FREE_EVALUATE}
        recipe |= {f"the {name} data (sha256)": part.sha256 for name, part in self.data.items()}
        return recipe | {"launcher": self.launcher, "tasks": self.tasks}

    @property
    def commands(self) -> list[str]:
        """The command lines, as one would type them in the project's folder."""
        return [shlex.join(command) for command in (self.train_command(), self.evaluate_command()) if command]

    def train_command(self, **more) -> list[str]:
        """The training's words; empty without a training."""
        return [] if self.train is None else command(self.launcher, "finetune.py", {**self.train, **more})

    def evaluate_command(self, **more) -> list[str]:
        """The evaluation's words."""
        return command(self.launcher, "commonsense_evaluate.py", {**self.evaluate, **more})


def command(launcher: str, script: str, flags: dict) -> list[str]:
    """``python script --flag value ...``; a flag's value is written as the scripts read it."""
    words = [*shlex.split(launcher), script]
    for name, value in flags.items():
        words += [f"--{name}", _spelled(value)]
    return words


def _spelled(value: object) -> str:
    if isinstance(value, list):
        plain = all(not set(entry) & set(",[]'\"") for entry in value)
        return ",".join(value) if plain else json.dumps(value)
    return "none" if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with one seed: one job, or with ``alone`` one for every task."""

    experiment: Experiment
    seed: int | None
    folder: Path
    jobs: tuple[Job, ...]
    value: float | None = None


class Planner:
    """Makes the runs of a study; raises ``UserError`` for flags that finetune.py or the evaluation would refuse."""

    def __init__(self, study: Study, data: StudyData, folder: Path):
        self.study, self.data, self.folder = study, data, folder

    def run(self, experiment: Experiment, seed: int | None, chosen: float | None = None) -> Run:
        """One run; ``chosen``: the value that the search gave its flag."""
        folder = self.folder / "runs" / experiment.slug
        if seed is not None:
            folder /= f"seed{seed}"
        label = experiment.name if seed is None else f"{experiment.name} seed {seed}"
        changes = {} if chosen is None else {self.study.search.flag: chosen}
        jobs = self._jobs(experiment, seed, folder, label, "run", changes, self.data.test)
        return Run(experiment, seed, folder, tuple(jobs), chosen)

    def candidates(self, experiment: Experiment) -> list[Run]:
        """The short trainings of the search, one for each value."""
        search, runs = self.study.search, []
        for value in search.values:
            folder = self.folder / "search" / experiment.slug / f"{search.flag}_{value:g}"
            label = f"{experiment.name} {search.flag} {value:g} (search)"
            changes = {**search.train, search.flag: value}
            jobs = self._jobs(experiment, search.seed, folder, label, "search", changes, self.data.dev)
            runs.append(Run(experiment, search.seed, folder, tuple(jobs), value))
        return runs

    def _jobs(self, experiment, seed, folder: Path, label: str, stage: str, changes: dict, questions: Part) -> Iterator:
        if experiment.alone:
            for task in experiment.only_tasks or list(questions.counts):
                part = self.data.train([task])
                asked = {"tasks": [task]}
                yield self._job(
                    experiment, seed, folder / task, f"{label} {task}", stage, changes, part, questions, asked
                )
        else:
            part = None if experiment.train is None else self.data.train(experiment.only_tasks)
            yield self._job(experiment, seed, folder, label, stage, changes, part, questions, {})

    def _job(self, experiment, seed, folder, label, stage, changes, part: Part | None, questions, asked) -> Job:
        where = f"the grid {self.study.path}, experiment {experiment.name!r}"
        common = {key: value for key, value in self.study.grid.train.items() if key in FROM_TRAIN}
        common = {"base_model": TrainConfig().base_model, **common}
        train, data = None, {"test": questions}
        own = common
        if part:
            train = {**common, **self.study.train_flags(experiment), **changes}
            train |= {"data_path": str(part.path), "output_dir": str(folder), "seed": seed}
            TrainConfig.from_json(train, f"{where}, train")
            own = {"checkpoint": str(folder)}
            data["train"] = part
        evaluate = {**own, **self.study.evaluate_flags(experiment), **asked}
        evaluate |= {"data_dir": str(questions.path), "output_dir": str(folder), "name": experiment.name}
        EvalConfig.from_json(evaluate, f"{where}, evaluate")
        kind = f"{stage} {experiment.name}"
        launcher, tasks = self.study.grid.launcher, self.study.tasks.to_json()
        return Job(label, kind, folder, train, evaluate, launcher, data, tasks)
