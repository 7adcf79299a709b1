"""From experiments to runs and jobs: the flags of every command, checked by the scripts' own configurations."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.study.data import Part, StudyData
from mtl_lora.study.grid import Experiment, Study
from mtl_lora.study.jobs import Job
from mtl_lora.study.read_grid import FROM_TRAIN


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with one seed: one job, or with ``alone`` one for every task. value: of the searched flag."""

    experiment: Experiment
    seed: int | None
    folder: Path
    jobs: tuple[Job, ...]
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What the jobs of one run share. stage: ``run`` or ``search``; changes: flags over those of the experiment."""

    experiment: Experiment
    seed: int | None
    folder: Path
    label: str
    stage: str
    changes: dict
    questions: Part


class Planner:
    """Makes the runs of a study in a folder."""

    def __init__(self, study: Study, data: StudyData, folder: Path):
        self.study, self.data, self.folder = study, data, folder

    def run(self, experiment: Experiment, seed: int | None, chosen: float | None = None) -> Run:
        """One run; ``chosen``: the value that the search gave its flag. Raises ``UserError`` naming a wrong flag."""
        folder = self.folder / "runs" / experiment.slug
        folder = folder if seed is None else folder / f"seed{seed}"
        label = experiment.name if seed is None else f"{experiment.name} seed {seed}"
        changes = {} if chosen is None else {self.study.search.flag: self._typed(chosen)}
        frame = _Frame(experiment, seed, folder, label, "run", changes, self.data.test)
        return Run(experiment, seed, folder, tuple(self._jobs(frame)), chosen)

    def candidates(self, experiment: Experiment) -> list[Run]:
        """The short trainings of the search, one for each value."""
        search, runs = self.study.search, []
        for value in search.values:
            folder = self.folder / "search" / experiment.slug / f"{search.flag}_{value:g}"
            label = f"{experiment.name} {search.flag} {value:g} (search)"
            changes = {**search.train, search.flag: self._typed(value)}
            frame = _Frame(experiment, search.seed, folder, label, "search", changes, self.data.dev)
            runs.append(Run(experiment, search.seed, folder, tuple(self._jobs(frame)), value))
        return runs

    def _typed(self, value: float) -> float | int:
        """A whole number where the searched flag is one."""
        whole = type(getattr(TrainConfig(), self.study.search.flag)) is int
        return int(value) if whole and value == int(value) else value

    def _jobs(self, frame: _Frame) -> Iterator[Job]:
        experiment = frame.experiment
        if not experiment.alone:
            part = None if experiment.train is None else self.data.train(tuple(experiment.only_tasks))
            yield self._job(frame, part)
            return
        for task in experiment.only_tasks or list(frame.questions.counts):
            label, folder = f"{frame.label} {task}", frame.folder / task
            yield self._job(
                dataclasses.replace(frame, label=label, folder=folder), self.data.train((task,)), {"tasks": [task]}
            )

    def _job(self, frame: _Frame, part: Part | None, asked: dict | None = None) -> Job:
        """part: the training data, None for the base model alone; asked: flags of the evaluation of one task."""
        experiment, study, folder = frame.experiment, self.study, str(frame.folder)
        where = f"the grid {study.path}, experiment {experiment.name!r}"
        common = {"base_model": TrainConfig().base_model, **study.grid.train}
        evaluate = {key: common[key] for key in FROM_TRAIN if key in common}
        train, data = None, {"test": frame.questions}
        if part:
            train = {**common, **experiment.train, **frame.changes}
            train |= {"data_path": str(part.path), "output_dir": folder, "seed": frame.seed}
            TrainConfig.from_json(train, f"{where}, train")
            evaluate, data = {"checkpoint": folder}, {"train": part, **data}
        evaluate |= {**study.grid.evaluate, **experiment.evaluate, **(asked or {})}
        evaluate |= {"data_dir": str(frame.questions.path), "output_dir": folder, "name": experiment.name}
        EvalConfig.from_json(evaluate, f"{where}, evaluate")
        return Job(
            label=frame.label,
            kind=f"{frame.stage} {experiment.name}",
            folder=frame.folder,
            train=train,
            evaluate=evaluate,
            launcher=study.grid.launcher,
            data=data,
            tasks=study.tasks.to_json(),
        )
