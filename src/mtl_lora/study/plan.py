"""Turn a grid into jobs: the samples of the data and, for every run, its command lines and what decides its result."""

import dataclasses
import functools
import shlex
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtl_lora import artifacts, cli, files
from mtl_lora.errors import UserError
from mtl_lora.results import Reader, Results, Sample, TaskResult, Trainable, trainable_text
from mtl_lora.study.config import FROM_TRAIN, ExperimentConfig, Grid
from mtl_lora.systems import SYSTEMS, part

STATE = "job.json"
# For each command of a job: what a flag must affect to be part of the job's configuration.
_DECIDING = {"train": "weights", "evaluate": "answers"}


@dataclasses.dataclass(frozen=True)
class State:
    """``job.json``: a job's configuration, how often each of its commands was started, and for each finished command
    the duration of its last start in seconds."""

    configuration: dict
    starts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "State":
        """Read the state from a job's folder; raises ``UserError`` naming the file and the key if it is broken."""
        path = folder / STATE
        try:
            return Reader(f"the state of a job {path}").read(cls, files.read_json(path, "the state of a job"))
        except UserError as error:  # such as that of 0.1.0
            raise UserError(f"{error}; pass another --output_dir") from None

    def save(self, folder: Path) -> None:
        """Write the state to the job's folder."""
        files.write_json(folder / STATE, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class PlannedJob:
    """A job of a study: a training and its evaluation in one folder, or only an evaluation of the base model. label:
    names it in progress lines. flags: by command, ``train`` (absent for the base model) and ``evaluate``. data: the
    samples that are read, by name. facts: what else decides the result, such as the launcher."""

    grid: Grid
    label: str
    folder: Path
    flags: dict[str, dict]
    data: dict[str, Sample]
    facts: dict[str, object]

    @functools.cached_property
    def configuration(self) -> dict[str, object]:
        """Everything that decides the result, flat: ``train.lora_r``, ..., and hashes of data, tasks and base model."""
        found = self.facts | {f"the {name} data (sha256)": sample.sha256 for name, sample in self.data.items()}
        for step, flags in self.flags.items():
            config = self.grid.flags_of(step)(**flags)
            values = config.to_json()
            found |= {f"{step}.{name}": values[name] for name in config.names_affecting(_DECIDING[step])}
            found |= {f"{step}: {name}": digest for name, digest in config.contents().items()}
        return found

    def changes(self, earlier: dict[str, object]) -> dict[str, tuple[object, object]]:
        """Return the differences from the ``earlier`` configuration of a folder: key -> (earlier value, value now)."""
        now = self.configuration
        # Before a flag existed, commands did what its default does.
        flags = {step: self.grid.flags_of(step).flags() for step in self.flags}
        added = {f"{step}.{each.name}": each.default for step, known in flags.items() for each in known}
        free = {f"{step}.trust_remote_code" for step in self.flags}  # the base model's fingerprint is compared instead
        keys = sorted((earlier.keys() | now.keys()) - free)
        pairs = {key: (earlier.get(key, added.get(key)), now.get(key)) for key in keys}
        # Except for flags, whose keys have a dot, None means unknown: not on this machine, or not kept at that time.
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and ("." in key or None not in pair)}

    @property
    def commands(self) -> list[str]:
        """The command lines, as a user would type them."""
        return [shlex.join(self.command(step)) for step in self.flags]

    def command(self, step: str, launcher: str | None = None, **more) -> list[str]:
        """Return the words of a command line, with ``more`` flags; ``launcher`` replaces the study's."""
        flags = self.flags[step] | more
        if "checkpoint" not in flags and self.grid.system != next(iter(SYSTEMS)):
            flags = {"system": self.grid.system, **flags}
        words = shlex.split(launcher or self.grid.launcher)
        # DeepSpeed's launcher has its own flag for a module, and puts --local_rank before the command's name.
        words += ["--no_local_rank", "--module"] if Path(words[0]).name == "deepspeed" else ["-m"]
        words += ["mtl_lora", step]
        for name, value in flags.items():
            words += [f"--{name}", cli.spelled(value)]
        return words

    @property
    def state(self) -> State | None:
        """The saved state; that of a finished training alone if only the evaluation's configuration differs, and None
        if the job was never started with this configuration."""
        if not (self.folder / STATE).is_file():
            return None
        state = State.load(self.folder)
        if not (changes := self.changes(state.configuration)):
            return state
        kept = "train" in state.seconds and (self.folder / artifacts.CHECKPOINT_WEIGHTS).is_file()
        if not (kept and all(key.startswith("evaluate") or key == "the test data (sha256)" for key in changes)):
            return None
        return State(self.configuration, {"train": state.starts.get("train", 1)}, {"train": state.seconds["train"]})

    @property
    def is_finished(self) -> bool:
        """Whether the job is done."""
        state = self.state
        return state is not None and "evaluate" in state.seconds and (self.folder / artifacts.RESULTS).is_file()


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """An experiment with one seed: one job or, with ``alone``, one job per task. value: of the searched flag."""

    experiment: ExperimentConfig
    seed: int | None
    folder: Path
    jobs: list[PlannedJob]
    value: float | None = None

    @property
    def commands(self) -> list[str]:
        """The command lines of all jobs."""
        return [command for job in self.jobs for command in job.commands]

    @functools.cached_property
    def evaluations(self) -> list[Results]:
        """The results of each job; the run must be finished."""
        # Read the file, not the folder, which may also hold an evaluation made by hand.
        return [Results.load(job.folder / artifacts.RESULTS) for job in self.jobs]

    @property
    def mean(self) -> float:
        """The mean of the tasks' values."""
        return statistics.fmean(result.value for result in self.tasks.values())

    @property
    def tasks(self) -> dict[str, TaskResult]:
        """The results of all jobs, by task."""
        return {name: result for results in self.evaluations for name, result in results.tasks.items()}


class Plan:
    """Plans the runs of a study in a folder; raises ``UserError`` for missing or wrong data and for wrong flags.
    with_fingerprint: make the fingerprint of the base model's weights, if they are on this machine, part of every job's
    configuration. test and, for a search, dev: the questions, sampled into the folder, or else the user's own files."""

    def __init__(self, grid: Grid, folder: Path, with_fingerprint: bool = False):
        self.grid, self.folder, self._source = grid, folder, Path(grid.train["data_path"])
        self._data = part(grid.system, "examples").DATA(grid.tasks)
        test, dev = Path(grid.evaluate["data_dir"]), Path(grid.search.data_dir) if grid.search else None
        tests = [path for source in (test, dev) if source for path in self._data.files(source, grid.scored)]
        for path in [*self._data.files(self._source), *tests]:
            if not path.is_file():
                way_out = f"make it with `{grid.prepare}`" if grid.prepare else "name another in the grid"
                raise UserError(f"the data file {path} cannot be found; {way_out}")
        self.training()
        self.test = self._data.questions(test, folder / "data" / "test", grid.scored, grid.test_records)
        self.dev = None
        if grid.search:
            self.dev = self._data.questions(dev, folder / "data" / "dev", grid.scored, grid.search.records)
            copied = self.dev.source_sha256.items() & self.test.source_sha256.items()
            if shared := sorted(name for name, _ in copied):
                found = f"{grid.search.data_dir} holds the same questions of {', '.join(shared)} as the test sets"
                raise UserError(f"the grid {grid.path}, search: {found}; choose by a development set")
        self._facts = self._shared_facts(with_fingerprint)

    def _shared_facts(self, with_fingerprint: bool) -> dict[str, object]:
        """Return what decides the results of every job, except its flags and its data."""
        facts = {"launcher": self.grid.launcher, "the tasks (sha256)": self.grid.tasks.answers_sha256}
        facts["the tasks' metrics"] = {task.name: task.metric_name for task in self.grid.tasks}
        facts["the tasks' loss weights"] = {task.name: task.weight for task in self.grid.tasks}
        if with_fingerprint:
            from mtl_lora.base_model import BaseModel  # imports torch, which a study needs for nothing else

            base = BaseModel(self.grid.train["base_model"], self.grid.train.get("trust_remote_code", False))
            facts["the base model (fingerprint)"] = base.local_fingerprint()
        return facts

    @functools.cache  # noqa: B019 - a study has one plan, which lives as long as the study runs
    def training(self, only: tuple[str, ...] = ()) -> Sample:
        """Return the sample of training examples, of the tasks in ``only`` or of all."""
        return self._data.training(self._source, self.folder / "data", self.grid.train_records, only)

    def runs(self, experiment: ExperimentConfig, chosen: float | None = None) -> list[PlannedRun]:
        """Return the runs of all seeds; ``chosen``: the value that the search chose for its flag."""
        flags, runs = {} if chosen is None else {self.grid.search.flag: chosen}, []
        for seed in experiment.run_seeds:
            folder, label = self.folder / "runs" / experiment.slug, experiment.name
            if seed is not None:
                folder, label = folder / f"seed{seed}", f"{label} seed {seed}"
            runs.append(self._run(experiment, folder, label, {**flags, "seed": seed}, self.test))
        return runs

    def trials(self, name: str) -> tuple[list[PlannedRun], float | None]:
        """Return the search's short trainings for an experiment, one for each value, and the best value, None while
        any is unfinished. When all are finished and one is best and at an edge, one beyond that edge is added."""
        search = self.grid.search
        runs = [self._trial(name, value) for value in search.values]
        while all(job.is_finished for job in jobs_of(runs)):
            top = max(round(run.mean, 12) for run in runs)  # equal up to the last bits
            best, *equal = sorted(run.value for run in runs if round(run.mean, 12) == top)
            further = None if equal else search.beyond([run.value for run in runs], best)
            if further is None or len(runs) == len(search.values) + search.widen:
                return runs, best
            try:
                runs.append(self._trial(name, further))
            except UserError:  # the flag does not allow this value
                return runs, best
        return runs, None

    def _trial(self, name: str, value: float) -> PlannedRun:
        experiment, search = self.grid.experiment(name), self.grid.search
        folder = self.folder / "search" / experiment.slug / f"{search.flag}_{value:g}"
        flags = {**search.train, search.flag: value, "seed": search.seed}
        return self._run(experiment, folder, f"{name} {search.flag} {value:g} (search)", flags, self.dev)

    def _run(self, experiment: ExperimentConfig, folder: Path, label: str, flags: dict, test: Sample) -> PlannedRun:
        """Plan one run. flags: training flags that override the experiment's, seed included. test: the questions."""
        grid, where, jobs = self.grid, f"the grid {self.grid.path}, experiment {experiment.name!r}", []
        for task in (experiment.only_tasks or grid.scored) if experiment.alone else [None]:
            place, steps, data = folder / task if task else folder, {}, {"test": test}
            evaluate = {key: grid.train[key] for key in FROM_TRAIN if key in grid.train}
            if experiment.train is not None:
                only = (task,) if task else tuple(experiment.only_tasks)
                data["train"] = self.training(only)
                steps["train"] = {**grid.train, **experiment.train, **flags, **self._data.flags(data["train"], only)}
                steps["train"]["output_dir"] = str(place)
                grid.flags_of("train").from_json(steps["train"], f"{where}, train")
                evaluate = {"checkpoint": str(place)}
            evaluate |= {**grid.evaluate, **experiment.evaluate, **({"tasks": [task]} if task else {})}
            evaluate |= {"data_dir": str(test.path), "output_dir": str(place), "name": experiment.name}
            grid.flags_of("evaluate").from_json(evaluate, f"{where}, evaluate")
            steps["evaluate"] = evaluate
            jobs.append(PlannedJob(grid, f"{label} {task}" if task else label, place, steps, data, self._facts))
        return PlannedRun(experiment, flags["seed"], folder, jobs, grid.search and flags.get(grid.search.flag))

    def describe(self, chosen: Sequence[ExperimentConfig], trials: dict[str, list[PlannedRun]]) -> Iterator[str]:
        """Yield the lines that ``--check`` prints: every experiment's trainable parameters and command lines."""
        yield f"{self.grid.name}: {self.grid.about}"
        work, total = {}, 0
        for name, runs in trials.items():
            work[f"search of {self.grid.search.flag} for {name}: {', '.join(f'{run.value:g}' for run in runs)}"] = runs
        for name, runs in (work | {each.name: self.runs(each) for each in chosen}).items():
            total += len(jobs := jobs_of(runs))
            facts = f"{name}; jobs: {len(jobs)}"
            try:
                if trained := [job.flags["train"] for job in runs[0].jobs if "train" in job.flags]:
                    counts = [Trainable(*self.grid.flags_of("train")(**flags).count()) for flags in trained]
                    facts += f", trainable parameters, M (%): {trainable_text(Trainable.mean(counts), len(counts))}"
            except UserError as error:
                facts += f", trainable parameters not counted ({error})"
            yield "\n    ".join([facts, *jobs[0].commands])
        yield f"every job's flags are valid; {total} jobs in {self.folder}"


def jobs_of(runs: Iterable[PlannedRun]) -> list[PlannedJob]:
    """Return the jobs of all runs, in order."""
    return [job for run in runs for job in run.jobs]
