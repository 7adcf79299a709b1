"""The flags of train, evaluate and predict on images and texts, as validated dataclasses."""

import dataclasses
import functools

from mtl_lora import answer_config
from mtl_lora.answer_config import EvaluationFlags, PredictionFlags
from mtl_lora.config import REQUIRED, flag
from mtl_lora.errors import UserError
from mtl_lora.image_text.tasks import OPEN_SETS, TaskSet
from mtl_lora.training.config import TrainingConfig

MIXED, ROUND_ROBIN = "mixed", "round_robin"
ANSWER = "answer"  # the protocol: open answers and captions are generated, labels are scored
OWN, SHUFFLED = "own", "shuffled"  # the images shown with a question; "": none
_FEATURES = "the features (fingerprint)"


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Fine-tune a language model on images with questions, statements and captions, with a low-rank adapter."""

    system = "image_text"
    idle = TrainingConfig.idle | {"cuda_graphs": "has no effect with --system image_text"}
    default_tasks = OPEN_SETS
    made_by = "mtl-lora prepare image_text"

    base_model: str = flag("smollm2-135m", "name or folder of a causal language model or an encoder-decoder (BART, T5)")
    data_path: str = flag(
        "data/image_text/train.json",
        "JSON, JSON lines, CSV or parquet file of examples with image (an id or a list of ids), text, answer or "
        "answers, and task",
    )
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks; none: easy-VQA, NLVR and Flickr8k")
    features: list[str] = flag(
        ["data/image_text/features.h5"],
        "features of all images: HDF5 files written by mtl-lora features, or folders of <image id>.h5, as a,b",
        affects="content",
    )
    pool: int | None = flag(
        None, "max-pool each image's grid to this many cells per side (the original: 7 to 6); none: no pooling", min=1
    )
    images: int = flag(2, "maximum images per example", min=1)
    cutoff_len: int = flag(
        64,
        "maximum tokens of a prompt and of an answer, unless the task sets a lower limit; longer ones are truncated",
        min=8,
        group="texts and batches of tasks",
    )

    task_batches: str = flag(
        MIXED,
        "mixed: every batch mixes examples of all tasks; round_robin: every batch has one task, tasks in proportion to "
        "their number of batches, as in the original",
        choices=(MIXED, ROUND_ROBIN),
    )
    task_batch_sizes: list[str] = flag(
        [], "with round_robin, batch sizes for single tasks in place of batch_size: task=examples, as a,b"
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
            raise UserError("--task_batch_sizes needs --task_batches round_robin, where every batch has one task")
        if self.task_batches == ROUND_ROBIN:
            for name in ("token_budget", "sampling_temperature", "length_pool"):
                if getattr(self, name) != getattr(TrainingConfig, name):
                    raise UserError(f"--{name} has no effect with --task_batches round_robin; leave it out")

    def batch_sizes(self, tasks: TaskSet) -> dict[str, int]:
        """Return the micro-batch size of each task for batches of one task; raises ``UserError`` for a bad entry."""
        sizes, given = dict.fromkeys(tasks.names, self.batch_size), set()
        for entry in self.task_batch_sizes:
            name, _, number = entry.partition("=")
            if not number.isascii() or not number.isdecimal() or not int(number):
                raise UserError(f"--task_batch_sizes must be a list of task=examples, as a,b, not {entry!r}")
            if name in given:
                raise UserError(f"--task_batch_sizes names {name!r} twice; keep one of them")
            given.add(name)
            sizes[tasks[name].name] = int(number)
        return sizes

    def contents(self) -> dict[str, str | None]:
        return {_FEATURES: _fingerprint(tuple(self.features))}


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(answer_config.AnswerConfig):
    """The flags that evaluate and predict share: which model answers, and how."""

    default_tasks = OPEN_SETS
    alone = ", or --system image_text --base_model NAME --no_images for a model without fine-tuning"

    base_model: str | None = flag(
        None,
        "with --checkpoint: where its base model is, if it has moved; alone, with --no_images: a model without "
        "fine-tuning",
    )
    features: list[str] = flag(
        [], "features of the images: HDF5 files or folders, as a,b; empty: those of the training", affects="content"
    )
    cutoff_len: int | None = flag(
        None, "maximum tokens of a prompt, if no checkpoint sets it and no task a lower limit; none: 64", min=8
    )
    num_beams: int = flag(1, "beams for generating captions; 1: greedy, which open answers always are", min=1)
    official: bool = flag(
        False, "score the labels of an encoder-decoder as the original does: by their first token only, without EOS"
    )
    no_images: bool = flag(False, "ablation: show the text only")

    def validate(self) -> None:
        super().validate()
        if self.no_images and self.features:
            raise UserError("--no_images and --features cannot be combined; pass one")
        if not self.checkpoint and self.images:
            raise UserError("a base model without a checkpoint sees no images; pass --no_images, or --checkpoint DIR")

    def contents(self) -> dict[str, str | None]:
        return {_FEATURES: _fingerprint(tuple(self.features)) if self.features else "those of the training"}

    @property
    def images(self) -> str:
        """Which images are shown with a question: ``OWN``, ``SHUFFLED``, or "" for none."""
        return "" if self.no_images else OWN


@dataclasses.dataclass(kw_only=True)
class EvalConfig(EvaluationFlags, AnswerConfig):
    """Score a trained model on the test sets of its image-text tasks."""

    made_by, protocol = TrainConfig.made_by, ANSWER

    data_dir: str = flag("data/image_text/test", "folder with <task>/test.json (or .jsonl, .csv, .parquet)")
    shuffle_images: bool = flag(False, "ablation: replace every image by another image of the same task")
    caption_tokenizer: str = flag(
        "auto",
        "tokenizer for scoring captions: ptb, as in coco-caption (needs Java); simple; auto: ptb if it runs here",
        choices=("auto", "ptb", "simple"),
    )
    page: int = flag(
        0, "questions to show in pictures.html with their pictures and answers; 0: no page", min=0, affects="nothing"
    )
    pictures: str | None = flag(None, "folder of the pictures for --page", affects="nothing")

    def validate(self) -> None:
        if bool(self.page) != bool(self.pictures):
            raise UserError("--page N and --pictures DIR need each other; pass both")
        if self.no_images and self.shuffle_images:
            raise UserError("--no_images and --shuffle_images cannot be combined; pass one")
        super().validate()

    @property
    def images(self) -> str:
        return SHUFFLED if self.shuffle_images else super().images

    @property
    def output_folder(self) -> str:
        """Where predictions and results go; by default an ablation has its own folder beside the main results."""
        own = self.output_dir or self.images == OWN
        return super().output_folder + ("" if own else f"_{self.images or 'no'}_images")


@dataclasses.dataclass(kw_only=True)
class PredictConfig(PredictionFlags, AnswerConfig):
    """Answer questions about images, or caption images, from a file of examples with a trained model."""

    input: str = flag(REQUIRED, "JSON, JSON lines, CSV or parquet file of examples with image and, for questions, text")


@functools.cache  # a study calls it for every job
def _fingerprint(features: tuple[str, ...]) -> str | None:
    try:
        from mtl_lora.image_text.features import FeatureStore

        return FeatureStore(features).fingerprint
    except (UserError, ModuleNotFoundError):  # the command that reads the features reports the error
        return None
