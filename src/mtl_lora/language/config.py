"""The flags of train, evaluate and predict as validated dataclasses, named as in the original and in LLM-Adapters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mtl_lora import answer_config
from mtl_lora.answer_config import EvaluationFlags, PredictionFlags
from mtl_lora.artifacts import AGREEMENT, PEFT_CONFIG, PROTOCOLS
from mtl_lora.config import REQUIRED, flag
from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.encode import template
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.training.config import TrainingConfig


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Fine-tune a language model on many tasks with MTL-LoRA or another low-rank adapter."""

    system = "language"
    default_tasks = COMMONSENSE
    made_by = "mtl-lora prepare commonsense"

    base_model: str = flag("smollm2-135m", "name or folder of any transformers causal LM; smollm2-135m is downloaded")
    data_path: str = flag(
        "commonsense_170k_taskid.json",
        "JSON, JSON lines, CSV or parquet file of examples with instruction, output and task_id (or task, a name)",
    )
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks; none: the eight commonsense tasks")
    cutoff_len: int = flag(
        256, "maximum tokens of prompt, answer and EOS; longer instructions lose their middle", min=1, group="the text"
    )
    template: str = flag(
        "alpaca", "prompt template: alpaca, original (exactly LLM-Adapters'), plain (short), chat (the tokenizer's)"
    )
    train_on_inputs: bool = flag(False, "compute the loss on prompt tokens too")
    reuse_prefix: str = flag(
        "auto",
        "compute the prompt prefix that a task's rows share once per micro-batch: always, never, or auto: only without "
        "dropout, where the losses stay the same",
        choices=("auto", "always", "never"),
        by_outcome=True,
    )

    def validate(self) -> None:
        super().validate()
        template(self.template)
        shares = self.reuse_prefix == "always"
        self.require("cuda_graphs", "off with --reuse_prefix always", not (self.cuda_graphs and shares))


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(answer_config.AnswerConfig):
    """The flags that evaluate and predict share: which model answers, with which prompt, and how it is run."""

    default_tasks = COMMONSENSE
    alone = ", --peft DIR, or --base_model NAME for a base model alone"

    checkpoint: str | None = flag(
        None, "adapter folder; it names its base model, prompt and tasks", group="the model and its prompt"
    )
    base_model: str | None = flag(
        None, "base model to use alone; with --checkpoint or --peft: where its base model is now, if it has moved"
    )
    cutoff_len: int | None = flag(None, "maximum tokens of prompt and answer, if no checkpoint sets it; none: 256")
    peft: str | None = flag(
        None, "folder of a PEFT LoRA adapter, instead of --checkpoint", group="language models only"
    )
    template: str | None = flag(None, "prompt template, if no checkpoint names one; none: alpaca")
    reuse_prefix: bool = flag(
        True,
        "compute the prompt prefix that all prompts of a task share only once",
        affects="nothing",
        aliases=("share_opening",),
    )
    max_new_tokens: int = flag(32, "maximum tokens generated for an answer", min=1)
    num_beams: int = flag(1, "beams of beam search; 1: greedy", min=1)

    def validate(self) -> None:
        super().validate()
        if self.template is not None:
            template(self.template)
        if self.checkpoint and self.peft:
            raise UserError("--checkpoint and --peft both name an adapter; pass only one")

    def check_files(self) -> None:
        super().check_files()
        if self.peft:
            read_json(Path(self.peft, PEFT_CONFIG), "the PEFT configuration")

    @property
    def adapter(self) -> str | None:
        return self.checkpoint or self.peft


@dataclasses.dataclass(kw_only=True)
class EvalConfig(EvaluationFlags, AnswerConfig):
    """Score a checkpoint, or a base model alone, on the test sets of its tasks."""

    made_by = TrainConfig.made_by

    data_dir: str = flag("data/commonsense/test", "folder with <task>/test.json (or .jsonl, .csv, .parquet)")
    mode: str = flag(
        "generate",
        "generate: extract the answer from generated text; score: take the likeliest option; both: run both, but "
        "score no free text",
        choices=(*PROTOCOLS, "both"),
    )

    @property
    def protocols(self) -> dict[str, str]:
        """The folder of each protocol to run.

        With ``both`` each protocol has a folder inside the output folder. A later command for one of them without
        --output_dir resumes in that folder.
        """
        inside = Path(self.output_folder, self.mode)
        if self.mode != "both":
            return {self.mode: str(inside) if not self.output_dir and inside.is_dir() else self.output_folder}
        return {protocol: f"{self.output_folder}/{protocol}" for protocol in PROTOCOLS}

    def closing_lines(self, found: Mapping) -> list[str]:
        if len(found) < 2:
            return []
        agreement = read_json(f"{self.output_folder}/{AGREEMENT}", "the agreement of the protocols")
        return ["", f"The protocols give the same answer to {100 * agreement['all']:.1f} % of the questions.", ""]


@dataclasses.dataclass(kw_only=True)
class PredictConfig(PredictionFlags, AnswerConfig):
    """Answer the examples of a file with a checkpoint, or with a base model alone."""

    input: str = flag(REQUIRED, "JSON, JSON lines, CSV or parquet file of examples with instruction (and input)")
    mode: str | None = flag(
        None,
        "score: take the likeliest option; generate: extract the answer from generated text; none: score, but generate "
        "for free text",
        choices=PROTOCOLS,
    )
