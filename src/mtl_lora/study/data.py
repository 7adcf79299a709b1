"""The records of a study: fixed samples of training, development and test sets, the same for every experiment."""

import dataclasses
import random
import threading
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.examples import Example, load_examples
from mtl_lora.language.tasks import TaskSet
from mtl_lora.study.grid import Study

SAMPLE_SEED = 0
_WRITING = threading.Lock()  # jobs that run side by side read the same parts


def sample(examples: Sequence[Example], most: int, task: str) -> list[Example]:
    """``most`` examples (0: all) of one task in their own order: the first of a shuffle, so a larger sample adds."""
    if not most:
        return list(examples)
    order = list(range(len(examples)))
    random.Random(f"{SAMPLE_SEED} {task}").shuffle(order)
    return [examples[index] for index in sorted(order[:most])]


def as_record(example: Example) -> dict:
    """An example as the data files hold it."""
    return {
        "instruction": example.instruction,
        "input": example.input,
        "output": example.output,
        "answer": example.answer,
        "task_id": example.task_id,
        **example.extra,
    }


@dataclasses.dataclass(frozen=True)
class Part:
    """Training records or test sets of a study.

    path: as flags name it. sha256: of the files that are read, of each task's test set or of ``train``; source: of the
    user's own files that they are from. counts, of: records that are kept and that there are, by task. content: the
    files to write, none where the user's own are read.
    """

    path: Path
    sha256: dict[str, str]
    source: dict[str, str]
    counts: dict[str, int]
    of: dict[str, int]
    content: dict[Path, bytes]


class StudyData:
    """The data files of a study in its folder (or the user's own, where nothing is sampled)."""

    def __init__(self, study: Study, folder: Path):
        self.study, self.folder = study, folder / "data"
        grid = study.grid
        self.source = Path(grid.train.get("data_path", TrainConfig().data_path))
        if not self.source.is_file():
            raise UserError(f"the training records {self.source} do not exist; {self._way_out()}")
        self._parts: dict[tuple[str, ...], Part] = {}
        self._source_sha256 = files.sha256(self.source)
        self._examples = _by_task(load_examples(self.source, study.tasks), study.tasks)
        test_dir = grid.evaluate.get("data_dir", EvalConfig(base_model="none").data_dir)
        self.test = self._questions(Path(test_dir), grid.test_records, "test")
        self.dev = None
        if study.search:
            self.dev = self._questions(Path(study.search.data_dir), study.search.records, "dev")
            if shared := [name for name, digest in self.dev.source.items() if digest == self.test.source[name]]:
                raise UserError(
                    f"the grid {study.path}, search: {study.search.data_dir} and {test_dir} hold the same records of "
                    f"{', '.join(shared)}; choose by a development set"
                )

    def train(self, only: tuple[str, ...] = ()) -> Part:
        """The training records, of all tasks or ``only`` of some."""
        if only not in self._parts:
            self._parts[only] = self._train(only)
        return self._parts[only]

    def _train(self, only: tuple[str, ...]) -> Part:
        most = self.study.grid.train_records
        of = {name: len(examples) for name, examples in self._examples.items() if not only or name in only}
        if missing := [name for name in only if not self._examples.get(name)]:
            raise UserError(f"{self.source} has no records of {', '.join(missing)}")
        source = {"train": self._source_sha256}
        if not only and not most:
            return Part(self.source, source, source, of, of, {})
        kept = {name: sample(self._examples[name], most, name) for name in of}
        path = self.folder / ("_".join(["train", *only]) + ".json")
        content = files.records_bytes([as_record(example) for name in kept for example in kept[name]])
        counts = {name: len(examples) for name, examples in kept.items()}
        return Part(path, {"train": files.sha256_of(content)}, source, counts, of, {path: content})

    def _questions(self, source: Path, most: int, name: str) -> Part:
        """The questions of every task that is asked: the user's folder, or a sample of it in the study's."""
        asked = self.study.grid.evaluate.get("tasks") or self.study.tasks.names
        target = self.folder / name if most else source
        hashes, sources, counts, of, contents = {}, {}, {}, {}, {}
        for task in asked:
            path = source / task / "test.json"
            if not path.is_file():
                raise UserError(f"there is no test file {path}; {self._way_out()}")
            examples = load_examples(path, self.study.tasks, task, closed=True)
            kept = sample(examples, most, task)
            hashes[task] = sources[task] = files.sha256(path)
            counts[task], of[task] = len(kept), len(examples)
            if most:
                content = files.records_bytes([as_record(example) for example in kept])
                hashes[task], contents[target / task / "test.json"] = files.sha256_of(content), content
        return Part(target, hashes, sources, counts, of, contents)

    def _way_out(self) -> str:
        prepare = self.study.grid.prepare
        return f"make them with `{prepare}`" if prepare else "say where they are in the grid"


def _by_task(examples: Sequence[Example], tasks: TaskSet) -> dict[str, list[Example]]:
    found = {name: [] for name in tasks.names}
    for example in examples:
        found[tasks[example.task_id].name].append(example)
    return {name: kept for name, kept in found.items() if kept}


def write(part: Part) -> None:
    """Write the part's files that are not there yet with these very bytes."""
    with _WRITING:
        for path, content in part.content.items():
            if not path.is_file() or path.read_bytes() != content:
                files.write_all({path: content})
