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

_NOT_FOR_DENSE = (
    "task",
    "cache_dir",
    "token_budget",
    "length_pool",
    "sampling_temperature",
    "val_set_size",
    "load_in_4bit",
    "deepspeed",
    "cuda_graphs",
)
MAPS = "maps"  # the protocol: predict a value for every pixel
_WARMUP = 0.1  # the learning rate at which warm-up begins, as a fraction of the rate at which the cosine ends


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Train one vision transformer to predict several maps, with MTLoRA or another low-rank adapter."""

    system = "dense"
    has_streams = True
    idle = dict.fromkeys(_NOT_FOR_DENSE, "has no effect with --system dense")
    made_by = "mtl-lora prepare scenes"

    base_model: str = flag(
        "dinov2-small", "name or folder of a transformers Swin or DINOv2; dinov2-small is downloaded"
    )
    data_path: str = flag(
        "data/scenes/rendered", "folder of images and maps: this project's layout, PASCAL_MT or NYUD_MT"
    )
    tasks_file: str | None = flag(None, "JSON file that declares the tasks; none: the folder's own")
    tasks: list[str] = flag([], "tasks to train, as a,b (one: a single-task model); empty: all", group="the images")
    image_size: int = flag(448, "height and width of the model's images, in pixels", min=8)
    augmentation: str = flag(
        "auto",
        "augmentation of training images: none, flip, pascal or nyud; auto: the layout's",
        choices=("none", "flip", "pascal", "nyud", "auto"),
    )
    missing_labels: bool = flag(False, "allow images without the map of a task, which then add nothing to its loss")

    adapter_name: str = flag("mtlora", "method")
    lora_r: int = flag(16, "rank r of the adapter")
    lora_alpha: float = flag(64.0, "numerator of the scale alpha / r")
    lora_target_modules: list[str] = flag(
        ["all-linear"], "layers of each block to adapt, among qkv,o_proj,fc1,fc2; all-linear: all four"
    )
    downsampler: bool = flag(
        False,
        "add an adapter to patch merging's reduction, otherwise fully trained (MTLoRA+)",
        group="the vision transformer",
    )
    train_extras: bool = flag(True, "with an adapter, also fully train patch embedding, norms and relative positions")
    drop_path: float | None = flag(
        None, "stochastic depth of the last block, smaller in earlier ones; none: the base model's"
    )

    num_epochs: float = flag(20.0, "passes over the training images")
    learning_rate: float = flag(
        3.125e-5,
        "peak learning rate of AdamW, by default the original's for a global batch of 32; short runs need more",
    )
    lr_scheduler_type: str = flag("cosine", f"schedule after the warm-up: {', '.join(SCHEDULES)}")
    min_lr_rate: float = flag(
        0.01, "learning rate at the end of the cosine, as a fraction of its peak", min=0, group="schedule and workers"
    )
    warmup_ratio: float = flag(1 / 15, "fraction of the steps with linear warm-up")
    weight_decay: float = flag(0.05, "AdamW weight decay; 0: off")
    max_grad_norm: float = flag(5.0, "gradient clipping norm; 0: off")
    workers: int = flag(0, "processes that read images; 0: the training process itself", affects="nothing", min=0)

    def validate(self) -> None:
        if self.drop_path is not None:
            self.require("drop_path", "at least 0 and below 1", 0 <= self.drop_path < 1)
        if self.lr_scheduler_type != "cosine" and self.min_lr_rate != TrainConfig.min_lr_rate:
            raise UserError("--min_lr_rate has no effect without --lr_scheduler_type cosine; leave it out")
        super().validate()

    def check_files(self) -> None:
        if Path(self.data_path).is_file():
            raise UserError(f"--data_path {self.data_path} is a file; pass the folder of the images and their maps")
        if not Path(self.data_path).is_dir():
            made = f"make it with `{self.made_by}`, or " if self.data_path == type(self).data_path else ""
            raise UserError(f"the folder {self.data_path} does not exist; {made}pass --data_path DIR")

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

    idle = dict.fromkeys(("tasks_file", "cutoff_len", "load_in_4bit"), "has no effect with --system dense")

    checkpoint: str = flag(REQUIRED, "output folder of a training run")
    base_model: str | None = flag(None, "where the checkpoint's base model is, if it has moved")
    image_size: int | None = flag(None, "height and width of the model's images; none: as it was trained", min=8)
    sheet: int = flag(0, "images to show with their maps in sheet.png; 0: no sheet", min=0, affects="nothing")


@dataclasses.dataclass(kw_only=True)
class EvalConfig(EvaluationFlags, AnswerConfig):
    """Score the maps of a trained vision transformer."""

    made_by, protocol = TrainConfig.made_by, MAPS

    data_dir: str = flag(TrainConfig.data_path, "folder of images and maps, see train")
    split: str = flag("test", "evaluate the images of test or of train", choices=("test", "train"))
    missing_labels: bool = flag(False, "allow images without the map of a task, which then do not count for that task")
    save_maps: bool = flag(False, "also write the maps, to output_dir/maps/<task>", affects="nothing")
    official: bool = flag(
        False,
        "also list the values under the names that the original prints, with mean angles as rmse",
        affects="nothing",
    )

    def closing_lines(self, found: Mapping) -> list[str]:
        if not self.official:
            return []
        lines = []
        for task, result in found[MAPS].tasks.items():
            fractions, official = ("mIoU", "maxF"), result.measured["official"]
            values = ", ".join(
                f"{name} {value * (100 if name in fractions else 1):.4f}" for name, value in official.items()
            )
            lines.append(f"{task} as the original prints it: {values or 'its loss alone'}")
        return [*lines, ""]


@dataclasses.dataclass(kw_only=True)
class PredictConfig(PredictionFlags, AnswerConfig):
    """Write the maps of images, and a picture of them, with a trained vision transformer."""

    idle = AnswerConfig.idle | {"task": "has no effect with --system dense: every image gets the maps of all tasks"}

    input: str = flag(REQUIRED, "image, or folder of images")
    output: str = flag(REQUIRED, "folder for <task>/<image>.png or .npy, and sheet.png")
    sheet: int = flag(16, "images to show with their maps in sheet.png; 0: no sheet")

    def check_files(self) -> None:
        AnswerConfig.check_files(self)
        if not Path(self.input).exists():
            raise UserError(f"the input {self.input} does not exist; pass an image or a folder of images as --input")
