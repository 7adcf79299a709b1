"""``mtl-lora export peft | merge | import-peft | import-original``: each command is a dataclass of its flags."""

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import cli
from mtl_lora.config import DTYPES, REQUIRED, Config, flag
from mtl_lora.errors import UserError
from mtl_lora.language.tasks import COMMONSENSE, TaskSet


@dataclasses.dataclass(kw_only=True)
class Command(Config):
    """The flags that every export command has, and how it runs.

    home: ``module:function``, imported after the flags are checked, since it needs torch. The function takes the flags
    as arguments, except that the base model and the tasks file are passed as a ``BaseModel`` and a ``TaskSet``.
    """

    home = ""
    base_model: str | None = flag(None, "name or folder of the base model; none: the recorded one")
    output: str = flag(REQUIRED, "folder to write; it appears complete or not at all")
    overwrite: bool = flag(False, "replace an earlier output of this command; False: refuse a folder that is not empty")
    trust_remote_code: bool = flag(False, "run model code from the base model's repository")

    def run(self) -> list[Path]:
        """Run the command and return the folders that it wrote. Raises ``UserError``."""
        from mtl_lora.base_model import BaseModel

        module, _, function = self.home.partition(":")
        module = importlib.import_module(module)
        values = {flag.name: getattr(self, flag.name) for flag in self.flags()}
        name, trust = values.pop("base_model"), values.pop("trust_remote_code")
        adapter = values.get("checkpoint", values.get("peft"))
        base = BaseModel(name) if name is not None else module.recorded_base(adapter)
        if "tasks_file" in values:
            path = values.pop("tasks_file")
            values["tasks"] = TaskSet.load(path) if path else COMMONSENSE
        written = getattr(module, function)(base_model=dataclasses.replace(base, trust_remote_code=trust), **values)
        return written if isinstance(written, list) else [written]


@dataclasses.dataclass(kw_only=True)
class ExportPeft(Command):
    """Write one PEFT LoRA folder per task, with a model card."""

    home = "mtl_lora.export.peft:export_peft"
    checkpoint: str = flag(REQUIRED, "adapter folder of a training run")
    tasks: list[str] = flag([], "tasks to export, as a,b; empty: all")
    results: str | None = flag(None, "results.json for the card; none: the checkpoint's own, if of the same weights")
    form: str = flag(
        "exact",
        "exact: an adapter equal to the trained one; lora: the closest plain LoRA of --rank, with its error stated",
        choices=("exact", "lora"),
        aliases=("as",),
    )
    rank: int | None = flag(None, "rank of the LoRA with --as lora", min=1)

    def validate(self) -> None:
        if (self.form == "lora") != (self.rank is not None):
            raise UserError("--as lora and --rank R go together: they export the closest plain LoRA of rank R")


@dataclasses.dataclass(kw_only=True)
class ExportMerged(Command):
    """Write a plain model with the adapter merged into its weights for one task."""

    home = "mtl_lora.export.merge:export_merged"
    checkpoint: str = flag(REQUIRED, "adapter folder of a training run")
    task: str | None = flag(
        None, "the task; not needed for lora, dora and multilora on a language model, which are the same for all tasks"
    )
    dtype: str = flag("auto", f"dtype of the weights: {', '.join(DTYPES)}; auto: the base model's own", choices=DTYPES)


@dataclasses.dataclass(kw_only=True)
class ImportPeft(Command):
    """Write a checkpoint that equals a PEFT LoRA for every task."""

    home = "mtl_lora.export.importers:import_peft"
    peft: str = flag(REQUIRED, "folder of a plain PEFT LoRA in safetensors")
    tasks_file: str | None = flag(None, "JSON file of the tasks; none: the eight commonsense tasks")
    method: str = flag("mtl_lora", "method of the checkpoint: mtl_lora or lora", choices=("mtl_lora", "lora"))
    num_B: int = flag(3, "number n of MTL-LoRA's up-projections")
    temperature: float = flag(0.1, "temperature tau of MTL-LoRA's mixture softmax(w_t / tau)")
    seed: int = flag(42, "fixes MTL-LoRA's mixture logits w", min=0, max=2**32 - 1)
    template: str = flag("alpaca", "prompt template that the LoRA was trained with: alpaca, original or plain")


@dataclasses.dataclass(kw_only=True)
class ImportOriginal(Command):
    """Write a checkpoint with the weights of the original MTL-LoRA repository's checkpoint file."""

    home = "mtl_lora.export.importers:import_original"
    file: str = flag(REQUIRED, "the original's checkpoint file (.bin or .pt); only tensors are unpickled")
    base_model: str = flag(REQUIRED, "name or folder of the base model it was trained on")
    tasks_file: str | None = flag(None, "JSON file of the tasks; none: the eight commonsense tasks")
    alpha: float = flag(16.0, "lora_alpha of the training, the numerator of the scale alpha / r")
    temperature: float = flag(0.1, "temperature tau of the mixture softmax(w_t / tau)")


COMMANDS = {"peft": ExportPeft, "merge": ExportMerged, "import-peft": ImportPeft, "import-original": ImportOriginal}


def main(arguments: Sequence[str]) -> None:
    """Run one export command and print the folders that it wrote; raises ``UserError`` for a user's mistake."""
    if command := cli.parse_one_of("export", COMMANDS, arguments):
        print(*command.run(), sep="\n")


if __name__ == "__main__":
    cli.main(["export", *sys.argv[1:]])
