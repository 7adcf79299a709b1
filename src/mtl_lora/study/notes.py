"""The notes below a study's tables: what was trained on and asked, what ± and the intervals are."""

from mtl_lora.report.paired import CONFIDENCE
from mtl_lora.study.data import SAMPLE_SEED
from mtl_lora.study.grid import Study
from mtl_lora.study.paired_seeds import RESAMPLES, SEED
from mtl_lora.study.run_record import records_of_runs

_LEVEL = f"{100 * CONFIDENCE:.0f} %"


def notes(study: Study, value: dict) -> list[str]:
    """The grid's own notes, then those that every study's tables need. value: the record without its notes."""
    data = value["data"]
    found = [*study.grid.notes]
    found.append(f"Base model: {value['base_model']}. Mode: {study.grid.evaluate.get('mode', 'generate')}.")
    found.append(f"Trained on {_records(data['train'], 'records', 'all records')}; steps: {_steps(value)}.")
    found.append(f"Test questions: {_records(data['test'], 'questions', 'the whole test sets')}.")
    found += _spread(value)
    if any(experiment["against"] for experiment in value["experiments"]) or value["transfer"]:
        found.append(
            f"Differences: question by question, averaged over the seeds that both have (seed i against seed i, the "
            f"base model against every seed); {_LEVEL} percentile intervals of {RESAMPLES:,} resamples of the "
            f"questions within each task, seed {SEED}. They say how far other questions could move a difference, not "
            "other seeds."
        )
    found += _unfinished(study, value)
    if len(value["commits"]) > 1:
        found.append(f"Runs were evaluated at different commits: {', '.join(map(str, value['commits']))}.")
    trained = {run["train_commit"] for run in records_of_runs(value)} - {*value["commits"], None}
    if trained:
        found.append(f"Trainings of earlier commits were kept: {', '.join(sorted(trained))}.")
    if len(value["devices"]) > 1:
        found.append(f"Runs were evaluated on different devices: {', '.join(map(str, value['devices']))}.")
    return found


def _records(part: dict, word: str, whole: str) -> str:
    """``a fixed sample (seed 0) of 800 records of each task (cr of 3,013, ...)``, or the whole and how much that is."""
    kept, of = part["records"], part["of"]
    if kept == of:
        counts = ", ".join(f"{name} {count:,}" for name, count in kept.items())
        return f"{whole}, {sum(kept.values()):,} ({counts})"
    there = ", ".join(f"{name} {count:,} of {of[name]:,}" for name, count in kept.items())
    if len(set(kept.values())) == 1:
        each = next(iter(kept.values()))
        there = ", ".join(f"{name} of {count:,}" for name, count in of.items())
        return f"a fixed sample (seed {SAMPLE_SEED}) of {each:,} {word} of each task ({there})"
    return f"a fixed sample (seed {SAMPLE_SEED}) of {sum(kept.values()):,} {word} ({there})"


def _steps(value: dict) -> str:
    """``200``, or by experiment where they differ; those of tasks trained alone are added up."""
    steps = {}
    for experiment in value["experiments"]:
        if experiment["method"]:
            total = experiment["runs"][0]["steps"]
            count = experiment["adapters"]
            steps[experiment["name"]] = f"{total:,} in {count} trainings" if count > 1 else f"{total:,}"
    if len(set(steps.values())) <= 1:
        return next(iter(steps.values()), "none")
    return ", ".join(f"{name} {count}" for name, count in steps.items())


def single_runs(value: dict) -> bool:
    """Whether no experiment has more than one seed."""
    return all(len(experiment["runs"]) == 1 for experiment in value["experiments"])


def _spread(value: dict) -> list[str]:
    if single_runs(value):
        return ["Accuracy in percent, one seed; ± is one standard error over the questions."]
    seeds = sorted({run["seed"] for experiment in value["experiments"] for run in experiment["runs"]} - {None})
    return [
        f"Accuracy in percent, mean ± standard deviation over seeds ({', '.join(map(str, seeds))}); a row without ± is "
        f"a single run. Interval: {_LEVEL} Student t interval of the mean over seeds, on the same questions."
    ]


def _unfinished(study: Study, value: dict) -> list[str]:
    done = {experiment["name"]: len(experiment["runs"]) for experiment in value["experiments"]}
    missing = [
        f"{experiment.name} {done.get(experiment.name, 0)} of {len(study.seeds(experiment))}"
        for experiment in study.experiments
        if done.get(experiment.name, 0) < len(study.seeds(experiment))
    ]
    return [f"Not all runs are finished: {', '.join(missing)}."] if missing else []
