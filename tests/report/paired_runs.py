"""Two runs on the same questions, on disk, as the evaluation writes them."""

import json
from pathlib import Path

from report_records import TWO_TASKS, changed

SETTINGS = {
    "mode": "generate",
    "base_fingerprint": "base",
    "adapter_sha256": None,
    "template": "alpaca",
    "cutoff_len": 256,
    "dtype": "torch.bfloat16",
    "max_new_tokens": 32,
    "num_beams": 1,
    "limit": 0,
    "batch_size": 16,
}


def outcomes(text: str) -> list[bool]:
    """``110`` is right, right, wrong."""
    return [character == "1" for character in text]


def predictions_of(right: dict[str, list[bool]], f1: dict[str, list[float]] | None = None) -> dict[str, list[dict]]:
    """Prediction records by task; the answer to every question is ``yes``."""
    records = {}
    for task, flags in right.items():
        records[task] = [
            {
                "task": task,
                "index": index,
                "answer": "yes",
                "correct": flag,
                "parsed": "yes" if flag else "no",
                "prompt_sha256": f"{task} {index}",
            }
            for index, flag in enumerate(flags)
        ]
        for record, value in zip(records[task], (f1 or {}).get(task, []), strict=False):
            record["f1"] = value
    return records


def write_run(folder: Path, records: dict[str, list[dict]], **places) -> Path:
    """Write predictions and the ``results.json`` that counts them, changed in ``places``; returns the folder."""
    scores = {}
    for task, lines in records.items():
        write_lines(folder / "predictions" / f"{task}.jsonl", lines)
        correct = sum(line["correct"] for line in lines)
        scores[task] = {"accuracy": correct / len(lines), "stderr": 0.0, "n": len(lines), "correct": correct}
    results = {
        "schema": 1,
        "name": folder.name,
        "base_model": "smollm2-135m",
        "mode": "generate",
        "tasks": scores,
        "task_set": TWO_TASKS,
        "settings": SETTINGS,
        "data": {task: f"{task} data" for task in records},
    }
    (folder / "results.json").write_text(json.dumps(changed(results, **places)), encoding="utf-8")
    return folder


def write_lines(path: Path, records: list) -> None:
    """One line a record; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
