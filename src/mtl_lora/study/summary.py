"""What a study found: study.json and table.md of its finished runs, and the folder of them that can be shared."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError
from mtl_lora.language.config import TrainConfig
from mtl_lora.report import load as report
from mtl_lora.report.compare import check_comparable, check_same_questions
from mtl_lora.report.statistics import CONFIDENCE, bootstrap_means, percentile_interval, t_interval
from mtl_lora.report.table import MAJORITY_LABEL, MARKDOWN, NOTHING, markdown_table, percent, trainable_text
from mtl_lora.results import Results, TaskNames, average_of
from mtl_lora.study.config import ExperimentConfig
from mtl_lora.study.plan import SAMPLE_SEED, Plan, PlannedJob, PlannedRun

TABLE = "table.md"
RESAMPLES, SEED = 10_000, 0
_LEVEL = f"{100 * CONFIDENCE:.0f} %"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run: as planned, as study.json holds it, and its results."""

    planned: PlannedRun
    record: report.Run
    results: Results


class StudyWriter:
    """Writes study.json and table.md as runs finish; what a finished run holds is read and compared once.

    chosen: by experiment, the value that a finished search gave its flag.
    """

    def __init__(self, plan: Plan):
        self.plan, self.grid = plan, plan.grid
        self.chosen: dict[str, float] = {}
        self._searches: list[report.SearchOutcome] = []
        self._finished: dict[Path, Finished] = {}
        self._pairs: dict[tuple[Path, Path], dict[str, list[int]]] = {}
        self._differences: dict[tuple, dict | None] = {}

    def add_search(self, name: str, trials: Sequence[PlannedRun]) -> None:
        """Keep every trial's development score, the mean over tasks; the best value is chosen, of equals the smallest."""
        candidates = []
        for trial in trials:
            tasks = {task: found for job in trial.jobs for task, found in Results.load(job.folder).tasks.items()}
            values = {task: result.value for task, result in tasks.items()}
            commands = [command for job in trial.jobs for command in job.commands]
            candidates.append(report.Candidate(trial.value, average_of(tasks.values()).value, values, commands))
        self.chosen[name] = min(candidates, key=lambda candidate: (-candidate.dev, candidate.value)).value
        self._searches.append(report.SearchOutcome(name, candidates, self.chosen[name]))

    def write(self, runs: Iterable[tuple[PlannedRun, Sequence]]) -> None:
        """Both files, of at least one finished run, each with the states of its jobs."""
        found: dict[str, dict[int | None, Finished]] = {}
        for run, states in runs:
            if run.folder not in self._finished:
                self._finished[run.folder] = self._finish(run, states)
            found.setdefault(run.experiment.name, {})[run.seed] = self._finished[run.folder]
        study = self._study(found)
        study.save(self.plan.folder / artifacts.STUDY)
        files.write_text(self.plan.folder / TABLE, render(study))

    def _finish(self, run: PlannedRun, states: Sequence) -> Finished:
        """Read a finished run. One of tasks trained alone has parts by task, and sums of theirs."""
        results = combine(run) if run.experiment.alone else Results.load(run.folder)
        jobs = {job.folder.name: self._job(job, state) for job, state in zip(run.jobs, states, strict=True)}
        fields = vars(next(iter(jobs.values())))
        if run.experiment.alone:
            fields = {
                "commands": [command for job in jobs.values() for command in job.commands],
                "seconds": {step: sum(job.seconds[step] for job in jobs.values()) for step in ("train", "evaluate")},
                "starts": {step: max(job.starts[step] for job in jobs.values()) for step in ("train", "evaluate")},
                "steps": sum(job.steps or 0 for job in jobs.values()),
                "parts": jobs,
            }
        own = {
            "seed": run.seed,
            "folder": self._relative(run.folder),
            "results": self._relative(results.path),
            "commit": results.commit,
            "test_data_sha256": {name: results.data.get(name) for name in results.scored},
            "tasks": {name: results.tasks[name] for name in results.scored},
            "average": results.average.value if {*self.grid.scored_tasks} <= {*results.tasks} else None,
        }
        return Finished(run, report.Run(**{**fields, **own}), results)

    def _job(self, job: PlannedJob, state) -> report.Job:
        """Files, commands, seconds, hashes and optimiser steps of one training and its evaluation."""
        results, log = Results.load(job.folder), job.folder / artifacts.TRAIN_LOG
        analysis, adapter = job.folder / artifacts.ADAPTER_ANALYSIS, results.adapter or {}
        steps = {step: state.steps.get(step) for step in ("train", "evaluate")}
        return report.Job(
            folder=self._relative(job.folder),
            results=self._relative(results.path),
            analysis=self._relative(analysis) if analysis.is_file() else None,
            log=self._relative(log) if log.is_file() else None,
            commands=job.commands,
            seconds={step: known and known.seconds for step, known in steps.items()},
            starts={step: known and known.starts for step, known in steps.items()},
            train_commit=adapter.get("origin", {}).get("commit"),
            train_data_sha256=job.data["train"].used.sha256["train"] if job.train else None,
            adapter_sha256=results.settings.get("adapter_sha256"),
            steps=_last_step(log) if log.is_file() else None,
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.plan.folder).as_posix()

    def _study(self, found: dict[str, dict[int | None, Finished]]) -> report.Study:
        grid, samples = self.grid, self.plan.samples
        jobs = [job.folder for runs in found.values() for run in runs.values() for job in run.planned.jobs]
        evaluations = [Results.load(folder) for folder in jobs]
        study = report.Study(
            name=grid.name,
            about=grid.about,
            base_model=grid.base_model,
            task_set=TaskNames.from_json(grid.tasks.to_json(), str(grid.path)),
            grid=files.read_json(grid.path, "the grid"),
            grid_sha256=files.sha256(grid.path),
            commit=evaluations[-1].commit,
            versions=evaluations[-1].versions,
            device=evaluations[-1].device,
            commits=list(dict.fromkeys(results.commit for results in evaluations)),
            devices=list(dict.fromkeys(results.device for results in evaluations)),
            data={"train": samples.train().used, "test": samples.test.used},
            experiments=[self._experiment(each, found) for each in grid.experiments if each.name in found],
            transfer=self._transfer(found),
            search=report.Search(
                flag=grid.search.flag,
                data_dir=grid.search.data_dir,
                seed=grid.search.seed,
                train=grid.search.train,
                questions=samples.dev.used.records,
                dev_data_sha256=samples.dev.used.sha256,
                experiments=self._searches,
            )
            if self._searches
            else None,
        )
        planned = {each.name: len(grid.seeds_of(each)) for each in grid.experiments}
        return dataclasses.replace(study, notes=[*grid.notes, *notes(study, planned, grid.evaluate.get("mode"))])

    def _experiment(self, experiment: ExperimentConfig, found: dict) -> report.Experiment:
        runs = list(found[experiment.name].values())
        first, records = runs[0], [run.record for run in runs]
        config = TrainConfig(**first.planned.jobs[0].train) if experiment.train is not None else None
        adapter = config and config.adapter_config(self.grid.tasks)
        baseline = self.grid.baseline_of(experiment)
        differences = self._against(found, baseline.name, experiment.name) if baseline else None
        tasks = [name for name in first.results.scored if all(name in record.tasks for record in records)]
        averages = [record.average for record in records]
        return report.Experiment(
            name=experiment.name,
            method=adapter and adapter.method,
            group=experiment.group,
            alone=experiment.alone,
            trainable=first.results.trainable,
            adapters=len(first.planned.jobs) if adapter else 0,
            rank=adapter and adapter.rank,
            learning_rate=config and config.learning_rate,
            trained_on=adapter and [name for job in first.planned.jobs for name in job.data["train"].used.records],
            runs=records,
            summary=report.Summary(
                {name: estimate([record.tasks[name].value for record in records]) for name in tasks},
                None if None in averages else estimate(averages),
            ),
            against=differences and report.Differences(baseline=baseline.name, **differences),
        )

    def _transfer(self, found: dict) -> list[report.Transfer]:
        """Together minus alone: in each group with an experiment of single tasks, every other trained one against it."""
        rows = []
        for alone in self.grid.experiments:
            for other in self.grid.experiments if alone.alone else []:
                if other.group == alone.group and not other.alone and other.train is not None:
                    if differences := self._against(found, alone.name, other.name):
                        title = next(iter(found[other.name].values())).results.method_title
                        names = {"group": alone.group, "method": title, "experiment": other.name, "alone": alone.name}
                        rows.append(report.Transfer(**names, **differences))
        return rows

    def _against(self, found: dict, a: str, b: str) -> dict | None:
        """B minus A over the seeds that both have, see ``paired_intervals``; None without a common seed or task."""
        pairs = seed_pairs(*({seed: run.results for seed, run in found.get(name, {}).items()} for name in (a, b)))
        key = tuple((one.path, other.path) for one, other in pairs)
        if key not in self._differences:
            for one, other in pairs:
                if (one.path, other.path) not in self._pairs:
                    self._pairs[one.path, other.path] = question_differences(one, other)
            compared = [self._pairs[pair] for pair in key]
            shared = [name for name in compared[0] if all(name in pair for pair in compared)] if compared else []
            means = {
                name: [math.fsum(values) / len(pairs) for values in zip(*(pair[name] for pair in compared), strict=True)]
                for name in shared
            }
            self._differences[key] = paired_intervals(means, self.grid.scored_tasks) if means else None
        return self._differences[key]


def _last_step(log: Path) -> int | None:
    """The optimiser steps of a training log; None for one without a whole last line."""
    try:
        return int(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def combine(run: PlannedRun) -> Results:
    """The results of tasks trained alone as those of one run, written with their predictions into its folder."""
    parts = [Results.load(job.folder) for job in run.jobs]
    joined = {
        key: "; ".join(dict.fromkeys(filter(None, (getattr(part, key) for part in parts)))) or None
        for key in ("command", "device", "commit")
    }
    results = dataclasses.replace(
        parts[0],
        tasks={task: result for part in parts for task, result in part.tasks.items()},
        data={task: digest for part in parts for task, digest in part.data.items()},
        average=None,  # computed from the tasks
        # The run has an adapter a task, so no single one is its own.
        adapter=None,
        settings={**parts[0].settings, "adapter_sha256": None},
        path=run.folder / artifacts.RESULTS,
        **joined,
    )
    for part in parts:
        for task in part.tasks:
            text = report.predictions_path(part, task).read_text(encoding="utf-8")
            files.write_text(report.predictions_path(results, task), text)
    results.save(results.path)
    return results


# ---- statistics ----


def estimate(values: Sequence[float]) -> report.Estimate:
    """Mean over seeds; standard deviation (n - 1) and t interval of the mean, None for a single value."""
    return report.Estimate(*t_interval(values))


def seed_pairs(a: dict[int | None, Results], b: dict[int | None, Results]) -> list[tuple[Results, Results]]:
    """Seed i of A with seed i of B; a run without a seed (the base model alone) goes with every run of the other."""
    if None in a or None in b:
        return [(one, other) for one in a.values() for other in b.values()]
    return [(a[seed], b[seed]) for seed in a if seed in b]


def question_differences(a: Results, b: Results) -> dict[str, list[int]]:
    """By task that both have, for each question: correct in B minus correct in A.

    Raises ``UserError`` where they did not answer the same questions by one protocol.
    """
    shared = [name for name in a.tasks if name in b.tasks]
    a, b = (dataclasses.replace(run, tasks={name: run.tasks[name] for name in shared}) for run in (a, b))
    check_comparable(a, b)
    answers_a, answers_b = report.read_predictions(a), report.read_predictions(b)
    for name in shared:
        check_same_questions(a, b, name, answers_a[name], answers_b[name])
    return {
        name: [answers_b[name][index].correct - answer.correct for index, answer in sorted(answers_a[name].items())]
        for name in shared
    }


def paired_intervals(differences: dict[str, list[float]], scored: Sequence[str]) -> dict:
    """``tasks`` and ``average`` of differences by task and question, each with its percentile interval.

    A bootstrap over the questions within each task (see ``mtl_lora.report.statistics``); the average, over the tasks
    ``scored``, is None if one of them is missing.
    """
    # The stream that report compare draws from, so that one pair of runs has one interval.
    means = {name: bootstrap_means(values, [SEED, *name.encode()], RESAMPLES) for name, values in differences.items()}
    tasks = {
        name: report.Difference(math.fsum(values) / len(values), *percentile_interval(means[name]))
        for name, values in differences.items()
    }
    average = None
    if all(name in tasks for name in scored):
        center = math.fsum(tasks[name].difference for name in scored) / len(scored)
        interval = percentile_interval(sum(means[name] for name in scored) / len(scored))
        average = report.Difference(center, *interval)
    return {"tasks": tasks, "average": average}


# ---- what stands below and in the tables ----


def notes(study: report.Study, planned: dict[str, int], mode: str | None) -> list[str]:
    """What every study's tables need: what was trained on and asked, what ± and the intervals are, what is missing.

    planned: seeds by experiment.
    """
    train, test = (_counted(study.data[name], word) for name, word in (("train", "examples"), ("test", "questions")))
    found = [
        f"Base model: {study.base_model}. Mode: {mode or 'generate'}.",
        f"Trained on {train}; steps: {_steps(study)}.",
        f"Test questions: {test}.",
    ]
    seeds = sorted({run.seed for run in study.runs} - {None})
    found.append(
        "Accuracy in percent, one seed; ± is one standard error over the questions."
        if one_seed(study)
        else f"Accuracy in percent, mean ± standard deviation over seeds ({', '.join(map(str, seeds))}); a row without "
        f"± is a single run. Interval: {_LEVEL} Student t interval of the mean over seeds, on the same questions."
    )
    if study.transfer or any(experiment.against for experiment in study.experiments):
        found.append(
            f"Differences: question by question, averaged over the seeds that both have (seed i against seed i, the "
            f"base model against every seed); {_LEVEL} percentile intervals of {RESAMPLES:,} resamples of the "
            f"questions within each task, seed {SEED}. They say how far other questions could move a difference, not "
            "other seeds."
        )
    finished = {experiment.name: len(experiment.runs) for experiment in study.experiments}
    missing = [f"{name} {finished.get(name, 0)} of {n}" for name, n in planned.items() if finished.get(name, 0) < n]
    earlier = sorted({job.train_commit for job in study.jobs} - {*study.commits, None})
    lists = {
        "Not all runs are finished": missing,
        "Runs were evaluated at different commits": study.commits if len(study.commits) > 1 else [],
        "Trainings of earlier commits were kept": earlier,
        "Runs were evaluated on different devices": study.devices if len(study.devices) > 1 else [],
    }
    return found + [f"{text}: {', '.join(map(str, entries))}." for text, entries in lists.items() if entries]


def one_seed(study: report.Study) -> bool:
    """Whether no experiment has more than one seed."""
    return all(len(experiment.runs) == 1 for experiment in study.experiments)


def _counted(sample: report.Sample, word: str) -> str:
    """``a fixed sample (seed 0) of 800 examples of each task (cr of 3,013, ...)``, or all and the number of them."""
    kept, of = sample.records, sample.of
    if kept == of:
        return f"all {sum(kept.values()):,} {word} ({', '.join(f'{name} {n:,}' for name, n in kept.items())})"
    numbers, start = {*kept.values()}, f"a fixed sample (seed {SAMPLE_SEED}) of"
    if len(numbers) == 1:
        sources = ", ".join(f"{name} of {n:,}" for name, n in of.items())
        return f"{start} {numbers.pop():,} {word} of each task ({sources})"
    return f"{start} {sum(kept.values()):,} {word} ({', '.join(f'{name} {n:,} of {of[name]:,}' for name, n in kept.items())})"


def _steps(study: report.Study) -> str:
    """``200``, or by experiment where they differ; those of tasks trained alone are added up."""
    steps = {}
    for experiment in study.experiments:
        if experiment.method:
            known, count = experiment.runs[0].steps, experiment.adapters
            total = "unknown" if known is None else f"{known:,}"
            steps[experiment.name] = f"{total} in {count} trainings" if count > 1 else total
    if len(set(steps.values())) <= 1:
        return next(iter(steps.values()), "none")
    return ", ".join(f"{name} {count}" for name, count in steps.items())


def render(study: report.Study) -> str:
    """The text of table.md: methods by task over seeds, each against its baseline, transfer, and the search."""
    text, tasks = MARKDOWN.text, study.scored
    titles = [*(study.task_set.title(task) for task in tasks), "Average"]
    parts = [f"# {text(study.name)}", text(study.about)]
    for group in study.groups:
        kept = [experiment for experiment in study.experiments if experiment.group == group]
        parts += [f"## {text(group)}"] if len(study.groups) > 1 else []
        parts.append(_accuracies(study, kept, titles))
        compared = [(f"{each.name} - {each.against.baseline}", each.against) for each in kept if each.against]
        if compared:
            rows = [[text(name), *_differences(differences, tasks)] for name, differences in compared]
            parts.append(markdown_table(["Difference", *map(text, titles)], rows))
    if study.transfer:
        rows = [
            [text(f"{row.experiment} - {row.alone}"), text(row.group), *_differences(row, tasks)] for row in study.transfer
        ]
        parts += ["## Transfer: trained together minus each task trained alone"]
        parts.append(markdown_table(["Together - alone", "Group", *map(text, titles)], rows))
    if study.search:
        rows = [
            [
                text(outcome.name),
                *(
                    f"**{percent(each.dev)}**" if each.value == outcome.chosen else percent(each.dev)
                    for each in outcome.candidates
                ),
            ]
            for outcome in study.search.experiments
        ]
        values = [f"{candidate.value:g}" for candidate in study.search.experiments[0].candidates]
        parts += [f"## Search of {text(study.search.flag)} on the development set"]
        parts.append(markdown_table(["Development average", *values], rows))
    return "\n\n".join([*parts, "\n".join(f"- {text(note)}" for note in study.notes)]) + "\n"


def _accuracies(study: report.Study, experiments: Sequence[report.Experiment], titles: Sequence[str]) -> str:
    """A row an experiment: mean ± standard deviation over seeds, or ± standard error where there is one seed."""
    single, tasks = one_seed(study), study.scored
    header = ["Method", "Trainable parameters, M (%)", "Rank", "Learning rate", *titles]
    own = experiments[0].runs[0].tasks
    majority = [own[task].majority if task in own else None for task in tasks]
    majority.append(None if None in majority else sum(majority) / len(majority))
    rows = [[MAJORITY_LABEL, *[NOTHING] * 3, *(NOTHING if value is None else percent(value) for value in majority)]]
    for experiment in experiments:
        trainable = NOTHING if experiment.trainable is None else trainable_text(experiment.trainable)
        trainable = f"{experiment.adapters} x {trainable}" if experiment.adapters > 1 else trainable
        settings = [NOTHING if value is None else f"{value:g}" for value in (experiment.rank, experiment.learning_rate)]
        rows.append([MARKDOWN.text(experiment.name), trainable, *settings])
        for task in [*tasks, None]:
            value = experiment.estimate(task)
            spread = value and (value.sd if not single else value.low and value.mean - value.low)
            rows[-1].append(NOTHING if value is None else MARKDOWN.cell(value.mean, spread))
    if not single:
        header.append(f"{_LEVEL} interval")
        rows[0].append(NOTHING)
        for row, experiment in zip(rows[1:], experiments, strict=True):
            row.append(_interval(experiment.summary.average))
    return markdown_table([MARKDOWN.text(heading) for heading in header], rows)


def _differences(found: report.Differences | report.Transfer, tasks: Sequence[str]) -> list[str]:
    return [
        NOTHING if value is None else f"{percent(value.difference, signed=True)} ({_interval(value, signed=True)})"
        for value in (*(found.tasks.get(task) for task in tasks), found.average)
    ]


def _interval(value: report.Estimate | report.Difference | None, signed: bool = False) -> str:
    if value is None or value.low is None:
        return NOTHING
    return f"{percent(value.low, signed)} to {percent(value.high, signed)}"


# ---- what can be shared ----


def collect(folder: Path, target: Path) -> None:
    """Write study.json and table.md of the study in ``folder`` to ``target``, without a path of this machine.

    Raises ``UserError`` if ``target`` is the study's own folder or holds another study.
    """
    study = report.Study.load(folder)
    if target.resolve() == folder.resolve():
        raise UserError(f"--collect {target} is the study's own folder; name another one")
    if (target / artifacts.STUDY).is_file() and (other := report.Study.load(target).name) != study.name:
        raise UserError(f"--collect {target} holds the study {other!r}; name another folder")
    shown = {path: Path(path).name for path in _absolute_paths(study.grid)}
    shown |= {str(Path.cwd()): ".", str(folder.absolute()): f"output/study/{study.name}"}
    value = without_paths(study.to_json(), shown)
    for experiment in value["experiments"]:
        for run in experiment["runs"]:
            for job in (run, *run["parts"].values()):
                job |= dict.fromkeys(("results", "log", "analysis"))
    files.write_json(target / artifacts.STUDY, value)
    files.write_text(target / TABLE, render(report.Study.load(target)))


def _absolute_paths(value: object) -> set[str]:
    """The values anywhere in a grid that are absolute paths."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return set().union(*map(_absolute_paths, entries))
    return {value} if isinstance(value, str) and Path(value).is_absolute() else set()


def without_paths(value: object, shown: dict[str, str]) -> object:
    """JSON with every path of ``shown`` as it is shown, the longest first, wherever it is a path or begins one."""
    if isinstance(value, dict):
        return {without_paths(key, shown): without_paths(entry, shown) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry, shown) for entry in value]
    if isinstance(value, str):
        for path in sorted(shown, key=len, reverse=True):
            if path != Path(path).anchor:  # in / every path is one of the working directory
                value = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-]|\.\w)", lambda _: shown[path], value)
    return value
