"""All file names that one part of the package writes and another reads. Imports only the standard library."""

import re
import shutil
from pathlib import Path

# an adapter checkpoint
CHECKPOINT_CONFIG = "mtl_lora_config.json"
CHECKPOINT_WEIGHTS = "mtl_lora.safetensors"
# a training run, beside its final adapter; each checkpoint-N is an adapter checkpoint with resume state
RUN_CONFIG = "run.json"
TRAIN_LOG = "train_log.jsonl"
ADAPTER_ANALYSIS = "adapter_analysis.json"
ADAPTER_START = "adapter_start.safetensors"  # the initial values of the weights that each task has of its own
RESUME_STATE = "trainer_state.json"
TENSORBOARD = "tensorboard"  # folder of event files
SAVING = ".saving"  # folder for a checkpoint until it is complete
# an evaluation
EVALUATION = "evaluation"  # inside the folder of a checkpoint
PROTOCOLS = ("generate", "score")  # with --mode both, each in a folder of its own
RESULTS = "results.json"
EVAL_SETTINGS = "settings.json"
PREDICTIONS = "predictions"
AGREEMENT = "agreement.json"
SHEET = "sheet.png"  # images with their maps
PICTURES = "pictures.html"  # pictures with their answers
# an adapter in PEFT's format
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names of the weights
# a study
STUDY = "study.json"
STUDY_TABLE = "table.md"


def remove_evaluation(folder: str | Path) -> None:
    """Delete an evaluation's results, predictions, settings and pictures, and nothing else: the folder may also hold a
    training run.

    The order ensures that a kill leaves no results without predictions, and no predictions without settings.
    """
    for name in (RESULTS, SHEET, PICTURES):
        (Path(folder) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(folder) / PREDICTIONS, ignore_errors=True)
    (Path(folder) / EVAL_SETTINGS).unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    """Delete a ``checkpoint-N``; after a kill, whatever is left of it does not count as complete."""
    (folder / RESUME_STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete ``checkpoint-N`` folders of a training run, oldest first."""
    folders = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{RESUME_STATE}") if path.is_file()]
    numbered = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(numbered, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def is_study(path: str | Path) -> bool:
    """Return whether the path is a study's file, or a folder that has one."""
    return Path(path).name == STUDY or Path(path, STUDY).is_file()
