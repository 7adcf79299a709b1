"""What an evaluation leaves in its output folder, by name; a training may lie in the same one."""

import shutil
from pathlib import Path

RESULTS_NAME, SETTINGS_NAME, PREDICTIONS_NAME = "results.json", "settings.json", "predictions"


def delete_evaluation(folder: Path) -> None:
    """Delete an evaluation's results, settings and predictions, and nothing else."""
    for name in (RESULTS_NAME, SETTINGS_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PREDICTIONS_NAME, ignore_errors=True)
