"""The flags of evaluate and predict that every system has. A system's configuration adds its own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora.artifacts import CHECKPOINT_CONFIG, EVALUATION
from mtl_lora.config import DTYPES, REQUIRED, Config, flag
from mtl_lora.errors import UserError

if TYPE_CHECKING:
    from mtl_lora.results import Results

AUTO = "auto"


@dataclasses.dataclass(kw_only=True)
class AnswerConfig(Config):
    """Which model answers, and how."""

    affects = "answers"

    checkpoint: str | None = flag(
        None, "folder of a training; it names its base model and tasks", affects="content", group="who answers"
    )
    base_model: str | None = flag(
        None, "base model alone; with --checkpoint: where its base model lies, if that has moved"
    )
    tasks_file: str | None = flag(
        None, "JSON file that declares your own tasks, where no checkpoint does", affects="content"
    )
    cutoff_len: int | None = flag(None, "most tokens of an example, where no checkpoint has it", min=1)
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
        AUTO, "questions at a time on each device, or auto; in float32 results do not depend on it", affects="nothing"
    )
    trust_remote_code: bool = flag(False, "run model code that the base model's repository brings")
    local_rank: int = flag(
        -1, "set by the deepspeed launcher; the environment's LOCAL_RANK is what counts", affects="nothing"
    )

    def validate(self) -> None:
        number = isinstance(self.batch_size, int)
        self.require(
            "batch_size", f"at least 1, or {AUTO}", self.batch_size >= 1 if number else self.batch_size == AUTO
        )

    def check_files(self) -> None:
        """Raise ``UserError`` for a file or folder that is not there; needs no model library."""
        if self.checkpoint and not Path(self.checkpoint, CHECKPOINT_CONFIG).is_file():
            raise UserError(f"{self.checkpoint} is not an MTL-LoRA checkpoint: it has no {CHECKPOINT_CONFIG}")


@dataclasses.dataclass(kw_only=True)
class EvaluationFlags(Config):
    """What is asked, and where the results go; stands before a system's ``AnswerConfig`` among the bases."""

    data_dir: str = flag(
        "",
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
    overwrite: bool = flag(False, "delete the results that output_dir already holds", affects="nothing")
    check: bool = flag(False, "check every setting and the questions, then stop", affects="nothing")

    made_by = ""  # the command that makes the default's test sets

    def check_files(self) -> None:
        super().check_files()
        if not Path(self.data_dir).is_dir():
            made = f"make it with `{self.made_by}`, or " if self.made_by and not self.knows_tasks else ""
            raise UserError(f"there is no folder {self.data_dir} with test sets; {made}pass --data_dir DIR")

    def closing_lines(self, found: Mapping[str, "Results"]) -> list[str]:
        """What the command prints below the tables of the results (by protocol)."""
        return []

    @property
    def knows_tasks(self) -> bool:
        """Whether tasks were declared, which may not be those that the project can prepare."""
        return bool(self.tasks_file or self.checkpoint)

    @property
    def adapter(self) -> str | None:
        """The folder of what is evaluated, beside whose weights the results go."""
        return self.checkpoint

    @property
    def output_folder(self) -> str:
        """Where predictions and results go."""
        if self.output_dir:
            return self.output_dir
        return f"{self.adapter}/{EVALUATION}" if self.adapter else f"output/{self.base_model.replace('/', '_')}"


@dataclasses.dataclass(kw_only=True)
class PredictionFlags(Config):
    """What is answered, and where the answers go; stands before a system's ``AnswerConfig`` among the bases."""

    input: str = flag(REQUIRED, "JSON, JSON lines, CSV or parquet of examples", affects="content")
    output: str = flag(REQUIRED, "file for one JSON line per example, in the order of the input", affects="nothing")
    task: str | None = flag(None, "task of all examples; none: each example names its own with task or task_id")
    overwrite: bool = flag(False, "replace the output file, or an unfinished one", affects="nothing")
    check: bool = flag(False, "check every setting and the examples, then stop", affects="nothing")

    def check_files(self) -> None:
        super().check_files()
        if not Path(self.input).is_file():
            raise UserError(f"the input {self.input} is not a file; pass --input FILE")
        if Path(self.output).is_dir():
            raise UserError(f"--output {self.output} is a folder; pass the path of a file")
        if Path(self.output).suffix.lower() in (".csv", ".tsv", ".parquet"):
            raise UserError(f"--output {self.output} would hold JSON lines; name it .jsonl")
        if Path(self.output).resolve() == Path(self.input).resolve():
            raise UserError(f"--output {self.output} is the input, which would be lost; pass another file")
