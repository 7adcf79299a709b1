"""From a grid to jobs: the samples of the data, and for every run the command lines and what decides their result."""

import dataclasses
import functools
import json
import random
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import TaskSet
from mtl_lora.study.config import FROM_TRAIN, Experiment, Grid

SAMPLE_SEED = 0
# Flags that name a place; what lies there is known by its content or by the job's own folder.
_PLACES = {"data_path", "data_dir", "tasks_file", "output_dir", "checkpoint"}
# A job's commands: the class of their flags, and what a flag must affect to be part of the job's configuration.
_DECIDING = {"train": (TrainConfig, "weights"), "evaluate": (EvalConfig, "answers")}


def sample(examples: Sequence[Example], most: int, task: str) -> list[Example]:
    """``most`` examples (0: all) of one task in the file's order: the first of a shuffle, so a larger sample adds."""
    if not most:
        return list(examples)
    order = list(range(len(examples)))
    random.Random(f"{SAMPLE_SEED} {task}").shuffle(order)
    return [examples[index] for index in sorted(order[:most])]


def as_record(example: Example) -> dict:
    """An example as the data files hold it."""
    own = {key: getattr(example, key) for key in ("instruction", "input", "output", "answer", "task_id")}
    return own | example.extra


@dataclasses.dataclass(frozen=True)
class Sample:
    """Training examples or test sets of a study.

    path: as flags name it. sha256: of the files that are read, of each task's test set or of ``train``;
    source_sha256: of the user's files that they are taken from. counts, of: how many are kept of how many, by task.
    content: the files to write, none where the user's own are read.
    """

    path: Path
    sha256: dict[str, str]
    source_sha256: dict[str, str]
    counts: dict[str, int]
    of: dict[str, int]
    content: dict[Path, bytes]

    def write(self) -> None:
        """Write the files that are not there yet with these very bytes."""
        for path, content in self.content.items():
            if not path.is_file() or path.read_bytes() != content:
                files.write_all({path: content})


class Samples:
    """The data of a study: ``train(only)``, ``test`` and, for a search, ``dev``, each in the study's folder or the
    user's own where nothing is sampled. Raises ``UserError`` for data that are missing or wrong."""

    def __init__(self, grid: Grid, folder: Path):
        self._grid, self._folder = grid, folder / "data"
        self._source = Path(grid.train.get("data_path", TrainConfig().data_path))
        if not self._source.is_file():
            raise UserError(f"the training examples {self._source} do not exist; {self._way_out()}")
        self._train: dict[tuple[str, ...], Sample] = {}
        self._examples: dict[str, list[Example]] = {name: [] for name in grid.tasks.names}
        for example in load_examples(self._source, grid.tasks):
            self._examples[grid.tasks[example.task_id].name].append(example)
        self.test = self._questions(Path(grid.test_dir), grid.test_records, "test")
        self.dev = None
        if grid.search:
            self.dev = self._questions(Path(grid.search.data_dir), grid.search.records, "dev")
            test = self.test.source_sha256
            if shared := [name for name, digest in self.dev.source_sha256.items() if digest == test[name]]:
                raise UserError(
                    f"the grid {grid.path}, search: {grid.search.data_dir} and {grid.test_dir} hold the same questions "
                    f"of {', '.join(shared)}; choose by a development set"
                )

    def train(self, only: tuple[str, ...] = ()) -> Sample:
        """The training examples, of all tasks or ``only`` of some."""
        if only not in self._train:
            self._train[only] = self._training(only)
        return self._train[only]

    def _training(self, only: tuple[str, ...]) -> Sample:
        most = self._grid.train_records
        if missing := [name for name in only if not self._examples[name]]:
            raise UserError(f"{self._source} has no examples of {', '.join(missing)}")
        chosen = {name: kept for name, kept in self._examples.items() if kept and (not only or name in only)}
        of = {name: len(examples) for name, examples in chosen.items()}
        source = {"train": files.sha256(self._source)}
        if not only and not most:
            return Sample(self._source, source, source, of, of, {})
        kept = {name: sample(examples, most, name) for name, examples in chosen.items()}
        path = self._folder / ("_".join(["train", *only]) + ".json")
        content = files.records_bytes([as_record(example) for examples in kept.values() for example in examples])
        counts = {name: len(examples) for name, examples in kept.items()}
        return Sample(path, {"train": files.sha256_of(content)}, source, counts, of, {path: content})

    def _questions(self, source: Path, most: int, name: str) -> Sample:
        """The questions of every task that is scored: the user's folder, or a sample of it in the study's."""
        target = self._folder / name if most else source
        hashes, sources, counts, of, contents = {}, {}, {}, {}, {}
        for task in self._grid.scored_tasks:
            path = source / task / "test.json"
            if not path.is_file():
                raise UserError(f"there is no test file {path}; {self._way_out()}")
            examples = load_examples(path, self._grid.tasks, task, closed=True)
            kept = sample(examples, most, task)
            hashes[task] = sources[task] = files.sha256(path)
            counts[task], of[task] = len(kept), len(examples)
            if most:
                content = files.records_bytes([as_record(example) for example in kept])
                hashes[task], contents[target / task / "test.json"] = files.sha256_of(content), content
        return Sample(target, hashes, sources, counts, of, contents)

    def _way_out(self) -> str:
        prepare = self._grid.prepare
        return f"make them with `{prepare}`" if prepare else "name their place in the grid"


@dataclasses.dataclass(frozen=True)
class Job:
    """One training and its evaluation in one folder; ``train`` None: an evaluation of the base model alone.

    label: for progress lines. kind: jobs of one kind take about as long. train, evaluate: flags of the two commands.
    data: the samples that are read, by name. base_fingerprint: of the base model's weights, where it is known.
    """

    label: str
    kind: str
    folder: Path
    train: dict | None
    evaluate: dict
    launcher: str
    data: dict[str, Sample]
    tasks: TaskSet
    base_fingerprint: str | None = None

    @functools.cached_property
    def configuration(self) -> dict[str, object]:
        """What decides the result, flat: ``train.lora_r``, ..., data, tasks and base model by their hashes."""
        found = {f"the {name} data (sha256)": data.sha256 for name, data in self.data.items()}
        found |= {"launcher": self.launcher, "tasks (sha256)": self.tasks.answers_sha256}
        found |= {"base model (fingerprint)": self.base_fingerprint} if self.base_fingerprint else {}
        for step in self.steps:
            found |= {f"{step}.{name}": value for name, value in getattr(self, step).items()}
        return _complete(found)

    def changes(self, earlier: dict[str, object]) -> dict[str, tuple[object, object]]:
        """Keys in which the configuration that a folder was made by differs from this one: what it was, what it is.

        ``earlier`` may be of an earlier version; fingerprints are compared where both are known.
        """
        then, now = _complete(earlier), dict(self.configuration)
        if then.keys() ^ now.keys() >= {"base model (fingerprint)"}:
            then.pop("base model (fingerprint)", None), now.pop("base model (fingerprint)", None)
        keys = sorted(then.keys() | now.keys())
        return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}

    @staticmethod
    def keeps_training(changes: Iterable[str]) -> bool:
        """Whether such changes leave the trained weights as they are."""
        return all(key.startswith("evaluate.") or key == "the test data (sha256)" for key in changes)

    @property
    def steps(self) -> list[str]:
        """The names of the commands."""
        return ["train", "evaluate"] if self.train is not None else ["evaluate"]

    @property
    def commands(self) -> list[str]:
        """The command lines, as one would type them."""
        return [shlex.join(self.command(step)) for step in self.steps]

    def command(self, step: str, launcher: str | None = None, **more) -> list[str]:
        """The words of a command, ``train`` or ``evaluate``, with ``more`` flags; launcher: instead of the job's."""
        words = shlex.split(launcher or self.launcher)
        # DeepSpeed's launcher has its own flag for a module, and would put --local_rank before the command's name.
        words += ["--no_local_rank", "--module"] if Path(words[0]).name == "deepspeed" else ["-m"]
        words += ["mtl_lora", step]
        for name, value in (getattr(self, step) | more).items():
            words += [f"--{name}", _spelled(value)]
        return words


def _complete(configuration: dict[str, object]) -> dict[str, object]:
    """A job's configuration with every flag that decides its result, those left at their default included.

    It may be one that version 0.1.0 wrote: with the given flags alone and the whole task set, titles included.
    """
    found = {key: value for key, value in configuration.items() if key.partition(".")[0] not in _DECIDING}
    if "tasks" in found:
        found["tasks (sha256)"] = TaskSet.from_json(found.pop("tasks"), "the task set of a job").answers_sha256
    for step, (config, effect) in _DECIDING.items():
        names = config.names_affecting(effect) - _PLACES
        if any(key.startswith(f"{step}.") for key in configuration):
            defaults = {f"{step}.{field.name}": default_of(field) for field in dataclasses.fields(config) if field.name in names}
            found |= {key: configuration.get(key, default) for key, default in defaults.items()}
    return found


def _spelled(value: object) -> str:
    """A flag's value as the command line reads it."""
    if isinstance(value, list):
        plain = all(not set(entry) & set(",[]'\"") for entry in value)
        return ",".join(value) if plain else json.dumps(value)
    return "none" if value is None else str(value)


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with one seed: one job, or with ``alone`` one for every task. value: of the searched flag."""

    experiment: Experiment
    seed: int | None
    folder: Path
    jobs: tuple[Job, ...]
    value: float | None = None


class Plan:
    """Makes the runs of a study in a folder; raises ``UserError`` for wrong data and flags.

    base_fingerprint: of the base model's weights, read once by ``read_fingerprint``.
    """

    def __init__(self, grid: Grid, folder: Path):
        self.grid, self.folder, self.samples = grid, folder, Samples(grid, folder)
        self.base_fingerprint: str | None = None

    def read_fingerprint(self) -> None:
        """Make the base model's weights part of every configuration, if they are on this machine."""
        from mtl_lora.base_model import BaseModel  # with torch, which a study needs for nothing else

        trust = self.grid.train.get("trust_remote_code", False)
        self.base_fingerprint = BaseModel(self.grid.base_model, trust).local_fingerprint()

    def run(self, experiment: Experiment, seed: int | None, chosen: float | None = None) -> Run:
        """One run; ``chosen``: the value that the search gave its flag."""
        folder = self.folder / "runs" / experiment.slug
        folder = folder if seed is None else folder / f"seed{seed}"
        label = experiment.name if seed is None else f"{experiment.name} seed {seed}"
        changes = {} if chosen is None else {self.grid.search.flag: self._typed(chosen)}
        jobs = self._jobs(experiment, seed, folder, label, "run", changes, self.samples.test)
        return Run(experiment, seed, folder, tuple(jobs), chosen)

    def trials(self, experiment: Experiment) -> list[Run]:
        """The short trainings of the search, one for each value."""
        search, runs = self.grid.search, []
        for value in search.values:
            folder = self.folder / "search" / experiment.slug / f"{search.flag}_{value:g}"
            label = f"{experiment.name} {search.flag} {value:g} (search)"
            changes = {**search.train, search.flag: self._typed(value)}
            jobs = self._jobs(experiment, search.seed, folder, label, "search", changes, self.samples.dev)
            runs.append(Run(experiment, search.seed, folder, tuple(jobs), value))
        return runs

    def _typed(self, value: float) -> float | int:
        """A whole number where the searched flag is one."""
        whole = type(getattr(TrainConfig(), self.grid.search.flag)) is int
        return int(value) if whole and value == int(value) else value

    def _jobs(self, experiment: Experiment, seed, folder: Path, label: str, stage: str, changes: dict, test: Sample) -> Iterator[Job]:
        """The jobs of a run. stage: ``run`` or ``search``; changes: flags over those of the experiment."""
        for task in experiment.only_tasks or list(test.counts) if experiment.alone else [None]:
            only = (task,) if task else tuple(experiment.only_tasks)
            own, name = (folder / task, f"{label} {task}") if task else (folder, label)
            train, evaluate, data = self._flags(experiment, seed, own, changes, only, test)
            if task:
                evaluate["tasks"] = [task]
            where = f"the grid {self.grid.path}, experiment {experiment.name!r}"
            if train is not None:
                TrainConfig.from_json(train, f"{where}, train")
            EvalConfig.from_json(evaluate, f"{where}, evaluate")
            yield Job(
                label=name,
                kind=f"{stage} {experiment.name}",
                folder=own,
                train=train,
                evaluate=evaluate,
                launcher=self.grid.launcher,
                data=data,
                tasks=self.grid.tasks,
                base_fingerprint=self.base_fingerprint,
            )

    def _flags(self, experiment: Experiment, seed, folder: Path, changes: dict, only: tuple[str, ...], test: Sample) -> tuple[dict | None, dict, dict[str, Sample]]:
        """The flags of a job's training (None for the base model alone) and evaluation, and the samples they read."""
        common = {"base_model": self.grid.base_model, **self.grid.train}
        train, data = None, {"test": test}
        evaluate = {key: common[key] for key in FROM_TRAIN if key in common}
        if experiment.train is not None:
            data = {"train": self.samples.train(only), **data}
            train = {**common, **experiment.train, **changes}
            train |= {"data_path": str(data["train"].path), "output_dir": str(folder), "seed": seed}
            evaluate = {"checkpoint": str(folder)}
        evaluate |= {**self.grid.evaluate, **experiment.evaluate}
        evaluate |= {"data_dir": str(test.path), "output_dir": str(folder), "name": experiment.name}
        return train, evaluate, data


def describe(plan: Plan, chosen: Sequence[Experiment], trials: dict[str, list[Run]]) -> str:
    """What ``--check`` prints: a few lines an experiment, with its trainable parameters and command lines."""
    from mtl_lora.base_model import BaseModel

    grid = plan.grid
    model = BaseModel(grid.base_model, grid.train.get("trust_remote_code", False))
    lines, total = [f"{grid.name}: {grid.about}"], 0
    for name, runs in trials.items():
        count = sum(len(run.jobs) for run in runs)
        values = ", ".join(f"{run.value:g}" for run in runs)
        lines.append(f"search of {grid.search.flag} for {name}: {values}; runs: {count}")
        total += count
    for experiment in chosen:
        jobs = [job for seed in grid.seeds_of(experiment) for job in plan.run(experiment, seed).jobs]
        facts = f"{experiment.name}; runs: {len(jobs)}"
        if jobs[0].train:
            try:
                count = model.count(TrainConfig(**jobs[0].train).adapter_config(grid.tasks))
                facts += f", trainable parameters, M (%): {trainable_text(*count)}"
            except UserError as error:
                facts += f", trainable parameters not counted ({error})"
        lines += [facts, *(f"    {command}" for command in jobs[0].commands)]
        total += len(jobs)
    return "\n".join([*lines, f"every job's flags are valid; {total} runs in {plan.folder}"])
