"""A small valid grid, and runs of a study on disk as the two scripts leave them."""

import copy
import json
import time
from pathlib import Path

from shared import QUICKSTART

from mtl_lora.errors import UserError
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.study.commands import locked
from mtl_lora.study.data import StudyData
from mtl_lora.study.jobs import Job
from mtl_lora.study.planner import Planner
from mtl_lora.study.read_grid import read_grid
from mtl_lora.study.state import State

GRID = {
    "name": "small",
    "about": "A small study.",
    "seeds": [0, 1],
    "baseline": "LoRA",
    "train_records": 12,
    "test_records": 4,
    "train": {"base_model": "base", "data_path": str(QUICKSTART / "train.json"), "lora_r": 4, "max_steps": 3},
    "evaluate": {"data_dir": str(QUICKSTART / "test"), "mode": "score"},
    "experiments": [
        {"name": "Base", "train": None},
        {"name": "LoRA", "train": {"adapter_name": "lora"}},
        {"name": "MTL-LoRA", "train": {"adapter_name": "mtl_lora", "learning_rate": 0.01}},
    ],
}
SEARCH = {"values": [0.01, 0.001], "data_dir": "dev", "records": 2, "train": {"max_steps": 2}}
ALONE = {"name": "Alone", "train": {"adapter_name": "lora"}, "alone": True}


def grid(*more: dict, **changes) -> dict:
    """``GRID`` with other keys (``...`` takes one out) and ``more`` experiments."""
    value = {**copy.deepcopy(GRID), **changes}
    value["experiments"] = [*value["experiments"], *more]
    return {key: entry for key, entry in value.items() if entry is not ...}


def write_grid(folder: Path, value: dict) -> Path:
    """The grid's file."""
    path = folder / "grid.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def dev_set(folder: Path) -> str:
    """A development set: the second half of the quick start's test records."""
    for task in COMMONSENSE.names:
        records = json.loads((QUICKSTART / "test" / task / "test.json").read_text())
        (folder / "dev" / task).mkdir(parents=True)
        (folder / "dev" / task / "test.json").write_text(json.dumps(records[30:]))
    return str(folder / "dev")


def planner(folder: Path, value: dict) -> Planner:
    """A planner whose study lies in ``folder``/study."""
    study = read_grid(write_grid(folder, value))
    return Planner(study, StudyData(study, folder / "study"), folder / "study")


def outcomes(text: str) -> list[bool]:
    """``110`` is right, right, wrong."""
    return [character == "1" for character in text]


def finish(job: Job, right: dict[str, str], seconds: float = 10.0) -> None:
    """Leave a job's folder as a finished training and evaluation would; ``right``: ``outcomes`` by task."""
    step = {"done": True, "seconds": seconds, "starts": 1}
    State(job.recipe, job.commands, dict(step) if job.train else None, dict(step)).write(job)
    method = job.train and job.train["adapter_name"]
    write_results(job.folder, right, name=job.evaluate["name"], method=method)
    if job.train:
        (job.folder / "train_log.jsonl").write_text('{"step": 2, "loss": 2.0}\n{"step": 3, "train_runtime": 1.0}\n')
        (job.folder / "mtl_lora.safetensors").write_text("weights")


def write_results(folder: Path, right: dict[str, str], name: str = "run", method: str | None = "lora") -> Path:
    """The results and predictions of an evaluation; returns the folder."""
    scores = {}
    for task, text in right.items():
        correct = outcomes(text)
        lines = [
            {"task": task, "index": index, "answer": "yes", "correct": outcome, "prompt_sha256": f"{task} {index}"}
            for index, outcome in enumerate(correct)
        ]
        path = folder / "predictions" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        share = sum(correct) / len(correct)
        stderr = (share * (1 - share) / len(correct)) ** 0.5
        scores[task] = {"accuracy": share, "stderr": stderr, "n": len(correct), "majority": 0.5}
    settings = {"mode": "score", "base_fingerprint": "base", "template": "alpaca", "cutoff_len": 256, "limit": 0}
    results = {
        "schema": 1,
        "name": name,
        "method": method,
        "base_model": "base",
        "mode": "score",
        "trainable": {"adapter": 1000, "total": 50_000} if method else None,
        "tasks": scores,
        "average": {"accuracy": sum(score["accuracy"] for score in scores.values()) / len(scores), "stderr": 0.1},
        "task_set": COMMONSENSE.to_json(),
        "settings": settings | {"adapter_sha256": f"weights in {folder.name}" if method else None},
        "data": {task: f"{task} data" for task in right},
        "command": f"commonsense_evaluate.py --output_dir {folder}",
        "commit": "abc",
        "versions": {"torch": "2"},
        "device": "a CPU",
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def wait_for(holds) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def is_locked(folder: Path) -> bool:
    """Whether a study, or a command that outlived one, runs in a folder."""
    try:
        with locked(folder):
            return False
    except UserError:
        return True
