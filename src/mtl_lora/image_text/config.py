"""The flags of train, evaluate and predict on images and texts, as validated dataclasses."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from mtl_lora import answer_config
from mtl_lora.answer_config import EvaluationFlags, PredictionFlags
from mtl_lora.config import REQUIRED, flag
from mtl_lora.errors import UserError
from mtl_lora.image_text.tasks import CAPTION, OPEN_SETS, TaskSet
from mtl_lora.training.config import TrainingConfig

if TYPE_CHECKING:
    from mtl_lora.image_text.features import FeatureStore
    from mtl_lora.image_text.model import VisualConfig

MIXED, ROUND_ROBIN = "mixed", "round_robin"
ANSWER = "answer"  # the protocol: open answers and captions are generated, labels are scored
OWN, SHUFFLED = "own", "shuffled"  # the images that a question is shown; "" for none
_FEATURES = "the features (fingerprint)"
TOKENIZERS = ("auto", "ptb", "simple")  # of captions


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Everything that configures a training run on images and texts."""

    system = "image_text"
    idle = TrainingConfig.idle | {"cuda_graphs": "is of other systems and does nothing for images and texts"}
    made_by = "mtl-lora prepare image_text"

    base_model: str = flag("smollm2-135m", "name or folder of a causal language model or an encoder-decoder (BART, T5)")
    data_path: str = flag(
        "data/image_text/train.json",
        "JSON, JSON lines, CSV or parquet of examples with image (an id, or a list), text, answer or answers, and task",
    )
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks; none: easy-VQA, NLVR and Flickr8k")
    features: list[str] = flag(
        ["data/image_text/features.h5"],
        "features of all images: HDF5 files of mtl-lora features, or folders of <image id>.h5, as a,b",
        affects="content",
    )
    pool: int | None = flag(
        None, "cells along a side to which an image's grid is max-pooled (the original: 7 to 6); none: as it is", min=1
    )
    images: int = flag(2, "most images of an example", min=1)
    cutoff_len: int = flag(
        64,
        "most tokens of a text and of an answer, where the task sets no lower limit; longer ones lose their end",
        min=8,
        group="texts and batches of tasks",
    )

    task_batches: str = flag(
        MIXED,
        "mixed: every batch has examples of all tasks; round_robin: of one task, tasks in proportion to their "
        "number of batches, as the original",
        choices=(MIXED, ROUND_ROBIN),
    )
    task_batch_sizes: list[str] = flag(
        [], "with round_robin, in place of batch_size for some tasks: name=examples, as a,b"
    )
    batch_size: int | str = flag(
        16, "examples per device and micro-batch; the global batch is this x devices x gradient_accumulation_steps"
    )
    learning_rate: float = flag(1e-3, "peak learning rate of AdamW")
    warmup_ratio: float = flag(0.03, "fraction of the steps with linear warm-up")

    def validate(self) -> None:
        super().validate()
        self.batch_sizes(self.task_set())
        if self.task_batches == MIXED and self.task_batch_sizes:
            raise UserError("--task_batch_sizes needs --task_batches round_robin, whose batches are of one task")
        if self.task_batches == ROUND_ROBIN:
            for name in ("token_budget", "sampling_temperature", "length_pool"):
                if getattr(self, name) != getattr(TrainingConfig, name):
                    raise UserError(f"--{name} has no effect with --task_batches round_robin; leave it out")

    def batch_sizes(self, tasks: TaskSet) -> dict[str, int]:
        """Examples of a one-task micro-batch by task; raises ``UserError`` for an entry that is none."""
        sizes, given = dict.fromkeys(tasks.names, self.batch_size), set()
        for entry in self.task_batch_sizes:
            name, _, number = entry.partition("=")
            if not number.isascii() or not number.isdecimal() or not int(number):
                raise UserError(f"--task_batch_sizes must be task=examples as a,b, not {entry!r}")
            if name in given:
                raise UserError(f"--task_batch_sizes names {name!r} twice; leave one of them")
            given.add(name)
            sizes[tasks[name].name] = int(number)
        return sizes

    def read_tasks(self) -> TaskSet:
        return TaskSet.load(self.tasks_file) if self.tasks_file else OPEN_SETS

    def contents(self) -> dict[str, str | None]:
        return {_FEATURES: _fingerprint(tuple(self.features))}

    def visual_config(self, store: "FeatureStore") -> "VisualConfig":
        """The images that the model takes, by their features; raises ``UserError`` for a ``pool`` above their grid."""
        from mtl_lora.image_text.model import VisualConfig

        return VisualConfig(store.dim, store.grid, self.pool, self.images, store.source)


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(answer_config.AnswerConfig):
    """The flags that evaluate and predict share: which model answers, and how."""

    base_model: str | None = flag(
        None,
        "with --checkpoint: where its base model lies, if that has moved; alone, with --no_images: a model that is not "
        "trained",
    )
    features: list[str] = flag(
        [], "features of the images: HDF5 files or folders, as a,b; empty: those of the training", affects="content"
    )
    cutoff_len: int | None = flag(
        None, "most tokens of a text, where no checkpoint has it and the task no lower limit; none: 64", min=8
    )
    num_beams: int = flag(1, "beams of the search for a caption; 1: greedy, as open answers always are", min=1)
    official: bool = flag(
        False, "choose labels of an encoder-decoder as the original: by their first token alone, without its EOS"
    )
    no_images: bool = flag(False, "ablation: ask with the text alone")

    def validate(self) -> None:
        super().validate()
        if not self.checkpoint and not self.base_model:
            alone = "--system image_text --base_model NAME --no_images for a model that is not trained"
            raise UserError(f"pass --checkpoint DIR, or {alone}")
        if self.no_images and self.features:
            raise UserError("--no_images and --features cannot be combined; pass one")

    def check_files(self) -> None:
        super().check_files()
        if not self.checkpoint and self.images:
            raise UserError("a model that is not trained sees no images; pass --no_images, or --checkpoint DIR")
        if self.tasks_file:
            TaskSet.load(self.tasks_file)

    def contents(self) -> dict[str, str | None]:
        return {_FEATURES: _fingerprint(tuple(self.features)) if self.features else "those of the training"}

    @property
    def images(self) -> str:
        """Which images a question is shown."""
        return "" if self.no_images else OWN

    def measures_captions(self, tasks: TaskSet) -> bool:
        """Whether a caption is compared with others."""
        return False


@dataclasses.dataclass(kw_only=True)
class EvalConfig(EvaluationFlags, AnswerConfig):
    """Everything that configures an evaluation."""

    made_by = TrainConfig.made_by

    data_dir: str = flag("data/image_text/test", "folder with <task>/test.json (or .jsonl, .csv, .parquet)")
    shuffle_images: bool = flag(False, "ablation: show each question an image of another one of its task")
    caption_tokenizer: str = flag(
        "auto",
        "words of captions: ptb, as coco-caption, which needs Java; simple; auto: ptb where it runs",
        choices=TOKENIZERS,
    )
    page: int = flag(0, "questions on a page of pictures and answers, pictures.html; 0: none", min=0, affects="nothing")
    pictures: str | None = flag(None, "folder of the pictures for --page", affects="nothing")

    def validate(self) -> None:
        super().validate()
        if bool(self.page) != bool(self.pictures):
            raise UserError("--page N and --pictures DIR belong together; pass both")
        if self.no_images and self.shuffle_images:
            raise UserError("--no_images and --shuffle_images cannot be combined; pass one")

    @property
    def images(self) -> str:
        return SHUFFLED if self.shuffle_images else super().images

    def measures_captions(self, tasks: TaskSet) -> bool:
        return any(task.answer == CAPTION and task.name in (self.tasks or tasks.names) for task in tasks)

    @property
    def output_folder(self) -> str:
        """Those of an ablation are beside the others, never among them."""
        own = self.output_dir or self.images == OWN
        return super().output_folder + ("" if own else f"_{self.images or 'no'}_images")

    @property
    def protocols(self) -> dict[str, str]:
        """How questions are answered, with the folder of the results."""
        return {ANSWER: self.output_folder}


@dataclasses.dataclass(kw_only=True)
class PredictConfig(PredictionFlags, AnswerConfig):
    """Everything that configures a prediction."""

    input: str = flag(REQUIRED, "JSON, JSON lines, CSV or parquet of examples with image and, of questions, text")


# What the commands' help begins with.
TRAIN_ABOUT = "Fine-tune a language model on images with questions, statements and captions, by a low-rank adapter."
EVALUATE_ABOUT = "Score a trained model on the test sets of its tasks on images."
PREDICT_ABOUT = "Answer the examples of a file, images with questions or for captions, with a trained model."


@functools.cache  # a study asks for every job
def _fingerprint(features: tuple[str, ...]) -> str | None:
    try:
        from mtl_lora.image_text.features import FeatureStore

        return FeatureStore(features).fingerprint
    except (UserError, ModuleNotFoundError):  # the command that reads them says what is wrong
        return None
