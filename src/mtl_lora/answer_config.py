"""The evaluate and predict flags that all systems share; each system's configuration adds its own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.artifacts import EVALUATION
from mtl_lora.config import DTYPES, REQUIRED, Config, flag
from mtl_lora.errors import UserError
from mtl_lora.systems import checkpoint_config

if TYPE_CHECKING:
    from mtl_lora.results import Results

AUTO = "auto"


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(Config):
    """Which model answers the questions, and how it is run."""

    affects = "answers"
    default_tasks = None  # the task set that neither a checkpoint nor ``tasks_file`` replaces
    alone = ""  # the flags that name a model in place of --checkpoint, as the end of an error

    checkpoint: str | None = flag(
        None, "checkpoint folder; it names its base model and tasks", affects="content", group="the model"
    )
    base_model: str | None = flag(
        None, "base model to use alone; with --checkpoint: where its base model is now, if it has moved"
    )
    tasks_file: str | None = flag(
        None, "JSON file that declares your own tasks, if no checkpoint does", affects="content"
    )
    cutoff_len: int | None = flag(None, "maximum number of tokens of an example, if no checkpoint sets it", min=1)
    dtype: str = flag(
        "auto",
        "base model dtype: bf16, fp16, fp32, fp64; auto: bf16 if the hardware multiplies it natively",
        choices=DTYPES,
        group="how it is run",
    )
    load_in_4bit: bool | None = flag(
        None, "load the base model in 4 bits (needs bitsandbytes); none: as in the checkpoint's training"
    )
    batch_size: int | str = flag(
        AUTO, "questions per batch on each device, or auto; in float32 it does not change results", affects="nothing"
    )
    trust_remote_code: bool = flag(False, "run the model code in the base model's repository")
    local_rank: int = flag(
        -1, "set by the deepspeed launcher and ignored; the environment variable LOCAL_RANK decides", affects="nothing"
    )

    def validate(self) -> None:
        valid = self.batch_size >= 1 if isinstance(self.batch_size, int) else self.batch_size == AUTO
        self.require("batch_size", f"at least 1, or {AUTO}", valid)
        if not self.adapter and not self.base_model:
            raise UserError(f"pass --checkpoint DIR{self.alone}")

    def check_files(self) -> None:
        """Raise ``UserError`` for a missing file or folder; imports no model library."""
        if self.checkpoint:
            checkpoint_config(self.checkpoint)
        if self.tasks_file:
            type(self.default_tasks).load(self.tasks_file)

    @property
    def adapter(self) -> str | None:
        """The folder of the adapter, in which results go by default; None for a base model alone."""
        return self.checkpoint


@dataclasses.dataclass(kw_only=True)
class EvaluationFlags(Config):
    """Which questions are asked, and where the results go.

    A system's evaluation configuration inherits from this class first and from its ``AnswerConfig`` second.
    """

    data_dir: str = flag(
        "", "folder with <task>/test.json (or .jsonl, .csv, .parquet)", affects="content", group="questions and results"
    )
    output_dir: str | None = flag(
        None,
        "folder for predictions and results.json; none: <checkpoint>/evaluation, of a base model alone output/<name>",
        affects="nothing",
    )
    name: str | None = flag(
        None, "row label in tables; none: the title of the method, or the name of the base model", affects="nothing"
    )
    tasks: list[str] = flag([], "tasks to evaluate, as a,b; empty: all")
    limit: int = flag(0, "evaluate only the first n questions of each task; 0: all", min=0)
    overwrite: bool = flag(False, "delete the results that output_dir already holds", affects="nothing")
    check: bool = flag(False, "check every setting and the questions, then stop", affects="nothing")

    made_by = ""  # the command that makes the test sets of the default tasks
    protocol = ""  # the only protocol, if there are not several

    def check_files(self) -> None:
        super().check_files()
        if not Path(self.data_dir).is_dir():
            # ``made_by`` may not make the test sets of tasks that the flags declare.
            own = self.tasks_file or self.checkpoint
            made = f"make it with `{self.made_by}`, or " if self.made_by and not own else ""
            raise UserError(f"there is no folder {self.data_dir} with test sets; {made}pass --data_dir DIR")

    def closing_lines(self, found: Mapping[str, "Results"]) -> list[str]:
        """The lines that the command prints below the results tables. found: the results by protocol."""
        return []

    @property
    def protocols(self) -> dict[str, str]:
        """The output folder of each protocol, that is each way of answering the questions."""
        return {self.protocol: self.output_folder}

    @property
    def output_folder(self) -> str:
        """The folder for predictions and results."""
        if self.output_dir:
            return self.output_dir
        return f"{self.adapter}/{EVALUATION}" if self.adapter else f"output/{self.base_model.replace('/', '_')}"


@dataclasses.dataclass(kw_only=True)
class PredictionFlags(Config):
    """Which examples are answered, and where the answers go.

    A system's prediction configuration inherits from this class first and from its ``AnswerConfig`` second.
    """

    input: str = flag(REQUIRED, "JSON, JSON lines, CSV or parquet file of examples", affects="content")
    output: str = flag(REQUIRED, "file to write: one JSON line per example, in input order", affects="nothing")
    task: str | None = flag(None, "the task of all examples; none: each example names its own in task or task_id")
    overwrite: bool = flag(False, "replace the output file, finished or not", affects="nothing")
    check: bool = flag(False, "check every setting and the examples, then stop", affects="nothing")

    def check_files(self) -> None:
        super().check_files()
        if not Path(self.input).is_file():
            raise UserError(f"the input {self.input} is not a file; pass --input FILE")
        if Path(self.output).is_dir():
            raise UserError(f"--output {self.output} is a folder; pass the path of a file")
        if Path(self.output).suffix.lower() in (".csv", ".tsv", ".parquet"):
            raise UserError(f"--output {self.output} would contain JSON lines; name it .jsonl")
        if Path(self.output).resolve() == Path(self.input).resolve():
            raise UserError(f"--output {self.output} is the input file, which would be overwritten; pass another file")
