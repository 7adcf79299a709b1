"""The flags of train, evaluate and predict for encoders, as validated dataclasses."""

import dataclasses

from mtl_lora import answer_config
from mtl_lora.answer_config import EvaluationFlags, PredictionFlags
from mtl_lora.config import REQUIRED, flag
from mtl_lora.errors import UserError
from mtl_lora.nlu.tasks import GLUE
from mtl_lora.training.config import TrainingConfig

# The protocols: a trained head answers or, without a checkpoint, the cosine of the two texts' mean-pooled embeddings.
CLASSIFY, COSINE = "classify", "cosine"
NO_HEAD = "a prediction needs a trained head; pass --checkpoint DIR"


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Fine-tune an encoder with a head per task on many tasks, with MTL-LoRA or another low-rank adapter."""

    system = "nlu"
    default_tasks = GLUE
    made_by = "mtl-lora prepare glue"

    base_model: str = flag("minilm-l6", "name or folder of any transformers encoder; minilm-l6 is downloaded")
    data_path: str = flag(
        "data/glue/train.json",
        "JSON, JSON lines, CSV or parquet file of examples with text, text_b (for pairs), label, and task (a name) or "
        "task_id",
    )
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks; none: the GLUE tasks except WNLI")
    lora_target_modules: list[str] = flag(
        ["all-linear"],
        "linear layers to adapt: names, or regular expressions for whole names, as a,b; all-linear: the encoder's",
    )
    cutoff_len: int = flag(128, "maximum tokens of a text or pair; longer ones are truncated", min=4, group="the text")


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(answer_config.AnswerConfig):
    """The flags that evaluate and predict share: which model answers, and how."""

    default_tasks = GLUE
    alone = ", or --base_model NAME for an encoder without fine-tuning"

    base_model: str | None = flag(
        None,
        "with --checkpoint: where its base model is, if it has moved; alone: an encoder without fine-tuning, which "
        "answers regression tasks on pairs with the cosine of its mean-pooled embeddings",
    )
    cutoff_len: int | None = flag(None, "maximum tokens of a text or pair, if no checkpoint sets it; none: 128", min=4)


@dataclasses.dataclass(kw_only=True)
class EvalConfig(EvaluationFlags, AnswerConfig):
    """Score a trained encoder on the test sets of its tasks."""

    made_by = TrainConfig.made_by

    data_dir: str = flag("data/glue/test", "folder with <task>/test.json (or .jsonl, .csv, .parquet)")

    @property
    def protocol(self) -> str:
        return CLASSIFY if self.checkpoint else COSINE


@dataclasses.dataclass(kw_only=True)
class PredictConfig(PredictionFlags, AnswerConfig):
    """Answer the examples in a file with a trained encoder."""

    base_model: str | None = flag(None, "where the checkpoint's base model is, if it has moved")
    input: str = flag(REQUIRED, "JSON, JSON lines, CSV or parquet file of examples with text (and text_b)")

    def validate(self) -> None:
        if not self.checkpoint:
            raise UserError(NO_HEAD)
        super().validate()
