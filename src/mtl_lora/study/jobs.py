"""A job: one training and its evaluation, as the two commands a user would type."""

import dataclasses
import json
import shlex
from pathlib import Path

from mtl_lora.study.data import Part

# Flags that touch no result (data and tasks are told by their content): changing one makes no other recipe.
FREE_TRAIN = {"data_path", "tasks_file", "output_dir", "cache_dir", "save_step", "save_total_limit", "logging_steps"}
FREE_TRAIN |= {"wandb_project", "tensorboard"}
FREE_EVALUATE = {"checkpoint", "data_dir", "tasks_file", "output_dir", "name", "batch_size", "share_opening"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training and its evaluation in one folder; ``train`` None: an evaluation of the base model alone.

    label: for progress lines. kind: jobs of one kind take about as long. train, evaluate: flags of the two scripts.
    data: the parts that are read, by name.
    """

    label: str
    kind: str
    folder: Path
    train: dict | None
    evaluate: dict
    launcher: str
    data: dict[str, Part]
    tasks: dict

    @property
    def recipe(self) -> dict[str, object]:
        """What decides the result, flat: ``train.lora_r``, ..., with data by its hashes."""
        recipe = {f"train.{key}": value for key, value in (self.train or {}).items() if key not in FREE_TRAIN}
        recipe |= {f"evaluate.{key}": value for key, value in self.evaluate.items() if key not in FREE_EVALUATE}
        recipe |= {f"the {name} data (sha256)": part.sha256 for name, part in self.data.items()}
        return recipe | {"launcher": self.launcher, "tasks": self.tasks}

    @property
    def commands(self) -> list[str]:
        """The command lines, as one would type them in the project's folder."""
        return [shlex.join(command) for command in (self.train_command(), self.evaluate_command()) if command]

    def train_command(self, **more) -> list[str]:
        """The training's words; empty without a training."""
        return [] if self.train is None else command(self.launcher, "finetune.py", {**self.train, **more})

    def evaluate_command(self, **more) -> list[str]:
        """The evaluation's words."""
        return command(self.launcher, "commonsense_evaluate.py", {**self.evaluate, **more})


def trained_by(recipe: dict[str, object]) -> dict[str, object]:
    """The part of a recipe that decides the trained weights: all but the evaluation's flags and its questions."""
    asked = "the test data (sha256)"
    return {key: value for key, value in recipe.items() if not key.startswith("evaluate.") and key != asked}


def command(launcher: str, script: str, flags: dict) -> list[str]:
    """``python script --flag value ...``; a flag's value is written as the scripts read it."""
    words = [*shlex.split(launcher), script]
    for name, value in flags.items():
        words += [f"--{name}", _spelled(value)]
    return words


def _spelled(value: object) -> str:
    if isinstance(value, list):
        plain = all(not set(entry) & set(",[]'\"") for entry in value)
        return ",".join(value) if plain else json.dumps(value)
    return "none" if value is None else str(value)
