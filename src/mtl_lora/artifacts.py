"""Every file name that one part of the package writes and another reads. Standard library alone."""

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
ADAPTER_START = "adapter_start.safetensors"  # the tasks' own weights as the seed drew them
RESUME_STATE = "trainer_state.json"
TENSORBOARD = "tensorboard"  # folder of event files
SAVING = ".saving"  # where a checkpoint lies until it is complete
# an evaluation
EVALUATION = "evaluation"  # inside the folder of a checkpoint
PROTOCOLS = ("generate", "score")  # with --mode both, each in a folder of its own
RESULTS = "results.json"
EVAL_SETTINGS = "settings.json"
PREDICTIONS = "predictions"
AGREEMENT = "agreement.json"
SHEET = "sheet.png"  # of maps
PICTURES = "pictures.html"  # of pictures and answers
# an adapter in PEFT's format
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names of weights
# a study
STUDY = "study.json"


def remove_evaluation(folder: str | Path) -> None:
    """Delete an evaluation's results, predictions, settings and what was drawn; nothing else, for a training may share
    its folder.

    In an order in which a kill leaves no results without predictions, and no predictions without their settings.
    """
    for name in (RESULTS, SHEET, PICTURES):
        (Path(folder) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(folder) / PREDICTIONS, ignore_errors=True)
    (Path(folder) / EVAL_SETTINGS).unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    """Delete a ``checkpoint-N``, of which a kill leaves nothing that counts as complete."""
    (folder / RESUME_STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete ``checkpoint-N`` folders of a training run, oldest first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and (folder / RESUME_STATE).is_file():
            found.append((int(number.group(1)), folder))
    return [folder for _, folder in sorted(found)]
