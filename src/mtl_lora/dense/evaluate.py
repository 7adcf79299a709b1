"""``mtl-lora evaluate`` and ``predict`` for dense tasks: one forward gives all maps of an image.

For each image and task an evaluation stores a row of sums (see ``metrics``), from which it resumes. Maps are stored
only with ``save_maps``.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mtl_lora import artifacts, evaluation, files
from mtl_lora.answer_config import AUTO
from mtl_lora.config import is_number
from mtl_lora.dense import model as dense
from mtl_lora.dense.config import MAPS, AnswerConfig, EvalConfig, PredictConfig, TrainConfig
from mtl_lora.dense.data import DenseDataset, Warp, image_tensor, pixels_of
from mtl_lora.dense.metrics import counts, task_result
from mtl_lora.dense.pictures import map_of, rows_of, write_map, write_sheet
from mtl_lora.dense.tasks import Task, TaskSet
from mtl_lora.errors import UserError
from mtl_lora.evaluation import QuestionSets
from mtl_lora.images import find_images, require_readable
from mtl_lora.results import Comparability, Results, TaskResult
from mtl_lora.tasks import grouped

IMAGES, GPU_IMAGES = 4, 32  # images per batch with --batch_size auto, without and with a GPU


@dataclasses.dataclass
class Question:
    """One map of one image. answer: hash of its label files. prompt_sha256: hash of the image file. place: where to
    save the predicted map, or None."""

    task: Task
    index: int
    answer: str
    prompt_sha256: str
    place: Path | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The task's name and the image's index, unique within an evaluation."""
        return self.task.name, self.index

    def line(self, row: list[float]) -> dict:
        """Return the question's prediction line. row: of ``metrics.counts``."""
        hashes = {"answer": self.answer, "prompt_sha256": self.prompt_sha256}
        saved = {"map": True} if self.place else {}
        return {"task": self.task.name, "index": self.index, "counts": row} | hashes | saved

    def answered_by(self, line: Mapping | None) -> bool:
        """Return whether a line is for this image and label, and the map exists if it must be saved."""
        counts = line and line.get("counts")
        is_valid = isinstance(counts, list) and all(map(is_number, counts))
        same = is_valid and (line.get("answer"), line.get("prompt_sha256")) == (self.answer, self.prompt_sha256)
        # A map file that the line does not record belongs to another evaluation.
        return same and (self.place is None or (line.get("map") is True and self.place.is_file()))

    def extract_again(self, line: dict) -> dict:
        """Return the line unchanged: sums need no extraction."""
        return line


class Evaluator(evaluation.Evaluator):
    """A trained model for maps and its tasks; raises ``UserError`` for bad settings before loading the model."""

    system, version = "dense", 1
    comparability = Comparability(["mode", "base_fingerprint", "image_size"])

    def __init__(self, config: AnswerConfig):
        self.config, path = config, config.checkpoint
        origin = self.read_checkpoint()
        self.tasks = TaskSet.from_json(origin.task_set, f"the task set of {path}")
        self.cutoff_len = None
        self.image_size = config.image_size or (origin.train_settings or {}).get("image_size") or TrainConfig.image_size
        if type(self.image_size) is not int or self.image_size < 8:
            raise UserError(f"{path}: the image_size of its training is {self.image_size!r}; pass --image_size")
        self.use_base(config.base_model or origin.base_model, origin)
        dense.structure(self.base_model, self.tasks, self.image_size)
        self.data: DenseDataset | None = None

    def settings(self, protocol: str) -> dict:
        found = super().settings(protocol) | {"image_size": self.image_size}
        del found["cutoff_len"]
        return found

    def ask(self) -> QuestionSets:
        """Return a question for each image and task of the test set, after checking its files; raises ``UserError``."""
        config = self.config
        tasks = self.tasks.only(config.tasks)
        settings = {"size": self.image_size, "missing_labels": config.missing_labels}
        self.data = DenseDataset(config.data_dir, config.split, tasks, **settings)
        found = QuestionSets(f"{Path(config.data_dir).resolve()}, {config.split}")
        for task in (self.tasks[name] for name in tasks.names):
            found.sha256[task.name], found.sizes[task.name] = self.data.sha256(task), len(self.data)
            for index, (image, label) in enumerate(self.data.hashes(task)[: config.limit or None]):
                name = f"{self.data.ids[index]}{task.suffix}"
                place = Path(config.output_folder, "maps", task.name, name) if config.save_maps else None
                found.questions.append(Question(task, index, label, image, place))
        return found

    def structure(self) -> torch.nn.Module:
        return dense.structure(self.base_model, self.tasks)

    def build(self) -> torch.nn.Module:
        return dense.load(self.base_model, self.tasks, self.config.dtype)

    def batches(self, questions: Sequence[Question], protocol: str) -> list[list[Question]]:
        """Return batches of images, with all maps of an image in one batch, because one forward gives them all."""
        size = self.config.batch_size
        if size == AUTO:
            size = GPU_IMAGES if torch.cuda.is_available() else IMAGES
        ordered = sorted(questions, key=lambda question: question.index)
        parts = list(grouped(ordered, lambda question: question.index).values())
        return [list(itertools.chain(*parts[start : start + size])) for start in range(0, len(parts), size)]

    def tokens(self, question: Question, protocol: str) -> int:
        return 1  # all images have the same size

    @torch.inference_mode()
    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the decoders' outputs (B, channels, S, S) by task for images (B, 3, S, S).

        Raises ``UserError`` if an output is not finite.
        """
        outputs = self.model(images.to(next(self.model.parameters()).device))
        for name, output in outputs.items():
            if not output.isfinite().all():
                raise evaluation.not_finite(f"a map of {name} has values")
        return outputs

    def predicted(
        self, images: Sequence[str | Path | Image.Image]
    ) -> Iterator[tuple[torch.Tensor, dict[str, np.ndarray]]]:
        """Yield each image as the model sees it (3, S, S), upright as its EXIF data say, and maps at its own size."""
        images, task = list(images), next(iter(self.tasks))  # one forward gives the maps of all tasks
        for batch in self.batches([Question(task, index, "", "") for index in range(len(images))], MAPS):
            read = {question.index: self._read(images[question.index]) for question in batch}
            self.load()
            outputs = self.in_halves(functools.partial(self._outputs, read), batch, MAPS)
            # Maps one image at a time: they have its own size, which may be a hundred times the model's.
            for (shown, shape), output in zip(read.values(), outputs, strict=True):
                yield shown, {task.name: map_of(task, output[task.name], shape) for task in self.tasks}

    def _read(self, image: str | Path | Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        pixels, shape = pixels_of(image, self.image_size)
        return image_tensor(pixels, Warp(), self.image_size, shape), shape

    def _outputs(self, read: Mapping[int, tuple], questions: Sequence[Question]) -> list[dict[str, torch.Tensor]]:
        outputs = self.maps(torch.stack([read[question.index][0] for question in questions]))
        # Not on the GPU, where the first half would take the room of the second.
        return [{name: output[place].cpu() for name, output in outputs.items()} for place in range(len(questions))]

    def answer(self, questions: Sequence[Question], protocol: str) -> list[dict]:
        return self.in_halves(self._answers, questions, protocol)

    def _answers(self, questions: list[Question]) -> list[dict]:
        items = {index: self.data[index] for index in dict.fromkeys(question.index for question in questions)}
        outputs = self.maps(torch.stack([item["image"] for item in items.values()]))
        place = {index: number for number, index in enumerate(items)}
        lines = []
        for question in questions:
            task, output = question.task, outputs[question.task.name][place[question.index]]
            label = items[question.index]["labels"][task.name].to(output.device)
            if question.place:
                write_map(map_of(task, output, items[question.index]["shape"]), task, question.place)
            lines.append(question.line(counts(task, output, label)))
        return lines

    def task_result(self, task: Task, lines: Sequence[dict]) -> TaskResult:
        return task_result(task, lines, self.config.official)

    def finish(self, asked: QuestionSets, results: dict[str, Results]) -> None:
        """Write a picture of the first images of the test set with their labels and maps."""
        if not self.config.sheet:
            return
        self.load()
        rows = []
        for index in range(min(self.config.sheet, len(self.data))):
            item = self.data[index]
            outputs = self.maps(item["image"][None])
            tasks = [task for task in self.tasks if task.name in item["labels"]]
            found = {task.name: map_of(task, outputs[task.name][0]) for task in tasks}
            rows += rows_of(item["image"], tasks, found, item["labels"])
        write_sheet(rows, Path(self.config.output_folder) / artifacts.SHEET)


def run(config: EvalConfig) -> dict[str, Results]:
    """Evaluate as ``config`` says, see ``evaluation.evaluate``."""
    evaluator = Evaluator(config)
    return evaluation.evaluate(evaluator, evaluator.ask())


# ---- prediction ----


class Predictor(evaluation.Predictor):
    """Predicts the maps of images in Python; the model is loaded on the first call.

        predictor = Predictor("output/mtlora")
        predictor.predict(["a.jpg"])        # [{"semseg": (H, W) class indices, "normals": (H, W, 3), ...}]

    Its arguments are those of ``evaluation.Predictor``.
    """

    evaluator_class, config_class = Evaluator, AnswerConfig

    def predict(self, images: Sequence[str | Path | Image.Image]) -> list[dict[str, np.ndarray]]:
        """Return the maps of each image by task, at the image's own size, see ``map_of``."""
        if isinstance(images, str | Path | Image.Image):
            raise UserError("predict takes a list of images; put a single image into brackets")
        return [maps for _, maps in self.evaluator.predicted(images)]


def predict(config: PredictConfig) -> None:
    """Write the maps of all input images, and a sheet of them, as a complete output folder or not at all."""
    if (source := Path(config.input)).is_file():
        require_readable(paths := [source])
    else:
        paths = list(find_images(source, "--input", False).values())
    evaluator = Evaluator(config)
    output = config.output, ["*.png", "*.npy"], config.overwrite, [config.input], True
    if config.check:
        files.check_output(*output)
        print(f"every setting is fine; {len(paths):,} images")
        return
    rows, size = [], (evaluator.image_size,) * 2
    with files.atomic_directory(*output) as made:
        bar = tqdm(paths, unit=" images")
        for path, (shown, maps) in zip(bar, evaluator.predicted(paths), strict=True):
            for task in evaluator.tasks:
                write_map(maps[task.name], task, made / task.name / f"{path.stem}{task.suffix}")
            if len(rows) < config.sheet:
                small = {name: _small(found, size) for name, found in maps.items()}
                rows += rows_of(shown, list(evaluator.tasks), small)
        if rows:
            write_sheet(rows, made / artifacts.SHEET)
    print(f"maps of {len(paths):,} images in {config.output}")


def _small(found: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map resized to the sheet's picture size by nearest pixels."""
    rows, columns = (np.arange(side) * whole // side for side, whole in zip(size, found.shape, strict=False))
    return found[rows[:, None], columns]
