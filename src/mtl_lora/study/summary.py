"""What a study found: study.json and table.md of its finished runs, and the folder of them that can be shared."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig
from mtl_lora.report import study_model as model
from mtl_lora.report.compare import paired_answers, percentile_interval, task_means
from mtl_lora.report.figures import draw
from mtl_lora.report.load import predictions_path
from mtl_lora.report.study_model import CONFIDENCE, Difference, Estimate, Experiment, Run, Study
from mtl_lora.report.table import markdown_text, study_tables
from mtl_lora.results import Results, TaskNames, average_of
from mtl_lora.study.config import ExperimentConfig
from mtl_lora.study.plan import SAMPLE_SEED, Plan, PlannedJob, PlannedRun

TABLE = "table.md"
RESAMPLES, SEED = 10_000, 0
_REST = {"groups": {}, "others": {}, "measured": {}}
_LEVEL = f"{100 * CONFIDENCE:.0f} %"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run: as planned, as study.json holds it, its results, and those of each of its jobs."""

    planned: PlannedRun
    run: Run
    results: Results
    evaluations: list[Results]


class StudyWriter:
    """Writes study.json and table.md as runs finish; what a finished run holds is read and compared once.

    chosen: by experiment, the value that a finished search gave its flag.
    """

    def __init__(self, plan: Plan):
        self.plan, self.grid = plan, plan.grid
        self.chosen: dict[str, float] = {}
        self._searches: list[model.SearchOutcome] = []
        self._finished: dict[Path, Finished] = {}
        self._differences = functools.cache(question_differences)
        self._intervals = functools.cache(
            lambda pairs: intervals([self._differences(*p) for p in pairs], plan.grid.scored)
        )

    def add_search(self, name: str, trials: Sequence[PlannedRun]) -> None:
        """Keep the trials' development scores, means over tasks; the best value is chosen, of equals the smallest."""
        found = []
        for trial in trials:
            tasks = {name: result for job in trial.jobs for name, result in Results.load(job.folder).tasks.items()}
            values = {name: result.value for name, result in tasks.items()}
            commands = [command for job in trial.jobs for command in job.commands]
            found.append(model.Candidate(trial.value, average_of(tasks.values()).value, values, commands))
        self.chosen[name] = min(found, key=lambda candidate: (-candidate.dev, candidate.value)).value
        self._searches.append(model.SearchOutcome(name, found, self.chosen[name]))

    def write(self, runs: Sequence[tuple[PlannedRun, Sequence]]) -> None:
        """Both files of finished runs, at least one, each with the states of its jobs."""
        by_experiment: dict[str, dict[int | None, Finished]] = {}
        for planned, states in runs:
            if planned.folder not in self._finished:
                self._finished[planned.folder] = self._finish(planned, states)
            by_experiment.setdefault(planned.experiment.name, {})[planned.seed] = self._finished[planned.folder]
        study = self._study(by_experiment)
        study.save(self.plan.folder / artifacts.STUDY)
        files.write_text(self.plan.folder / TABLE, render(study))

    def _finish(self, planned: PlannedRun, states: Sequence) -> Finished:
        """Read a finished run; one of tasks trained alone has a part for each, and sums of theirs."""
        evaluations = [Results.load(job.folder) for job in planned.jobs]
        results = combine(evaluations, planned.folder) if planned.experiment.alone else evaluations[0]
        jobs = [self._job(*entry) for entry in zip(planned.jobs, states, evaluations, strict=True)]
        facts = dict(vars(jobs[0]))
        if planned.experiment.alone:
            steps = [job.steps for job in jobs]
            facts = {
                "commands": [command for job in jobs for command in job.commands],
                "seconds": {step: sum(job.seconds[step] for job in jobs) for step in jobs[0].seconds},
                "starts": {step: max(job.starts[step] for job in jobs) for step in jobs[0].starts},
                "steps": None if None in steps else sum(steps),
                "parts": {job.folder.name: part for job, part in zip(planned.jobs, jobs, strict=True)},
            }
        facts |= {"folder": self._relative(planned.folder), "results": self._relative(results.path)}
        run = Run(
            **facts,
            seed=planned.seed,
            commit=results.commit,
            # Parts of a task's questions and other measures stay in the run's own file.
            tasks={name: dataclasses.replace(results.tasks[name], **_REST) for name in results.scored},
            average=results.average.value if {*self.grid.scored} <= {*results.tasks} and results.average else None,
        )
        return Finished(planned, run, results, evaluations)

    def _job(self, job: PlannedJob, state, results: Results) -> model.Job:
        """What one training and its evaluation left."""
        log, analysis = (job.folder / name for name in (artifacts.TRAIN_LOG, artifacts.ADAPTER_ANALYSIS))
        adapter = results.adapter or {}
        return model.Job(
            folder=self._relative(job.folder),
            results=self._relative(results.path),
            analysis=self._relative(analysis) if analysis.is_file() else None,
            log=self._relative(log) if log.is_file() else None,
            commands=job.commands,
            seconds={step: state.seconds.get(step) for step in ("train", "evaluate")},
            starts={step: state.starts.get(step) for step in ("train", "evaluate")},
            steps=_last_step(log),
            # In checkpoints of format 1 the provenance has another name.
            train_commit=(adapter.get("provenance") or adapter.get("origin") or {}).get("commit"),
            train_data_sha256=job.data["train"].used.sha256["train"] if job.train else None,
            adapter_sha256=results.settings.get("adapter_sha256"),
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.plan.folder).as_posix()

    def _study(self, found: dict[str, dict[int | None, Finished]]) -> Study:
        grid, data, search = self.grid, self.plan.data, self.grid.search
        evaluations = [each for runs in found.values() for run in runs.values() for each in run.evaluations]
        study = Study(
            name=grid.name,
            about=grid.about,
            base_model=grid.train["base_model"],
            task_set=TaskNames.from_json(grid.tasks.to_json(), str(grid.path)),
            grid=files.read_json(grid.path, "the grid"),
            grid_sha256=files.sha256(grid.path),
            **{key: getattr(evaluations[-1], key) for key in ("commit", "versions", "device")},
            commits=list(dict.fromkeys(results.commit for results in evaluations)),
            devices=list(dict.fromkeys(results.device for results in evaluations)),
            data={"train": data.train().used, "test": data.test.used},
            experiments=[self._experiment(each, found) for each in grid.experiments if each.name in found],
            transfer=self._transfer(found),
        )
        if self._searches:
            fields = {key: getattr(search, key) for key in ("flag", "data_dir", "seed", "train")}
            fields |= {"questions": data.dev.used.records, "dev_data_sha256": data.dev.used.sha256}
            study = dataclasses.replace(study, search=model.Search(**fields, experiments=self._searches))
        planned = {each.name: len(each.seeds) for each in grid.experiments}
        return dataclasses.replace(study, notes=[*grid.notes, *notes(study, planned, grid.evaluate.get("mode"))])

    def _experiment(self, experiment: ExperimentConfig, found: dict) -> Experiment:
        first, *_ = finished = list(found[experiment.name].values())
        runs, facts, jobs = [each.run for each in finished], {}, first.planned.jobs
        if experiment.train is not None:
            config = TrainConfig(**jobs[0].train)
            adapter = config.adapter_config(self.grid.tasks)
            facts = {"method": adapter.method, "rank": adapter.rank, "learning_rate": config.learning_rate}
            facts["trained_on"] = [name for job in jobs for name in job.data["train"].used.records]
            facts |= {"adapters": len(jobs), "trainable": first.results.trainable}
        compared = self._against(found, experiment.baseline, experiment.name) if experiment.baseline else None
        shared = [name for name in runs[0].tasks if all(name in run.tasks for run in runs)]
        tasks = {name: Estimate.over_seeds([run.tasks[name].value for run in runs]) for name in shared}
        averages = [run.average for run in runs]
        return Experiment(
            **{key: getattr(experiment, key) for key in ("name", "group", "alone")},
            **facts,
            runs=runs,
            summary=model.Summary(tasks, None if None in averages else Estimate.over_seeds(averages)),
            against=compared and model.Differences(baseline=experiment.baseline, **compared),
        )

    def _transfer(self, found: dict) -> list[model.Transfer]:
        """Together minus alone: every trained experiment of a group against the one of single tasks."""
        trained = [each for each in self.grid.experiments if each.name in found and each.train is not None]
        rows = []
        for alone, other in ((one, other) for one in trained if one.alone for other in trained if not other.alone):
            if other.group == alone.group and (compared := self._against(found, alone.name, other.name)):
                title = next(iter(found[other.name].values())).results.method_title or ""
                names = {"group": alone.group, "method": title, "experiment": other.name, "alone": alone.name}
                rows.append(model.Transfer(**names, **compared))
        return rows

    def _against(self, found: dict, a: str, b: str) -> dict | None:
        """B minus A over the seeds that both have, see ``intervals``; None without a common seed or task."""
        paths = ({seed: run.results.path for seed, run in found.get(name, {}).items()} for name in (a, b))
        return self._intervals(tuple(seed_pairs(*paths)))


def _last_step(log: Path) -> int | None:
    """The optimiser steps of a training log; None without one, or without a whole last line."""
    try:
        return int(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def combine(parts: Sequence[Results], folder: Path) -> Results:
    """The results of tasks trained alone as those of one run, written with their predictions into its folder."""
    texts = {key: dict.fromkeys(getattr(part, key) for part in parts) for key in ("command", "device", "commit")}
    results = dataclasses.replace(
        parts[0],
        **{key: "; ".join(filter(None, values)) or None for key, values in texts.items()},
        tasks={name: result for part in parts for name, result in part.tasks.items()},
        data={name: digest for part in parts for name, digest in part.data.items()},
        # The run has an adapter a task, so no single one is its own.
        adapter=None,
        settings={**parts[0].settings, "adapter_sha256": None},
        path=folder / artifacts.RESULTS,
    )
    for part in parts:
        for name in part.tasks:
            text = predictions_path(part, name).read_text(encoding="utf-8")
            files.write_text(predictions_path(results, name), text)
    results.save(results.path)
    return results


def seed_pairs(a: dict[int | None, Path], b: dict[int | None, Path]) -> list[tuple[Path, Path]]:
    """Seed i of A with seed i of B; a run without a seed (the base model alone) goes with every run of the other."""
    if None in a or None in b:
        return [(one, other) for one in a.values() for other in b.values()]
    return [(a[seed], b[seed]) for seed in a if seed in b]


def question_differences(a: Path, b: Path) -> dict[str, list[int]]:
    """By task that both results files have, for each question: correct in B minus correct in A.

    Raises ``UserError`` where they are not comparable, see ``paired_answers``.
    """
    one, other = Results.load(a), Results.load(b)
    answers = paired_answers(one, other, [name for name in one.tasks if name in other.tasks])
    return {name: [last.correct - first.correct for first, last in pairs] for name, pairs in answers.items()}


def intervals(pairs: Sequence[dict[str, list[int]]], scored: Sequence[str]) -> dict | None:
    """Differences averaged over ``pairs`` of runs (see ``question_differences``), with their percentile intervals.

    A bootstrap over the questions within each task. Returns ``tasks`` and ``average``, which is None unless all of
    ``scored`` are there; None if no task is in all pairs.
    """
    tasks, means = {}, {}
    for name in [name for name in (pairs[0] if pairs else ()) if all(name in pair for pair in pairs)]:
        values = [math.fsum(each) / len(pairs) for each in zip(*(pair[name] for pair in pairs), strict=True)]
        means[name] = task_means(name, values, SEED, RESAMPLES)
        tasks[name] = Difference(math.fsum(values) / len(values), *percentile_interval(means[name]))
    if not {*scored} <= {*tasks}:
        return {"tasks": tasks, "average": None} if tasks else None
    center = math.fsum(tasks[name].difference for name in scored) / len(scored)
    interval = percentile_interval(sum(means[name] for name in scored) / len(scored))
    return {"tasks": tasks, "average": Difference(center, *interval)}


# ---- table.md ----


def notes(study: Study, planned: dict[str, int], mode: str | None) -> list[str]:
    """What was trained on and asked, what ± and the intervals are, and what is missing. planned: runs by experiment."""
    seeds = sorted({run.seed for run in study.runs} - {None})
    found = [
        f"Base model: {study.base_model}. Mode: {mode or 'generate'}.",
        f"Trained on {_counted(study.data['train'], 'examples')}; steps: {_steps(study)}.",
        f"Test questions: {_counted(study.data['test'], 'questions')}.",
        "Accuracy in percent, one seed; ± is one standard error over the questions."
        if not study.has_seeds
        else f"Accuracy in percent, mean ± standard deviation over seeds ({', '.join(map(str, seeds))}); a row without "
        f"± is a single run. Interval: {_LEVEL} Student t interval of the mean over seeds, on the same questions.",
    ]
    if study.transfer or any(experiment.against for experiment in study.experiments):
        found.append(
            "Differences: question by question, averaged over the seeds that both have (seed i against seed i, the "
            f"base model against every seed); {_LEVEL} percentile intervals of {RESAMPLES:,} resamples of the "
            f"questions within each task, seed {SEED}. They say how far other questions could move a difference, not "
            "other seeds."
        )
    searched = [
        (each.name, each.chosen, [c.value for c in each.candidates])
        for each in getattr(study.search, "experiments", [])
    ]
    done = {experiment.name: len(experiment.runs) for experiment in study.experiments}
    lists = {
        "Not all runs are finished": [
            f"{name} {done.get(name, 0)} of {count}" for name, count in planned.items() if done.get(name, 0) < count
        ],
        "The search chose the smallest or the largest value that it tried, so others may be better, for": [
            name for name, chosen, values in searched if chosen in (min(values), max(values))
        ],
        "Runs were evaluated at different commits": study.commits if len(study.commits) > 1 else [],
        "Trainings of earlier commits were kept": sorted(
            {run.train_commit for run in study.runs} - {*study.commits, None}
        ),
        "Runs were evaluated on different devices": study.devices if len(study.devices) > 1 else [],
    }
    return found + [f"{text}: {', '.join(map(str, entries))}." for text, entries in lists.items() if entries]


def _counted(sample: model.Sample, word: str) -> str:
    """``384 examples, a fixed sample (seed 0): cr 64 of 3,013, ...``, or all of them."""
    kept, of = sample.records, sample.of
    start = (
        f"all {sum(kept.values()):,} {word}"
        if kept == of
        else f"{sum(kept.values()):,} {word}, a fixed sample (seed {SAMPLE_SEED})"
    )
    each = (f"{name} {n:,}" if n == of[name] else f"{name} {n:,} of {of[name]:,}" for name, n in kept.items())
    return f"{start}: {', '.join(each)}"


def _steps(study: Study) -> str:
    """``200``, or by experiment where they differ; those of tasks trained alone are added up."""
    steps = {}
    for experiment in (each for each in study.experiments if each.method):
        total = "unknown" if (known := experiment.runs[0].steps) is None else f"{known:,}"
        steps[experiment.name] = f"{total} in {count} trainings" if (count := experiment.adapters) > 1 else total
    if len({*steps.values()}) > 1:
        return ", ".join(f"{name} {count}" for name, count in steps.items())
    return next(iter(steps.values()), "none")


def render(study: Study) -> str:
    """The text of table.md: the tables of a study, and its notes as a list."""
    parts = [f"# {markdown_text(study.name)}", markdown_text(study.about)]
    for table in study_tables(study):
        parts += [f"## {markdown_text(table.title)}", table.markdown()]
    return "\n\n".join([*parts, "\n".join(f"- {markdown_text(note)}" for note in study.notes)]) + "\n"


# ---- what can be shared ----


def collect(folder: Path, target: Path) -> None:
    """Write study.json, table.md and figures of the study in ``folder`` to ``target``, without this machine's paths.

    Raises ``UserError`` if ``target`` is the study's own folder or holds another study.
    """
    study = Study.load(folder)
    if target.resolve() == folder.resolve():
        raise UserError(f"--collect {target} is the study's own folder; name another one")
    if (target / artifacts.STUDY).is_file() and (other := Study.load(target).name) != study.name:
        raise UserError(f"--collect {target} holds the study {other!r}; name another folder")
    shown = {path: Path(path).name for path in _absolute_paths(study.grid)}
    shown |= {str(Path.cwd()): ".", str(folder.absolute()): f"output/study/{study.name}"}
    value = without_paths(study.to_json(), shown)
    for run in [run for experiment in value["experiments"] for run in experiment["runs"]]:
        for job in (run, *run["parts"].values()):
            job |= dict.fromkeys(("results", "log", "analysis"))
    files.write_json(target / artifacts.STUDY, value)
    files.write_text(target / TABLE, render(Study.load(target)))
    try:
        drawings = draw(study)
    except UserError as error:
        print(f"no figures: {error}")
        return
    for kind in ("accuracy", "transfer", "training_loss"):
        for drawing in [drawing for drawing in drawings if drawing.name.startswith(kind)][:1]:
            files.write_all({target / f"{drawing.name}.png": drawing.render("png")})


def _absolute_paths(value: object) -> set[str]:
    """The values anywhere in a grid that are absolute paths."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return set().union(*map(_absolute_paths, entries))
    return {value} if isinstance(value, str) and Path(value).is_absolute() else set()


def without_paths(value: object, shown: dict[str, str]) -> object:
    """JSON with every path of ``shown`` as it is shown, the longest first, where it is a path or begins one."""
    if isinstance(value, dict):
        return {key: without_paths(entry, shown) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry, shown) for entry in value]
    if isinstance(value, str):
        for path in sorted(shown, key=len, reverse=True):
            if path != Path(path).anchor:  # every path begins with /
                value = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-]|\.\w)", shown[path].replace("\\", r"\\"), value)
    return value
