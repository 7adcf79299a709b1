"""The content of study.json: every experiment with its runs, summaries over seeds, comparisons, transfer, search."""

from collections.abc import Sequence

from mtl_lora import files
from mtl_lora.adapter.config import AdapterConfig
from mtl_lora.language.config import TrainConfig
from mtl_lora.report.results import Results
from mtl_lora.study.grid import Experiment
from mtl_lora.study.merge import results_of
from mtl_lora.study.notes import notes
from mtl_lora.study.paired_seeds import against
from mtl_lora.study.planner import Planner, Run
from mtl_lora.study.run_record import run_record
from mtl_lora.study.statistics import summarise

FILE_NAME = "study.json"
SCHEMA = 1
_TITLES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "multilora": "MultiLoRA",
    "moelora": "MoELoRA",
    "mtl_lora": "MTL-LoRA",
}
Found = dict[str, dict[int | None, tuple[Run, Results]]]


def record(planner: Planner, runs: Sequence[Run], searches: Sequence[dict]) -> dict | None:
    """What study.json holds of the finished ``runs``; None if there is none. searches: see ``search.outcome``."""
    study, found = planner.study, _results(runs)
    if not found:
        return None
    every = study.grid.evaluate.get("tasks") or study.tasks.names
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
        **_made(found),
        "data": _data(planner),
        "experiments": [
            _experiment(planner, experiment, found, every)
            for experiment in study.experiments
            if experiment.name in found
        ],
        "transfer": _transfer(planner, found, every),
        "search": _search(planner, searches),
    }
    return value | {"notes": notes(study, value)}


def _results(runs: Sequence[Run]) -> Found:
    """Runs and their results by experiment and seed."""
    found: Found = {}
    for run in runs:
        found.setdefault(run.experiment.name, {})[run.seed] = (run, results_of(run))
    return found


def _experiment(planner: Planner, experiment: Experiment, found: Found, every: Sequence[str]) -> dict:
    kept = list(found[experiment.name].values())
    (first, first_results), trainable = kept[0], kept[0][1].trainable
    adapter = None if experiment.train is None else _adapter(planner, first)
    runs = [run_record(run, results, planner.folder) for run, results in kept]
    for run in runs:
        run["average"] = run["average"] if set(every) <= run["tasks"].keys() else None
    averages = [run["average"] for run in runs]
    baseline = planner.study.baseline(experiment)
    compared = _against(found, baseline, experiment, every) if baseline else None
    return {
        "name": experiment.name,
        "method": adapter and adapter.method,
        "trainable": trainable and {"adapter": trainable.adapter, "total": trainable.total},
        "adapters": len(first.jobs) if adapter else 0,
        "rank": adapter and adapter.rank,
        "learning_rate": adapter and TrainConfig(**first.jobs[0].train).learning_rate,
        "group": experiment.group,
        "alone": experiment.alone,
        "trained_on": adapter and [name for job in first.jobs for name in job.data["train"].counts],
        "runs": runs,
        "summary": {
            "tasks": {
                name: summarise([run["tasks"][name]["accuracy"] for run in runs])
                for name in first_results.task_set.columns
                if all(name in run["tasks"] for run in runs)
            },
            "average": None if None in averages else summarise(averages),
        },
        "against": compared and {"baseline": baseline.name, **compared},
    }


def _adapter(planner: Planner, run: Run) -> AdapterConfig:
    """The adapter of a trained run."""
    return TrainConfig(**run.jobs[0].train).adapter_config(planner.study.tasks)


def _against(found: Found, a: Experiment, b: Experiment, every: Sequence[str]) -> dict | None:
    """B minus A, where both have finished runs."""
    if a.name not in found or b.name not in found:
        return None
    one, other = ({seed: results for seed, (_, results) in found[name].items()} for name in (a.name, b.name))
    return against(one, other, every)


def _transfer(planner: Planner, found: Found, every: Sequence[str]) -> list[dict] | None:
    """Together minus alone: in each group with an experiment of single tasks, every other trained one against it."""
    rows = []
    for alone in (experiment for experiment in planner.study.experiments if experiment.alone):
        for other in planner.study.experiments:
            if other.group != alone.group or other.alone or other.train is None:
                continue
            if compared := _against(found, alone, other, every):
                run, _ = next(iter(found[other.name].values()))
                names = {"group": alone.group, "method": _TITLES[_adapter(planner, run).method]}
                names |= {"experiment": other.name, "alone": alone.name}
                rows.append({**names, **compared})
    return rows or None


def _search(planner: Planner, searches: Sequence[dict]) -> dict | None:
    """What was tried, on which questions, and what was chosen."""
    search = planner.study.search
    if not searches:
        return None
    return {
        "flag": search.flag,
        "data_dir": search.data_dir,
        "seed": search.seed,
        "train": search.train,
        "questions": planner.data.dev.counts,
        "dev_data_sha256": planner.data.dev.sha256,
        "experiments": list(searches),
    }


def _data(planner: Planner) -> dict:
    """How many records of each task were used of how many, and the hashes of the files."""
    parts = {"train": planner.data.train(), "test": planner.data.test}
    return {
        name: {"records": part.counts, "of": part.of, "sha256": part.sha256, "source_sha256": part.source}
        for name, part in parts.items()
    }


def _made(found: Found) -> dict:
    """Commit, versions and device of the evaluations: the last one's; ``commits`` and ``devices`` are all there are."""
    paths = [results.path for kept in found.values() for _, results in kept.values()]
    values = [files.read_json(path, "the results file") for path in paths]
    several = {f"{key}s": list(dict.fromkeys(value.get(key) for value in values)) for key in ("commit", "device")}
    return {key: values[-1].get(key) for key in ("commit", "versions", "device")} | several
