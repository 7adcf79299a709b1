"""Fixed samples of training examples and questions, the same for every experiment of a study, of any system."""

import functools
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from mtl_lora import files
from mtl_lora.data_files import data_file
from mtl_lora.errors import UserError
from mtl_lora.results import Sample
from mtl_lora.tasks import TaskSet


class Example(Protocol):
    """What a sample knows of a system's example; ``record`` is what the system reads it back from."""

    task_id: int

    def record(self) -> dict: ...


SAMPLE_SEED = 0


class Data(Protocol):
    """Where a study's examples and questions come from; a system says so by ``examples.DATA``, made of its task set."""

    def __init__(self, tasks: TaskSet): ...

    def files(self, source: Path, names: Sequence[str] | None = None) -> list[Path]:
        """What must be there of training examples or, with ``names``, of the questions of these tasks."""

    def training(self, source: Path, folder: Path, most: int, only: Collection[str] = ()) -> Sample:
        """``most`` (0: all) of the training examples of each task, of all tasks or ``only`` of some. Raises
        ``UserError`` for a task of ``only`` that has none."""

    def questions(self, source: Path, folder: Path, names: Sequence[str], most: int) -> Sample:
        """``most`` (0: all) of the questions of each task in ``names``."""

    def flags(self, sample: Sample, only: Collection[str]) -> dict[str, object]:
        """Those of a training on the sample."""


def sampled(examples: Sequence[Example], most: int, task: str) -> list[Example]:
    """``most`` examples (0: all) of one task in the file's order: the first of a shuffle, so a larger sample adds."""
    order = list(range(len(examples)))
    random.Random(f"{SAMPLE_SEED} {task}").shuffle(order)
    return [examples[index] for index in sorted(order[: most or None])]


class Records:
    """Examples that are records of files, read by ``load``, a system's ``load_examples``. Where a sample is every
    example, the file itself is read, else one in ``folder``. Errors and arguments as ``Data``."""

    def __init__(self, load: Callable[..., Sequence[Example]], tasks: TaskSet):
        self.load, self.tasks = load, tasks
        self._read = functools.cache(load)  # the training examples, once for all samples

    def files(self, source: Path, names: Sequence[str] | None = None) -> list[Path]:
        return [source] if names is None else [data_file(source / name, "test") for name in names]

    def training(self, source: Path, folder: Path, most: int, only: Collection[str] = ()) -> Sample:
        by_task: dict[str, list[Example]] = {name: [] for name in self.tasks.names}
        for example in self._read(source, self.tasks):
            by_task[self.tasks[example.task_id].name].append(example)
        if missing := [name for name in only if not by_task[name]]:
            raise UserError(f"{source} has no examples of {', '.join(missing)}")
        chosen = {name: found for name, found in by_task.items() if found and name in (only or by_task)}
        # No name of a task holds a plus.
        label = "+".join(only)
        label = label if len(label) < 225 else files.sha256_of(label.encode())[:16]
        path = folder / f"train{'_' * bool(only)}{label}.json" if only or most else source
        return _sample(path, {"train": (source, path, chosen)}, most)

    def questions(self, source: Path, folder: Path, names: Sequence[str], most: int) -> Sample:
        path, sets = folder if most else source, {}
        for name in names:
            file, target = data_file(source / name, "test"), path / name / "test.json"
            sets[name] = file, target if most else file, {name: self.load(file, self.tasks, name, closed=True)}
        return _sample(path, sets, most)

    def flags(self, sample: Sample, only: Collection[str]) -> dict[str, object]:
        return {"data_path": str(sample.path)}


def _sample(path: Path, sets: dict[str, tuple[Path, Path, dict[str, list[Example]]]], most: int) -> Sample:
    """sets: by name, the file to read, the one to write, and the examples by task."""
    sample = Sample({}, {}, {}, {}, path)
    for name, (source, target, by_task) in sets.items():
        kept = {task: sampled(examples, most, task) for task, examples in by_task.items()}
        sample.records.update((task, len(examples)) for task, examples in kept.items())
        sample.of.update((task, len(examples)) for task, examples in by_task.items())
        sample.sha256[name] = sample.source_sha256[name] = files.sha256(source)
        if target == source:
            sample.own[source] = sample.sha256[name]
        else:
            examples = [example for examples in kept.values() for example in examples]
            sample.content[target] = files.records_bytes([example.record() for example in examples])
            sample.sha256[name] = files.sha256_of(sample.content[target])
    return sample
