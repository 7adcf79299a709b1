"""What study.json says of one run: its figures, its files, how it was made and from what."""

import json
from collections.abc import Iterator
from pathlib import Path

from mtl_lora import files
from mtl_lora.report.results import FILE_NAME as RESULTS_NAME
from mtl_lora.report.results import Results
from mtl_lora.study.jobs import Job
from mtl_lora.study.planner import Run
from mtl_lora.study.state import read_state

LOG_NAME, ANALYSIS_NAME = "train_log.jsonl", "adapter_analysis.json"
_SCORE_KEYS = ("accuracy", "stderr", "n", "majority")


def run_record(run: Run, found: Results, top: Path) -> dict:
    """One run with its results ``found``; paths are relative to ``top``.

    average is None unless every task that the study asks has a score. A run of tasks trained alone has no adapter,
    log or training data of its own: ``parts`` has those by task.
    """
    value = files.read_json(found.path, "the results file")
    columns = [name for name in found.task_set.columns if name in found.tasks]
    scores = {name: {key: value["tasks"][name].get(key) for key in _SCORE_KEYS} for name in columns}
    parts = {job.folder.name: job_record(job, top) for job in run.jobs}
    entry = next(iter(parts.values())) | {
        "seed": run.seed,
        "folder": _relative(run.folder, top),
        "results": _relative(found.path, top),
        "commit": value.get("commit"),
        "test_data_sha256": {name: found.data.get(name) for name in columns},
        "tasks": scores,
        "average": value["average"]["accuracy"],
    }
    return entry | _together(list(parts.values())) | {"parts": parts} if run.experiment.alone else entry


def _together(parts: list[dict]) -> dict:
    """What a run of several jobs has: sums where there is one, nothing where each has its own."""
    return {
        **dict.fromkeys(("analysis", "log", "train_commit", "train_data_sha256", "adapter_sha256")),
        "commands": [command for part in parts for command in part["commands"]],
        "seconds": {step: sum(part["seconds"][step] for part in parts) for step in ("train", "evaluate")},
        "starts": {step: max(part["starts"][step] for part in parts) for step in ("train", "evaluate")},
        "steps": sum(part["steps"] or 0 for part in parts),
    }


def records_of_runs(value: dict) -> Iterator[dict]:
    """Every run in the content of study.json, and behind one of several jobs each of these."""
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            yield from (run, *run.get("parts", {}).values())


def job_record(job: Job, top: Path) -> dict:
    """Files, commands, seconds, hashes and optimiser steps of one training and its evaluation."""
    state = read_state(job)
    results = files.read_json(job.folder / RESULTS_NAME, "the results file")
    steps = {step: state.steps.get(step) for step in ("train", "evaluate")}
    log = job.folder / LOG_NAME
    return {
        "folder": _relative(job.folder, top),
        "results": _relative(job.folder / RESULTS_NAME, top),
        "analysis": _if_there(job.folder / ANALYSIS_NAME, top),
        "log": _if_there(log, top),
        "commands": job.commands,
        "seconds": {step: known and known["seconds"] for step, known in steps.items()},
        "starts": {step: known and known["starts"] for step, known in steps.items()},
        "train_commit": (results.get("adapter") or {}).get("origin", {}).get("commit"),
        "train_data_sha256": job.data["train"].sha256["train"] if job.train else None,
        "adapter_sha256": results["settings"].get("adapter_sha256"),
        "steps": json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"] if log.is_file() else None,
    }


def _relative(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()


def _if_there(path: Path, top: Path) -> str | None:
    return _relative(path, top) if path.is_file() else None
