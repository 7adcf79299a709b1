"""Predictions on disk: one JSON line per question, appended as it is answered, so that a killed run resumes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError

PARTS = "~part-*.jsonl"  # no task name begins with "~"
# Raised when a question gets another answer from the same model and settings: prompts, generation or scores changed.
PROTOCOL = 1


class Predictions:
    """The prediction lines of one evaluation's folder; each process appends to a file of its own."""

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder) / artifacts.PREDICTIONS
        self.own = self.folder / f"~part-{rank}.jsonl"

    def read(self) -> dict[tuple[str, int], dict]:
        """Every complete line by (task, index); a line that a kill tore is left out, and so is answered again."""
        found = {}
        # Lines of a run in progress are newer than those gathered before it.
        parts = set(self.folder.glob(PARTS))
        gathered = sorted(set(self.folder.glob("*.jsonl")) - parts)
        for path in [*gathered, *sorted(parts)]:
            for text in path.read_bytes().split(b"\n"):  # a torn line may end inside a character
                try:
                    line = json.loads(text)
                    found[line["task"], line["index"]] = line
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def append(self, lines: list[dict]) -> None:
        """Write lines to this process's file, behind a line break, for a kill may have torn the line before them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.own.open("a", encoding="utf-8") as opened:
            opened.write("\n" + files.json_lines(lines))

    def gather(self, lines: Mapping[tuple[str, int], dict], sizes: Mapping[str, int]) -> None:
        """Write ``lines`` to one file per task, in the order of the questions, in place of every process's file.

        sizes: the number of examples by task; lines beyond it belong to an earlier, larger test set and are dropped.
        """
        by_task: dict[str, list[dict]] = {}
        for (task, index), line in sorted(lines.items()):
            if task not in sizes or index < sizes[task]:
                by_task.setdefault(task, []).append(line)
        for task, kept in by_task.items():
            files.write_text(self.folder / f"{task}.jsonl", files.json_lines(kept))
        for part in self.folder.glob(PARTS):
            part.unlink()


def check_settings(folder: str | Path, settings: dict, way_out: str) -> None:
    """Raise ``UserError`` naming what differs if a folder holds answers that were given under other settings."""
    path = Path(folder) / artifacts.EVAL_SETTINGS
    if not path.exists():
        return
    earlier = {"protocol": 1, **files.read_json(path, "the settings of an earlier evaluation")}
    different = sorted(key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key))
    if different:
        raise UserError(f"{folder} holds answers with another {', '.join(different)}; {way_out}")


def claim(folder: str | Path, settings: dict, overwrite: bool) -> None:
    """Make a folder, which was checked, that of answers under ``settings``.

    overwrite: delete an evaluation's results, settings and predictions; nothing else, for a training may share it.
    """
    if overwrite:
        for name in (artifacts.RESULTS, artifacts.EVAL_SETTINGS):
            (Path(folder) / name).unlink(missing_ok=True)
        shutil.rmtree(Path(folder) / artifacts.PREDICTIONS, ignore_errors=True)
    files.write_json(Path(folder) / artifacts.EVAL_SETTINGS, settings)
