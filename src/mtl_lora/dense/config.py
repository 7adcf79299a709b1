"""The flags of train, evaluate and predict for dense tasks, as validated dataclasses."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora import answer_config
from mtl_lora.answer_config import EvaluationFlags, PredictionFlags
from mtl_lora.config import REQUIRED, flag
from mtl_lora.errors import UserError
from mtl_lora.training.config import SCHEDULES, TrainingConfig

if TYPE_CHECKING:
    from mtl_lora.dense.tasks import TaskSet

_OF_OTHERS = (
    "task",
    "token_budget",
    "sampling_temperature",
    "val_set_size",
    "load_in_4bit",
    "deepspeed",
    "cuda_graphs",
)
MAPS = "maps"  # the protocol: a map of every pixel
_WARMUP = 0.1  # of the least learning rate: where the warm-up begins


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Everything that configures a training on maps of images."""

    system = "dense"
    has_streams = True
    idle = dict.fromkeys(_OF_OTHERS, "is of other systems and does nothing for dense")
    made_by = "mtl-lora prepare scenes"

    base_model: str = flag(
        "dinov2-small", "name or folder of a Swin or a DINOv2 of transformers; dinov2-small is fetched"
    )
    data_path: str = flag(
        "data/scenes/rendered", "folder of images and maps: this project's layout, PASCAL_MT or NYUD_MT"
    )
    tasks_file: str | None = flag(None, "JSON file that declares the tasks; none: those of the folder")
    tasks: list[str] = flag([], "tasks to train, as a,b; one is a single-task model; none: all")
    image_size: int = flag(448, "height and width of the model's images, in pixels", min=8)
    augmentation: str = flag("auto", "of the training images: none, flip, pascal or nyud; auto: by the folder's layout")
    missing_labels: bool = flag(False, "images may lack the map of a task, which then has no loss there")

    adapter_name: str = flag("mtlora", "method")
    lora_r: int = flag(16, "rank r of the adapter")
    lora_alpha: float = flag(64.0, "numerator of the scale alpha / r")
    lora_target_modules: list[str] = flag(
        ["all-linear"], "layers of each block to adapt, of qkv,o_proj,fc1,fc2; all-linear: all four"
    )
    downsampler: bool = flag(False, "an adapter on patch merging's reduction, which is else trained whole: MTLoRA+")
    train_extras: bool = flag(True, "with an adapter, train patch embedding, norms and relative positions whole too")
    drop_path: float | None = flag(None, "stochastic depth of the last block, less before it; none: the base model's")

    num_epochs: float = flag(20.0, "passes over the training images")
    lr_scheduler_type: str = flag("cosine", f"after the warm-up: {', '.join(SCHEDULES)}")
    min_lr_rate: float = flag(0.01, "where the cosine ends, of the peak learning rate", min=0)
    warmup_ratio: float = flag(1 / 15, "fraction of the steps with linear warm-up")
    weight_decay: float = flag(0.05, "AdamW weight decay; 0: off")
    max_grad_norm: float = flag(5.0, "gradient clipping norm; 0: off")
    workers: int = flag(0, "processes that read images; 0: the one that trains", affects="nothing", min=0)

    def validate(self) -> None:
        if self.drop_path is not None:
            self.require("drop_path", "at least 0 and below 1", 0 <= self.drop_path < 1)
        super().validate()

    def check_files(self) -> None:
        if not Path(self.data_path).is_dir():
            raise UserError(
                f"the folder {self.data_path} does not exist; make it with `{self.made_by}`, or pass --data_path DIR"
            )

    def read_tasks(self) -> "TaskSet":
        from mtl_lora.dense.layouts import layout_of
        from mtl_lora.dense.tasks import TaskSet

        self.check_files()
        found = TaskSet.load(self.tasks_file) if self.tasks_file else layout_of(self.data_path).tasks
        return found.only(self.tasks)

    def trainer_options(self) -> dict[str, object]:
        options = {"dataloader_num_workers": self.workers}
        if self.lr_scheduler_type == "cosine":
            rates = {"min_lr_rate": self.min_lr_rate, "warmup_lr_rate": _WARMUP * self.min_lr_rate}
            options |= {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": rates}
        return options


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(answer_config.AnswerConfig):
    """The flags that evaluate and predict share: which model answers, and how."""

    idle = dict.fromkeys(
        ("tasks_file", "cutoff_len", "load_in_4bit"), "does nothing for dense: the checkpoint has its tasks"
    )

    checkpoint: str = flag(REQUIRED, "folder of a training")
    base_model: str | None = flag(None, "where the checkpoint's base model lies, if that has moved")
    image_size: int | None = flag(None, "height and width of the model's images; none: as it was trained", min=8)
    sheet: int = flag(0, "images on a picture of inputs and maps, sheet.png; 0: none", min=0, affects="nothing")


@dataclasses.dataclass(kw_only=True)
class EvalConfig(EvaluationFlags, AnswerConfig):
    """Everything that configures an evaluation."""

    made_by = TrainConfig.made_by

    data_dir: str = flag(TrainConfig.data_path, "folder of images and maps, see train")
    split: str = flag("test", "images: those of test or of train", choices=("test", "train"))
    missing_labels: bool = flag(False, "images may lack the map of a task, for which they then do not count")
    save_maps: bool = flag(False, "write the maps too, below output_dir/maps/<task>", affects="nothing")
    official: bool = flag(
        False,
        "also list the values by the names that the original prints them under, mean angles as rmse",
        affects="nothing",
    )

    @property
    def protocols(self) -> dict[str, str]:
        """How questions are answered, with the folder of the results."""
        return {MAPS: self.output_folder}

    def closing_lines(self, found: Mapping) -> list[str]:
        if not self.official:
            return []
        lines = []
        for task, result in found[MAPS].tasks.items():
            shares, official = ("mIoU", "maxF"), result.measured["official"]
            values = ", ".join(
                f"{name} {value * (100 if name in shares else 1):.4f}" for name, value in official.items()
            )
            lines.append(f"{task} as the original prints it: {values or 'its loss alone'}")
        return [*lines, ""]


@dataclasses.dataclass(kw_only=True)
class PredictConfig(PredictionFlags, AnswerConfig):
    """Everything that configures a prediction."""

    idle = AnswerConfig.idle | {"task": "does nothing for dense: an image has the maps of all tasks"}

    input: str = flag(REQUIRED, "image, or folder of images")
    output: str = flag(REQUIRED, "folder for <task>/<image>.png or .npy, and sheet.png")
    sheet: int = flag(16, "images on the picture of inputs and maps, sheet.png; 0: none")

    def check_files(self) -> None:
        AnswerConfig.check_files(self)
        if not Path(self.input).exists():
            raise UserError(f"the input {self.input} does not exist; pass --input, an image or a folder of images")


# What the commands' help begins with.
TRAIN_ABOUT = "Train one vision transformer on several maps of an image, with MTLoRA or another low-rank adapter."
EVALUATE_ABOUT = "Score the maps of a trained vision transformer."
PREDICT_ABOUT = "Write the maps of images, and a picture of them, with a trained vision transformer."
