"""The data of a study of dense tasks: complete folders of images with their maps."""

import functools
from collections.abc import Collection, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.dense.data import DenseDataset
from mtl_lora.dense.layouts import layout_of
from mtl_lora.dense.tasks import TaskSet
from mtl_lora.errors import UserError
from mtl_lora.results import Sample


class Images:
    """Reads the complete splits of a folder in place, without sampling. Arguments and errors as ``samples.Records``."""

    def __init__(self, tasks: TaskSet):
        self.tasks = tasks
        # Cached because it reads images and hashes every file.
        self._training = functools.cache(lambda source: _folder(source, "train", tasks))

    def files(self, source: Path, names: Sequence[str] | None = None) -> list[Path]:
        return [layout_of(source).split_file("train" if names is None else "test")] if source.is_dir() else [source]

    def training(self, source: Path, folder: Path, most: int, only: Collection[str] = ()) -> Sample:
        _refuse_sampling(source, most)
        found = _sample(self._training(source), source, only)
        whole = files.sha256_of("".join(found.sha256.values()).encode())
        return Sample(found.records, found.of, {"train": whole}, {"train": whole}, source)

    def questions(self, source: Path, folder: Path, names: Sequence[str], most: int) -> Sample:
        _refuse_sampling(source, most)
        return _sample(_folder(source, "test", self.tasks.only([*names])), source)

    def flags(self, sample: Sample, only: Collection[str]) -> dict[str, object]:
        return {"data_path": str(sample.path)} | ({"tasks": [*only]} if only else {})


def _refuse_sampling(source: Path, most: int) -> None:
    if most:
        raise UserError(
            f"images of dense tasks cannot be sampled; make a smaller {source}, and leave out train_records, "
            "test_records and the search's records"
        )


def _folder(source: Path, split: str, tasks: TaskSet) -> DenseDataset:
    # The commands that a study runs check for missing labels themselves.
    return DenseDataset(source, split, tasks, missing_labels=True)


def _sample(data: DenseDataset, source: Path, names: Collection[str] = ()) -> Sample:
    """Return per task the number of images, and a hash of the images and their maps. names: the tasks; empty: all."""
    tasks = [task for task in data.tasks if task.name in (names or data.tasks.names)]
    counts = {task.name: len(data) for task in tasks}
    hashes = {task.name: data.sha256(task) for task in tasks}
    return Sample(counts, counts, hashes, hashes, source)


DATA = Images
