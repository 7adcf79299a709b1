"""Predictions on disk: a JSON line a question, appended as it is answered, so that a killed run goes on."""

import json
from pathlib import Path

from mtl_lora import files
from mtl_lora.language.output import PREDICTIONS_NAME

PARTS = "~part-*.jsonl"  # no task name begins with "~"


class Predictions:
    """The prediction lines of one output folder; each process appends to a file of its own."""

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder) / PREDICTIONS_NAME
        self.own = self.folder / f"~part-{rank}.jsonl"
        self._opened = None

    def read(self) -> dict[tuple[str, int], dict]:
        """Every whole line by (task, index); a line torn by a kill is left out, and so is answered again."""
        found = {}
        # Lines of a run that is under way stand for newer answers than those gathered before it.
        parts = set(self.folder.glob(PARTS))
        gathered = sorted(set(self.folder.glob("*.jsonl")) - parts)
        for path in [*gathered, *sorted(parts)]:
            for line in path.read_bytes().split(b"\n"):  # a torn line may end inside a character
                try:
                    record = json.loads(line)
                    found[record["task"], record["index"]] = record
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def append(self, records: list[dict]) -> None:
        """Write lines and flush them to the disk."""
        if self._opened is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            torn = self.own.exists() and not self.own.read_bytes().endswith(b"\n")
            self._opened = self.own.open("a", encoding="utf-8")
            if torn:
                self._opened.write("\n")
        self._opened.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._opened.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def gather(self) -> dict[tuple[str, int], dict]:
        """Put the lines of all processes into one file a task, in the order of the questions; returns them all."""
        found = self.read()
        by_task = {}
        for (task, _), record in sorted(found.items()):
            by_task.setdefault(task, []).append(record)
        for task, records in by_task.items():
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            files.write_text(self.folder / f"{task}.jsonl", text)
        for part in self.folder.glob(PARTS):
            part.unlink()
        return found
