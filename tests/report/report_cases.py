"""What the tests of reports share: results files and paired runs on disk, the command line, rendered tables."""

import copy
import json
import re
from pathlib import Path

from mtl_lora import cli
from mtl_lora.report.table import published_rows

TWO_TASKS = {"tasks": [{"name": "first", "id": 0, "title": "First"}, {"name": "second", "id": 1}], "columns": []}
BASE = {
    "schema": 2,
    "name": "base",
    "method": None,
    "base_model": "smollm2-135m",
    "mode": "score",
    "trainable": None,
    "tasks": {
        "first": {"metric": "accuracy", "value": 0.5, "stderr": 0.03, "n": 300, "majority": 0.6},
        "second": {"metric": "accuracy", "value": 0.25, "stderr": 0.04, "n": 100, "majority": 0.3},
    },
    "task_set": TWO_TASKS,
    "data": {"first": "aaaa", "second": "bbbb"},
}
# As version 0.1.0 wrote it.
TUNED_SCHEMA_1 = {
    **BASE,
    "schema": 1,
    "name": "mtl_lora",
    "method": "mtl_lora",
    "trainable": {"adapter": 16_845_824, "total": 6_755_261_248},
    "tasks": {
        "first": {"accuracy": 0.75, "stderr": 0.03, "n": 300, "majority": 0.6},
        "second": {"accuracy": 0.2, "stderr": 0.03, "n": 100, "majority": 0.3},
    },
    "average": {"accuracy": 0.475, "stderr": 0.0212, "tasks": 2},
}
TUNED = {
    **{key: value for key, value in TUNED_SCHEMA_1.items() if key != "average"},
    "schema": 2,
    "tasks": {
        "first": {"metric": "accuracy", "value": 0.75, "stderr": 0.03, "n": 300, "majority": 0.6},
        "second": {"metric": "accuracy", "value": 0.2, "stderr": 0.03, "n": 100, "majority": 0.3},
    },
}
COMMONSENSE = list(published_rows()[0].cells)
COMMONSENSE_RESULTS = {
    "schema": 2,
    "name": "lora",
    "tasks": {name: {"metric": "accuracy", "value": 0.683, "stderr": 0.008, "n": 100} for name in COMMONSENSE},
    "task_set": {"tasks": [{"name": name, "id": index} for index, name in enumerate(COMMONSENSE)]},
}
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


def changed(record: dict, **places) -> dict:
    """A deep copy with some places set: ``tasks__first__n=5``; ``...`` removes the key."""
    record = copy.deepcopy(record)
    for place, value in places.items():
        *path, key = place.split("__")
        holder = record
        for step in path:
            holder = holder[step]
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    return record


def grid(text: str) -> dict[str, list[str]]:
    """Cells of a rendered markdown table by row label."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def unescaped_pipes(line: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line of reports."""
    code = 0
    try:
        cli.main(["report", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def assert_mistakes(capsys, command: str, mistakes: list[tuple[list, str]]) -> None:
    """Each command line ends with exit code 2 and one sentence that holds the given fact, and prints nothing else."""
    for arguments, fact in mistakes:
        code, out, err = run_command(capsys, command, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("error: ") and err.count("\n") == 1 and fact in err, (arguments, err)


def outcomes(text: str) -> list[bool]:
    """``110`` is right, right, wrong."""
    return [character == "1" for character in text]


def predictions_of(right: dict[str, list[bool]], f1: dict[str, list[float]] | None = None) -> dict[str, list[dict]]:
    """Prediction records by task; the answer to every question is ``yes``."""
    records = {}
    for task, flags in right.items():
        records[task] = [
            {"task": task, "index": index, "answer": "yes", "correct": flag, "prompt_sha256": f"{task} {index}"}
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
        scores[task] = {"metric": "accuracy", "value": correct / len(lines), "stderr": 0.0, "n": len(lines)}
    results = {
        "schema": 2,
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
