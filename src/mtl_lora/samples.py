"""Fixed samples of training examples and questions, the same for all experiments of a study; for every system."""

import functools
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.data_files import data_file
from mtl_lora.errors import UserError
from mtl_lora.results import Sample
from mtl_lora.tasks import TaskSet

SAMPLE_SEED = 0


def sampled(examples: Sequence, most: int, task: str) -> list:
    """Return ``most`` examples (0: all) of one task in the file's order; a larger sample contains every smaller one."""
    order = list(range(len(examples)))
    random.Random(f"{SAMPLE_SEED} {task}").shuffle(order)
    return [examples[index] for index in sorted(order[: most or None])]


class Records:
    """The source of a study's examples and questions: records of files, read by ``load``, a system's ``load_examples``.

    A sample of all examples is the source file itself; any other sample is a file in ``folder``. A system without
    records has another class with these methods as its ``examples.DATA``.
    """

    def __init__(self, load: Callable[..., Sequence], tasks: TaskSet):
        self.load, self.tasks = load, tasks
        self._read = functools.cache(load)  # the training examples, once for all samples

    def files(self, source: Path, names: Sequence[str] | None = None) -> list[Path]:
        """Return the files that must exist: the training examples or, with ``names``, the test files of these tasks."""
        return [source] if names is None else [data_file(source / name, "test") for name in names]

    def training(self, source: Path, folder: Path, most: int, only: Collection[str] = ()) -> Sample:
        """Return at most ``most`` (0: all) training examples of each task, of the tasks ``only`` (empty: all). Raises
        ``UserError`` for a task of ``only`` without examples."""
        by_task: dict[str, list] = {name: [] for name in self.tasks.names}
        for example in self._read(source, self.tasks):
            by_task[self.tasks[example.task_id].name].append(example)
        if missing := [name for name in only if not by_task[name]]:
            raise UserError(f"{source} has no examples of {', '.join(missing)}")
        chosen = {name: found for name, found in by_task.items() if found and name in (only or by_task)}
        # "+" separates the names, because no task name contains it.
        label = "+".join(only)
        label = label if len(label) < 225 else files.sha256_of(label.encode())[:16]
        path = folder / f"train{'_' * bool(only)}{label}.json" if only or most else source
        return _sample(path, {"train": (source, path, chosen)}, most)

    def questions(self, source: Path, folder: Path, names: Sequence[str], most: int) -> Sample:
        """Return at most ``most`` (0: all) questions of each task in ``names``."""
        path, sets = folder if most else source, {}
        for name in names:
            file, target = data_file(source / name, "test"), path / name / "test.json"
            sets[name] = file, target if most else file, {name: self.load(file, self.tasks, name, closed=True)}
        return _sample(path, sets, most)

    def flags(self, sample: Sample, only: Collection[str]) -> dict[str, object]:
        """Return the flags of a training run on the sample."""
        return {"data_path": str(sample.path)}


def _sample(path: Path, sets: dict[str, tuple[Path, Path, dict[str, list]]], most: int) -> Sample:
    """Return the sample at ``path``. sets: name -> (file to read, file to write, examples by task)."""
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
