"""A small valid grid, and runs of a study on disk as the two commands leave them."""

import copy
import json
import time
from pathlib import Path

from shared import QUICKSTART

from mtl_lora.errors import UserError
from mtl_lora.files import claimed
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.results import Results, TaskNames, TaskResult, Trainable
from mtl_lora.study.config import read_grid
from mtl_lora.study.plan import Plan, PlannedJob, PlannedRun, State

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
SEARCH = {"values": [0.01, 0.001], "data_dir": "dev", "records": 2, "widen": 0, "train": {"max_steps": 2}}
ALONE = {"name": "Alone", "train": {"adapter_name": "lora"}, "alone": True}


def grid(*more: dict, **changes) -> dict:
    """``GRID`` with other keys (``...`` takes one out) and ``more`` experiments."""
    value = {**copy.deepcopy(GRID), **changes}
    value["experiments"] = [*value["experiments"], *more]
    return {key: entry for key, entry in value.items() if entry is not ...}


def with_flags(step: str = "train", **flags) -> dict:
    """``GRID`` with further flags for all experiments."""
    value = grid()
    value[step] |= flags
    return value


def write_grid(folder: Path, value: dict) -> Path:
    """The grid's file."""
    path = folder / "grid.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def dev_set(folder: Path) -> str:
    """A development set: the second half of the quick start's test questions."""
    for task in COMMONSENSE.names:
        records = json.loads((QUICKSTART / "test" / task / "test.json").read_text())
        (folder / "dev" / task).mkdir(parents=True)
        (folder / "dev" / task / "test.json").write_text(json.dumps(records[30:]))
    return str(folder / "dev")


def plan_of(folder: Path, value: dict) -> Plan:
    """The plan of a study that lies in ``folder``/study."""
    return Plan(read_grid(str(write_grid(folder, value))), folder / "study")


def run_of(plan: Plan, name: str, seed: int | None = 0, chosen: float | None = None) -> PlannedRun:
    """One run of a plan."""
    return next(run for run in plan.runs(plan.grid.experiment(name), chosen) if run.seed == seed)


def job_of(folder: Path, value: dict, name: str = "LoRA") -> PlannedJob:
    """The first job of an experiment with seed 0."""
    return run_of(plan_of(folder, value), name).jobs[0]


def finish(job: PlannedJob, right: dict[str, str], seconds: float = 10.0) -> None:
    """Leave a job's folder as a finished training and evaluation would; ``right``: by task, ``110`` is two of three."""
    steps = dict.fromkeys(job.flags, 1)
    State(job.configuration, steps, dict.fromkeys(steps, seconds)).save(job.folder)
    write_results(job.folder, right, job.flags["evaluate"]["name"], job.flags.get("train", {}).get("adapter_name"))
    if "train" in job.flags:
        (job.folder / "train_log.jsonl").write_text('{"step": 2, "loss": 2.0}\n{"step": 3, "train_runtime": 1.0}\n')
        (job.folder / "mtl_lora.safetensors").write_text("weights")


def write_results(folder: Path, right: dict[str, str], name: str = "run", method: str | None = "lora") -> Results:
    """The results and predictions of an evaluation."""
    tasks = {}
    for task, text in right.items():
        correct = [character == "1" for character in text]
        lines = [
            {"task": task, "index": index, "answer": "yes", "correct": outcome, "prompt_sha256": f"{task} {index}"}
            for index, outcome in enumerate(correct)
        ]
        path = folder / "predictions" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        value = sum(correct) / len(correct)
        tasks[task] = TaskResult("accuracy", value, (value * (1 - value) / len(correct)) ** 0.5, len(correct), 0.5)
    settings = {"mode": "score", "base_fingerprint": "base", "template": "alpaca", "cutoff_len": 256, "limit": 0}
    results = Results(
        name=name,
        method=method,
        method_title=method and method.upper(),
        base_model="base",
        mode="score",
        trainable=Trainable(1000, 50_000) if method else None,
        tasks=tasks,
        task_set=TaskNames.from_json(COMMONSENSE.to_json(), "the tasks"),
        settings=settings | {"adapter_sha256": f"weights in {folder.name}" if method else None},
        data={task: f"{task} data" for task in right},
        command=f"mtl-lora evaluate --output_dir {folder}",
        commit="abc",
        versions={"torch": "2"},
        device="a CPU",
        path=folder / "results.json",
    )
    results.save(results.path)
    return results


def wait_for(holds) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def is_locked(folder: Path) -> bool:
    """Whether a study, or a command that outlived one, runs in a folder."""
    try:
        with claimed(folder):
            return False
    except UserError:
        return True
