"""The flags of commonsense_evaluate.py as one validated dataclass. What a checkpoint says is never asked again."""

import dataclasses

from mtl_lora.config import DTYPES, Config, flag
from mtl_lora.errors import UserError

ABOUT = """Score a checkpoint, or a base model alone, on the test sets of its tasks."""
AUTO = "auto"
MODES = ("generate", "score", "both")


@dataclasses.dataclass
class EvalConfig(Config):
    """Everything an evaluation is told."""

    checkpoint: str | None = flag(None, "adapter folder; it names base model, prompt and tasks itself")
    peft: str | None = flag(None, "PEFT LoRA folder, evaluated by the same protocol")
    base_model: str | None = flag(None, "base model alone; with --checkpoint or --peft: where its base model lies now")
    data_dir: str = flag("data/commonsense/test", "folder with <task>/test.json")
    output_dir: str | None = flag(None, "folder for predictions and results.json; none: <checkpoint>/evaluation")
    name: str | None = flag(None, "row label in tables; none: the method, or the base model's name")
    tasks: list[str] = flag([], "tasks to score, as a,b; empty: all")
    tasks_file: str | None = flag(None, "JSON file that declares your own tasks, where no checkpoint does")
    limit: int = flag(0, "only the first so many questions of each task; 0: all")

    mode: str = flag("generate", "generate: the answer is found in generated text; score: the likeliest option; both")
    batch_size: int | str = flag(AUTO, "questions at a time on each device, or auto; results do not depend on it")
    share_opening: bool = flag(True, "compute the tokens that all prompts of a task begin with once")
    max_new_tokens: int = flag(32, "most tokens generated for an answer")
    num_beams: int = flag(1, "beams of generation; 1 is greedy")
    dtype: str = flag("auto", "base model dtype: bf16, fp32, fp64; auto: bf16 where the hardware multiplies it")
    template: str | None = flag(None, "prompt template, where no checkpoint says it; none: alpaca")
    cutoff_len: int | None = flag(None, "most tokens of prompt and answer, where no checkpoint says it; none: 256")

    overwrite: bool = flag(False, "delete the results that output_dir already holds")
    trust_remote_code: bool = flag(False, "run model code that the base model's repository brings")
    check: bool = flag(False, "check every setting and the questions, then stop")
    local_rank: int = flag(-1, "set by the deepspeed launcher; the environment's LOCAL_RANK is what counts")

    def validate(self) -> None:
        if not self.checkpoint and not self.peft and not self.base_model:
            raise UserError("pass --checkpoint DIR, --peft DIR, or --base_model NAME to score a base model alone")
        if self.checkpoint and self.peft:
            raise UserError("--checkpoint and --peft are two adapters; pass one")
        self.require("mode", f"one of {', '.join(MODES)}", self.mode in MODES)
        self.require("dtype", f"one of {', '.join(DTYPES)}", self.dtype in DTYPES)
        for name in ("max_new_tokens", "num_beams"):
            self.require(name, "at least 1", getattr(self, name) >= 1)
        number = isinstance(self.batch_size, int)
        self.require(
            "batch_size", f"at least 1, or {AUTO}", self.batch_size >= 1 if number else self.batch_size == AUTO
        )
        self.require("limit", "at least 0", self.limit >= 0)

    @property
    def output_folder(self) -> str:
        """Where predictions and results go."""
        if self.output_dir:
            return self.output_dir
        adapter = self.checkpoint or self.peft
        return f"{adapter}/evaluation" if adapter else f"output/{self.base_model.replace('/', '_')}"

    @property
    def protocols(self) -> dict[str, str]:
        """The protocols to run, each with its folder: with ``both`` a folder each inside the output folder."""
        if self.mode != "both":
            return {self.mode: self.output_folder}
        return {protocol: f"{self.output_folder}/{protocol}" for protocol in MODES if protocol != "both"}
