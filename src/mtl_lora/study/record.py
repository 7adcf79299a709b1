"""``study.json``: every run with its figures and where they come from, summaries over seeds, comparisons."""

import json
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.report.results import Results
from mtl_lora.study.execute import read_state
from mtl_lora.study.grid import Experiment
from mtl_lora.study.jobs import Job, Planner, Run
from mtl_lora.study.merge import results_of
from mtl_lora.study.notes import notes
from mtl_lora.study.paired_seeds import against
from mtl_lora.study.statistics import summarise
from mtl_lora.train.settings import TrainConfig

FILE_NAME = "study.json"
LOG_NAME, ANALYSIS_NAME = "train_log.jsonl", "adapter_analysis.json"
SCHEMA = 1


def record(planner: Planner, runs: Sequence[Run], searches: Sequence[dict]) -> dict | None:
    """The content of ``study.json`` from the finished ``runs``; None if there is none.

    searches: what the search chose, an entry an experiment.
    """
    study = planner.study
    by_experiment: dict[str, dict[int | None, tuple[Run, Results]]] = {}
    for run in runs:
        by_experiment.setdefault(run.experiment.name, {})[run.seed] = (run, results_of(run))
    if not by_experiment:
        return None
    results = {name: {seed: found for seed, (_, found) in kept.items()} for name, kept in by_experiment.items()}
    every = study.grid.evaluate.get("tasks") or list(study.tasks.columns)
    experiments = []
    for experiment in study.experiments:
        if experiment.name in by_experiment:
            entry = _experiment(planner, experiment, by_experiment[experiment.name], every)
            experiments.append(entry | {"against": _against(planner, experiment, results, every)})
    made = _made(
        [files.read_json(found.path, "the results file") for kept in results.values() for found in kept.values()]
    )
    value = {
        "schema": SCHEMA,
        "kind": "study",
        "name": study.grid.name,
        "about": study.grid.about,
        "notes": [],
        "base_model": study.grid.train.get("base_model", TrainConfig().base_model),
        "task_set": study.tasks.to_json(),
        "grid": files.read_json(study.path, "the grid"),
        "grid_sha256": files.sha256(study.path),
        **made,
        "data": _data(planner),
        "experiments": experiments,
        "transfer": _transfer(planner, results, every),
        "search": _search(planner, searches),
    }
    return value | {"notes": notes(study, value)}


def _experiment(planner: Planner, experiment: Experiment, kept: dict, every: Sequence[str]) -> dict:
    runs = [_run(planner, run, found, every) for run, found in kept.values()]
    first = next(iter(kept.values()))[0].jobs[0]
    told = None if first.train is None else TrainConfig(**first.train)
    first_results = next(iter(kept.values()))[1]
    trainable = first_results.trainable
    tasks = [name for name in study_tasks(planner) if all(name in run["tasks"] for run in runs)]
    averages = [run["average"] for run in runs]
    return {
        "name": experiment.name,
        "method": told and told.adapter_config(planner.study.tasks).method,
        "trainable": trainable and {"adapter": trainable.adapter, "total": trainable.total},
        "adapters": len(next(iter(kept.values()))[0].jobs) if told else 0,
        "rank": told and told.lora_r,
        "learning_rate": told and told.learning_rate,
        "group": experiment.group,
        "alone": experiment.alone,
        "trained_on": told and (experiment.only_tasks or list(planner.data.train().counts)),
        "runs": runs,
        "summary": {
            "tasks": {name: summarise([run["tasks"][name]["accuracy"] for run in runs]) for name in tasks},
            "average": None if None in averages else summarise(averages),
        },
    }


def study_tasks(planner: Planner) -> list[str]:
    """All tasks in column order."""
    return list(planner.study.tasks.columns)


def _run(planner: Planner, run: Run, found: Results, every: Sequence[str]) -> dict:
    value = files.read_json(found.path, "the results file")
    parts = [_job(planner, job) for job in run.jobs]
    scores = {
        name: {key: value["tasks"][name].get(key) for key in ("accuracy", "stderr", "n", "majority")}
        for name in study_tasks(planner)
        if name in found.tasks
    }
    whole = all(name in scores for name in every)
    entry = {
        "seed": run.seed,
        **parts[0],
        "folder": _relative(planner, run.folder),
        "results": _relative(planner, found.path),
        "commit": value.get("commit"),
        "test_data_sha256": found.data,
        "tasks": scores,
        "average": sum(scores[name]["accuracy"] for name in every) / len(every) if whole else None,
    }
    if not run.experiment.alone:
        return entry
    seconds = [part["seconds"] for part in parts]
    return entry | {
        "analysis": None,
        "log": None,
        "commands": [command for part in parts for command in part["commands"]],
        "seconds": {key: sum(second[key] for second in seconds) for key in ("train", "evaluate")},
        "starts": {key: max(part["starts"][key] for part in parts) for key in ("train", "evaluate")},
        "train_data_sha256": None,
        "adapter_sha256": None,
        "steps": sum(part["steps"] or 0 for part in parts),
        "parts": dict(zip([job.folder.name for job in run.jobs], parts, strict=True)),
    }


def _job(planner: Planner, job: Job) -> dict:
    state = read_state(job)
    results = files.read_json(job.folder / "results.json", "the results file")
    train = job.data.get("train")
    return {
        "folder": _relative(planner, job.folder),
        "results": _relative(planner, job.folder / "results.json"),
        "analysis": _if_there(planner, job.folder / ANALYSIS_NAME),
        "log": _if_there(planner, job.folder / LOG_NAME),
        "commands": job.commands,
        "seconds": state.seconds,
        "starts": {"train": state.train and state.train["starts"], "evaluate": state.evaluate["starts"]},
        "train_data_sha256": train and train.sha256["train"],
        "adapter_sha256": results["settings"].get("adapter_sha256"),
        "steps": _steps(job.folder / LOG_NAME),
    }


def _steps(log: Path) -> int | None:
    """The last step of a training's log."""
    if not log.is_file():
        return None
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"]


def _against(planner: Planner, experiment: Experiment, results: dict, every: Sequence[str]) -> dict | None:
    baseline = planner.study.baseline(experiment)
    if baseline is None or baseline.name not in results:
        return None
    found = against(results[baseline.name], results[experiment.name], every)
    return found and {"baseline": baseline.name, **found}


def _transfer(planner: Planner, results: dict, every: Sequence[str]) -> list[dict] | None:
    """Together minus alone: in each group with an experiment of single tasks, every other trained one against it."""
    found = []
    for alone in planner.study.experiments:
        if not alone.alone or alone.name not in results:
            continue
        for other in planner.study.experiments:
            if other.group != alone.group or other.alone or other.train is None or other.name not in results:
                continue
            difference = against(results[alone.name], results[other.name], every)
            if difference:
                names = {"group": alone.group, "method": method_of(planner, other), "experiment": other.name}
                found.append({**names, "alone": alone.name, **difference})
    return found or None


def method_of(planner: Planner, experiment: Experiment) -> str:
    """The method of a trained experiment."""
    return planner.study.train_flags(experiment).get("adapter_name", TrainConfig().adapter_name)


def _search(planner: Planner, searches: Sequence[dict]) -> dict | None:
    search = planner.study.search
    if not searches:
        return None
    keys = {"flag": search.flag, "data_dir": search.data_dir, "seed": search.seed, "train": search.train}
    counts = {"questions": planner.data.dev.counts, "dev_data_sha256": planner.data.dev.sha256}
    return {**keys, **counts, "experiments": list(searches)}


def _data(planner: Planner) -> dict:
    """How many records of each task were used of how many, and the hashes of the files."""
    train, test = planner.data.train(), planner.data.test
    return {
        name: {"records": part.counts, "of": part.of, "sha256": part.sha256}
        for name, part in (("train", train), ("test", test))
    }


def _made(values: Sequence[dict]) -> dict:
    """Commit, versions and device of the evaluations: the last one's; several commits are all named."""
    commits = list(dict.fromkeys(value.get("commit") for value in values))
    return {
        "commit": values[-1].get("commit"),
        "commits": commits,
        "versions": values[-1].get("versions"),
        "device": values[-1].get("device"),
    }


def _relative(planner: Planner, path: Path) -> str:
    return path.relative_to(planner.folder).as_posix()


def _if_there(planner: Planner, path: Path) -> str | None:
    return _relative(planner, path) if path.is_file() else None
