"""The flags of train, evaluate and predict as validated dataclasses; names are the original's and LLM-Adapters'.

The commands stand below them: each parses its flags, which needs no torch, before importing what does the work.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mtl_lora.artifacts import AGREEMENT, CHECKPOINT_CONFIG, EVALUATION, PEFT_CONFIG, PROTOCOLS, RESULTS
from mtl_lora.cli import parse
from mtl_lora.config import DTYPES, REQUIRED, Config, flag
from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.language.encode import template
from mtl_lora.language.tasks import COMMONSENSE, TaskSet, load_tasks_file
from mtl_lora.training.config import TrainingConfig

AUTO = "auto"
MODES = (*PROTOCOLS, "both")


@dataclasses.dataclass(init=False)
class TrainConfig(TrainingConfig):
    """Everything that configures a training run of a language model."""

    made_by = "mtl-lora prepare commonsense"

    base_model: str = flag(
        "smollm2-135m",
        "name or folder of any causal LM of transformers; smollm2-135m is fetched",
        group="what is trained, on what",
    )
    data_path: str = flag(
        "commonsense_170k_taskid.json",
        "JSON, JSON lines, CSV or parquet of examples with instruction, output and task_id (or task, a name)",
        affects="content",
    )
    tasks_file: str | None = flag(
        None, "JSON file that declares your own tasks; none: the eight commonsense tasks", affects="content"
    )
    cutoff_len: int = flag(
        256, "most tokens of prompt, answer and EOS; longer instructions lose their middle", min=1, group="the text"
    )
    template: str = flag(
        "alpaca", "prompt template: alpaca, original (LLM-Adapters' bytes), plain (short), chat (the tokenizer's)"
    )
    train_on_inputs: bool = flag(False, "put loss on the prompt too")
    reuse_prefix: str = flag(
        "auto",
        "run the prompt prefix that a task's rows share once a micro-batch: always, never, or auto: without dropout, "
        "where the losses stay the same",
        choices=("auto", "always", "never"),
        affects="nothing",  # what it came to is compared on resuming
    )

    def validate(self) -> None:
        super().validate()
        template(self.template)

    def read_tasks(self) -> TaskSet:
        return load_tasks_file(self.tasks_file) if self.tasks_file else COMMONSENSE


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(Config):
    """The flags that evaluate and predict share: which model answers, in which prompt, and how."""

    affects = "answers"

    checkpoint: str | None = flag(
        None,
        "adapter folder; it names its base model, prompt and tasks",
        affects="content",
        group="who answers, in which prompt",
    )
    peft: str | None = flag(None, "PEFT LoRA folder, answered by the same protocol")
    base_model: str | None = flag(
        None, "base model alone; with --checkpoint or --peft: where its base model lies, if that has moved"
    )
    tasks_file: str | None = flag(
        None, "JSON file that declares your own tasks, where no checkpoint does", affects="content"
    )
    template: str | None = flag(None, "prompt template, where no checkpoint names it; none: alpaca")
    cutoff_len: int | None = flag(
        None, "most tokens of prompt and answer, where no checkpoint has it; none: 256", min=1
    )
    dtype: str = flag(
        "auto",
        "base model dtype: bf16, fp16, fp32, fp64; auto: bf16 where the hardware multiplies it",
        choices=DTYPES,
        group="how",
    )
    load_in_4bit: bool | None = flag(
        None, "load the base model in 4 bits; none: as the checkpoint was trained; needs bitsandbytes"
    )
    batch_size: int | str = flag(
        AUTO, "questions at a time on each device, or auto; results do not depend on it", affects="nothing"
    )
    reuse_prefix: bool = flag(
        True,
        "compute the prompt prefix that all prompts of a task share once",
        affects="nothing",
        aliases=("share_opening",),
    )
    max_new_tokens: int = flag(32, "most tokens generated for an answer", min=1)
    num_beams: int = flag(1, "beams of generation; 1: greedy", min=1)
    trust_remote_code: bool = flag(False, "run model code that the base model's repository brings")
    local_rank: int = flag(
        -1, "set by the deepspeed launcher; the environment's LOCAL_RANK is what counts", affects="nothing"
    )

    def validate(self) -> None:
        if self.template is not None:
            template(self.template)
        if not self.checkpoint and not self.peft and not self.base_model:
            raise UserError("pass --checkpoint DIR, --peft DIR, or --base_model NAME for a base model alone")
        if self.checkpoint and self.peft:
            raise UserError("--checkpoint and --peft are two adapters; pass one")
        number = isinstance(self.batch_size, int)
        self.require(
            "batch_size", f"at least 1, or {AUTO}", self.batch_size >= 1 if number else self.batch_size == AUTO
        )

    def check_files(self) -> None:
        """Raise ``UserError`` for a checkpoint or tasks file that is not there; needs no model library."""
        if self.checkpoint and not Path(self.checkpoint, CHECKPOINT_CONFIG).is_file():
            raise UserError(f"{self.checkpoint} is not an MTL-LoRA checkpoint: it has no {CHECKPOINT_CONFIG}")
        if self.peft:
            read_json(Path(self.peft, PEFT_CONFIG), "the PEFT configuration")
        if self.tasks_file:
            load_tasks_file(self.tasks_file)


@dataclasses.dataclass(kw_only=True)
class EvalConfig(AnswerConfig):
    """Everything that configures an evaluation."""

    data_dir: str = flag(
        "data/commonsense/test",
        "folder with <task>/test.json (or .jsonl, .csv, .parquet)",
        affects="content",
        group="what is asked, and where the results go",
    )
    output_dir: str | None = flag(
        None, "folder for predictions and results.json; none: <checkpoint>/evaluation", affects="nothing"
    )
    name: str | None = flag(
        None, "row label in tables; none: the method's title, or the base model's name", affects="nothing"
    )
    tasks: list[str] = flag([], "tasks to evaluate, as a,b; empty: all")
    limit: int = flag(0, "evaluate only the first n questions of each task; 0: all", min=0)
    mode: str = flag(
        "generate",
        "generate: the answer is found in generated text; score: the likeliest option; both: scores only options",
        choices=MODES,
    )
    overwrite: bool = flag(False, "delete the results that output_dir already holds", affects="nothing")
    check: bool = flag(False, "check every setting and the questions, then stop", affects="nothing")

    def check_files(self) -> None:
        super().check_files()
        if not Path(self.data_dir).is_dir():
            made = "" if self.tasks_file or self.checkpoint else "make it with `mtl-lora prepare commonsense`, or "
            raise UserError(f"there is no folder {self.data_dir} with test sets; {made}pass --data_dir DIR")

    @property
    def output_folder(self) -> str:
        """Where predictions and results go."""
        if self.output_dir:
            return self.output_dir
        adapter = self.checkpoint or self.peft
        return f"{adapter}/{EVALUATION}" if adapter else f"output/{self.base_model.replace('/', '_')}"

    @property
    def protocols(self) -> dict[str, str]:
        """The protocols to run, each with its folder: with ``both`` a folder each inside the output folder."""
        if self.mode != "both":
            return {self.mode: self.output_folder}
        return {protocol: f"{self.output_folder}/{protocol}" for protocol in PROTOCOLS}


@dataclasses.dataclass(kw_only=True)
class PredictConfig(AnswerConfig):
    """Everything that configures a prediction."""

    input: str = flag(
        REQUIRED, "JSON, JSON lines, CSV or parquet of examples with instruction (and input)", affects="content"
    )
    output: str = flag(REQUIRED, "file for one JSON line per example, in the order of the input", affects="nothing")
    task: str | None = flag(None, "task of all examples; none: each example names its own with task or task_id")
    mode: str | None = flag(
        None,
        "score: the likeliest option; generate: generated text; none: score, and generate for free text",
        choices=PROTOCOLS,
    )
    overwrite: bool = flag(False, "replace the output file, or an unfinished one", affects="nothing")
    check: bool = flag(False, "check every setting and the examples, then stop", affects="nothing")

    def check_files(self) -> None:
        super().check_files()
        if not Path(self.input).is_file():
            raise UserError(f"the input {self.input} does not exist; pass --input FILE")
        if Path(self.output).is_dir():
            raise UserError(f"--output {self.output} is a folder; pass the path of a file")


# ---- the commands ----

TRAIN_ABOUT = "Fine-tune a language model on many tasks with MTL-LoRA or another low-rank adapter."
EVALUATE_ABOUT = "Score a checkpoint, or a base model alone, on the test sets of its tasks."
PREDICT_ABOUT = "Answer the examples of a file with a checkpoint, or with a base model alone."


def train(arguments: Sequence[str]) -> None:
    """``mtl-lora train``, and ``finetune.py``."""
    config = parse(TrainConfig, arguments, TRAIN_ABOUT)
    config.check_files()
    from mtl_lora.language.train import run
    from mtl_lora.training.distributed import destroy_process_group, prepare_process

    prepare_process(config)
    run(config)
    destroy_process_group()


def evaluate(arguments: Sequence[str]) -> None:
    """``mtl-lora evaluate``, and ``commonsense_evaluate.py``; prints the results as tables at the end."""
    config = parse(EvalConfig, arguments, EVALUATE_ABOUT)
    config.check_files()
    from mtl_lora.language.evaluate import run

    found = run(config)
    if not found:
        return
    from mtl_lora.report.__main__ import main as report

    results = [f"{config.protocols[protocol]}/{RESULTS}" for protocol in found]
    report(["table", *results])
    print()
    report(["details", *results])
    if len(found) > 1:
        agreement = read_json(f"{config.output_folder}/{AGREEMENT}", "the agreement of the protocols")
        print(f"\nThe protocols give the same answer to {100 * agreement['all']:.1f} % of the questions.")


def predict(arguments: Sequence[str]) -> None:
    """``mtl-lora predict``."""
    config = parse(PredictConfig, arguments, PREDICT_ABOUT)
    config.check_files()
    from mtl_lora.language.predict import run

    run(config)
