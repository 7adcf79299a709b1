"""Answers on disk: written by several processes, one JSON line each, and resumed after a kill."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError
from mtl_lora.evaluation.evaluator import ADAPTER_CONFIG, BASE_CONFIG, Evaluator, Question

PARTS = "~part-*.jsonl"  # no task name begins with "~"


class Processes:
    """Context manager for the processes of a distributed launch, or for a single process without a launch."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def __enter__(self) -> "Processes":
        if self.count > 1:  # only barriers cross between processes, so gloo serves GPU runs too
            torch.distributed.init_process_group("gloo")
        return self

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            torch.distributed.barrier()

    def __exit__(self, *exception) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()


def is_answered(folder: str | Path, questions: Sequence[Question]) -> bool:
    """Return whether every question has an answer in ``folder``."""
    found = Predictions(folder).read()
    return all(question.answered_by(found.get(question.key)) for question in questions)


def answer_all(
    evaluator: Evaluator, protocol: str, questions: Sequence[Question], folder: str | Path, processes: Processes
) -> None:
    """Answer the questions without a prediction line in ``folder`` and append their lines; the processes share them.

    If one line of a batch is missing, the whole batch is answered, so scores do not depend on where a run was killed.
    """
    predictions = Predictions(folder, processes.rank)
    found = predictions.read()
    done = {question.key for question in questions if question.answered_by(found.get(question.key))}
    processes.barrier()  # no process appends before all have read
    waiting = [batch for batch in evaluator.batches(questions, protocol) if any(one.key not in done for one in batch)]
    if processes.rank == 0 and (kept := len(questions) - sum(map(len, waiting))):
        note = f"{kept:,} answers in {folder} are kept"
        if not waiting:
            note = f"no question is asked: {folder} holds all answers"
        print(f"{note}; pass --overwrite True to replace them", file=sys.stderr)
    own = waiting[processes.rank :: processes.count]
    if own:
        evaluator.load()
        total = sum(len(batch) for batch in own)
        with tqdm(total=total, desc=protocol, unit=" questions", smoothing=0.02, disable=processes.rank > 0) as bar:
            for batch in own:
                predictions.append(evaluator.answer(batch, protocol))
                bar.update(len(batch))
    processes.barrier()


class Predictions:
    """The prediction lines in an evaluation's folder; each process appends to its own file."""

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder) / artifacts.PREDICTIONS
        self.own = self.folder / f"~part-{rank}.jsonl"

    def read(self) -> dict[tuple[str, int], dict]:
        """Return every complete line by (task, index); a line cut off by a kill is skipped, so it is answered again."""
        found = {}
        # Lines of a run in progress are newer than the gathered ones, so they are read last.
        parts = set(self.folder.glob(PARTS))
        gathered = sorted(set(self.folder.glob("*.jsonl")) - parts)
        for path in [*gathered, *sorted(parts)]:
            for text in path.read_bytes().split(b"\n"):  # bytes: a cut line may end inside a character
                try:
                    line = json.loads(text)
                    task, index = line["task"], line["index"]
                    if files.NAME.fullmatch(task) and type(index) is int and index >= 0:  # the task names a file
                        found[task, index] = line
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        return found

    def append(self, lines: list[dict]) -> None:
        """Append lines to this process's file, after a line break, since a kill may have cut off the last line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.own.open("a", encoding="utf-8") as opened:
            opened.write("\n" + files.json_lines(lines))

    def gather(self, lines: Mapping[tuple[str, int], dict], sizes: Mapping[str, int]) -> None:
        """Write ``lines`` to one file per task, ordered by question index, and delete the files of the processes.

        sizes: number of examples by task; lines beyond it belong to an earlier, larger test set and are dropped.
        """
        by_task: dict[str, list[dict]] = {}
        for (task, index), line in sorted(lines.items()):
            if task not in sizes or index < sizes[task]:
                by_task.setdefault(task, []).append(line)
        for task, kept in by_task.items():
            files.write_text(self.folder / f"{task}.jsonl", files.json_lines(kept))
        for part in self.folder.glob(PARTS):
            part.unlink()


def require_own_settings(folder: str | Path) -> None:
    """Raise ``UserError`` if the folder has another program's ``settings.json``, which would be overwritten."""
    path = Path(folder) / artifacts.EVAL_SETTINGS
    if path.exists() and "base_fingerprint" not in files.read_object(path, "the settings of an earlier evaluation"):
        raise UserError(f"{path} was not written by an evaluation; choose another output, or delete it")


def check_settings(folder: str | Path, settings: dict, way_out: str) -> None:
    """Raise ``UserError`` naming the settings that differ if a folder holds answers given under other settings."""
    path = Path(folder) / artifacts.EVAL_SETTINGS
    if not any((Path(folder) / artifacts.PREDICTIONS).glob("*.jsonl")):
        return
    if not path.exists():
        raise UserError(f"{folder} holds answers without their {path.name}; {way_out}")
    # Earlier versions did not record these keys.
    missing = {"protocol": 1} | {key: settings[key] for key in (ADAPTER_CONFIG, BASE_CONFIG) if key in settings}
    earlier = missing | files.read_object(path, "the settings of an earlier evaluation")
    different = sorted(key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key))
    if different:
        raise UserError(f"{folder} holds answers given with another {', '.join(different)}; {way_out}")


def begin(folder: str | Path, settings: dict, overwrite: bool) -> None:
    """Prepare a folder, already checked, for answers under ``settings``. overwrite: delete the evaluation in it."""
    if overwrite:
        artifacts.remove_evaluation(folder)
    predictions = Predictions(folder)
    for left in predictions.folder.glob(".*.partial"):  # temporary files of a killed evaluation
        left.unlink()
    # Gather the files that the processes of a killed evaluation left: this launch may divide the questions in another
    # way, and the order of the files decides which of two lines for a question counts.
    if any(predictions.folder.glob(PARTS)):
        predictions.gather(predictions.read(), {})
    files.write_json(Path(folder) / artifacts.EVAL_SETTINGS, settings)
