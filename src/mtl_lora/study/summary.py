"""Results of a study: study.json and table.md of its finished runs, and a folder with them that can be shared."""

import dataclasses
import functools
import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.errors import UserError
from mtl_lora.estimates import LEVEL, RESAMPLES, SEED, Estimate
from mtl_lora.metrics import one_unit, units_text
from mtl_lora.predictions import differences, paired_answers
from mtl_lora.report import load as model
from mtl_lora.report.figures import write_figures
from mtl_lora.report.table import DELTA_M, OVER_QUESTIONS, OVER_SEEDS, study_report
from mtl_lora.results import Results, TaskNames, Trainable
from mtl_lora.study.config import ExperimentConfig, Grid
from mtl_lora.study.plan import Plan, PlannedJob, PlannedRun
from mtl_lora.tasks import grouped
from mtl_lora.text_table import markdown_text
from mtl_lora.train_log import last_step

Runs = dict[str, list[PlannedRun]]  # the finished runs, by experiment
Paths = tuple[Path, ...]  # the results files of a run
_STEPS = ("train", "evaluate")


class StudyWriter:
    """Writes study.json and table.md as runs finish.

    chosen: by experiment, the value that its search chose. refused: by difference, why there is none, for the notes.
    """

    def __init__(self, plan: Plan):
        self.plan, self.grid = plan, plan.grid
        self.chosen: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self._searches: list[model.SearchOutcome] = []
        self._compared = functools.cache(compared)  # of finished runs, which do not change

    def add_search(self, name: str, trials: Sequence[PlannedRun], best: float) -> None:
        """Add a finished search: its trials' development scores (means over tasks) and the best value."""
        found = []
        for each in sorted(trials, key=lambda each: each.value):
            values = {task: result.value for task, result in each.tasks.items()}
            found.append(model.Candidate(each.value, each.mean, values, each.commands))
        self.chosen[name] = best
        self._searches.append(model.SearchOutcome(name, found, best))

    def write(self, runs: Sequence[PlannedRun]) -> None:
        """Write both files for the finished runs, of which there must be at least one."""
        grid, plan, search = self.grid, self.plan, None
        self.refused.clear()
        found = grouped(runs, lambda run: run.experiment.name)
        if self._searches:
            facts = {key: getattr(grid.search, key) for key in ("flag", "data_dir", "seed", "train")}
            facts |= {"questions": plan.dev.records, "dev_data_sha256": plan.dev.sha256}
            search = model.Search(**facts, experiments=self._searches)
        evaluations = [each for run in runs for each in run.evaluations]
        TaskNames.require_one_measure((each.path, each.tasks) for each in evaluations)
        study = model.Study(
            name=grid.name,
            about=grid.about,
            base_model=grid.train["base_model"],
            task_set=TaskNames.from_json(grid.tasks.to_json(), str(grid.path)),
            grid=grid.content,
            grid_sha256=grid.sha256,
            **{key: getattr(evaluations[-1], key) for key in ("commit", "versions", "device")},
            commits=list(dict.fromkeys(results.commit for results in evaluations)),
            devices=list(dict.fromkeys(results.device for results in evaluations)),
            data={"train": plan.training(), "test": plan.test},
            experiments=[self._experiment(each, found) for each in grid.experiments if each.name in found],
            transfer=self._transfer(found),
            search=search,
        )
        modes = " or ".join(dict.fromkeys(each.mode for each in evaluations if each.mode))
        study = dataclasses.replace(study, notes=[*grid.notes, *notes(study, grid, modes, self.refused)])
        files.write_json(plan.folder / artifacts.STUDY, study.to_json())
        files.write_text(plan.folder / artifacts.STUDY_TABLE, render(study))

    def _run(self, planned: PlannedRun) -> model.Run:
        """Return the record of a finished run; with tasks trained alone it has a part per task, and their sums."""
        jobs = [self._job(*entry) for entry in zip(planned.jobs, planned.evaluations, strict=True)]
        facts = dict(vars(jobs[0]))
        if planned.experiment.alone:
            facts = {"commands": planned.commands, "parts": {Path(job.folder).name: job for job in jobs}}
            facts["seconds"] = {step: sum(job.seconds[step] for job in jobs) for step in _STEPS}
            facts["starts"] = {step: max(job.starts[step] for job in jobs) for step in _STEPS}
            steps = [job.steps for job in jobs]
            facts["steps"] = None if None in steps else sum(steps)
        together = dataclasses.replace(planned.evaluations[0], tasks=planned.tasks)
        scored = [name for name in self.grid.tasks.columns if name in planned.tasks]
        # Groups of questions and further metrics stay in the run's own results file.
        rest = {name: {"untrained": True} if planned.tasks[name].untrained else {} for name in scored}
        facts |= {
            "folder": self._relative(planned.folder),
            "seed": planned.seed,
            "commit": "; ".join(dict.fromkeys(each.commit for each in planned.evaluations if each.commit)) or None,
            "tasks": {n: dataclasses.replace(planned.tasks[n], groups={}, others={}, measured=rest[n]) for n in scored},
            "average": together.average.value if {*self.grid.scored} <= {*planned.tasks} and together.average else None,
        }
        return model.Run(**facts)

    def _job(self, job: PlannedJob, results: Results) -> model.Job:
        """Return the record of one training and its evaluation."""
        paths = {"log": job.folder / artifacts.TRAIN_LOG, "analysis": job.folder / artifacts.ADAPTER_ANALYSIS}
        paths = {key: path for key, path in paths.items() if path.is_file()} | {"results": results.path}
        adapter, state = results.adapter or {}, job.state
        return model.Job(
            **{key: self._relative(path) for key, path in paths.items()},
            folder=self._relative(job.folder),
            commands=job.commands,
            seconds={step: state.seconds.get(step) for step in _STEPS},
            starts={step: state.starts.get(step) for step in _STEPS},
            steps=last_step(paths["log"]) if "log" in paths else None,
            train_commit=(adapter.get("provenance") or {}).get("commit"),
            train_data_sha256=job.data["train"].sha256["train"] if "train" in job.data else None,
            adapter_sha256=results.settings.get("adapter_sha256"),
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.plan.folder).as_posix()

    def _experiment(self, experiment: ExperimentConfig, found: Runs) -> model.Experiment:
        first, runs = found[experiment.name][0], list(map(self._run, found[experiment.name]))
        facts = {key: getattr(experiment, key) for key in ("name", "group", "alone")}
        if experiment.train is not None:
            config = self.grid.flags_of("train")(**first.jobs[0].flags["train"])
            adapter = config.adapter_config(self.grid.tasks)
            facts |= {"method": adapter.method, "learning_rate": config.learning_rate, "adapters": len(first.jobs)}
            facts |= {"rank": adapter.rank if adapter.target_modules else None}
            facts |= {"trainable": Trainable.mean([each.trainable for each in first.evaluations])}
            facts |= {"trained_on": [name for job in first.jobs for name in job.data["train"].records]}
        compared = self._against(found, experiment.baseline, experiment.name) if experiment.baseline else None
        against = compared and model.Differences(baseline=experiment.baseline, **compared)
        values = {name: [run.tasks[name].value for run in runs] for name in runs[0].tasks}
        summary = model.Summary.over_seeds(values, [run.average for run in runs])
        return model.Experiment(**facts, runs=runs, summary=summary, against=against)

    def _transfer(self, found: Runs) -> list[model.Transfer]:
        """Return together minus alone: each trained experiment of a group against the group's single-task trainings."""
        trained = [each for each in self.grid.experiments if each.name in found and each.train is not None]
        rows = []
        for alone, other in itertools.permutations(trained, 2):
            same_group = alone.alone and not other.alone and other.group == alone.group
            if same_group and (compared := self._against(found, alone.name, other.name)):
                title = found[other.name][0].evaluations[0].method_title or ""
                names = {"group": alone.group, "method": title, "experiment": other.name, "alone": alone.name}
                rows.append(model.Transfer(**names, **compared))
        return rows

    def _against(self, found: Runs, a: str, b: str) -> dict | None:
        """Return the differences B minus A over the seeds that both have, see ``predictions.differences``; None if
        they have no seed or no task in common, or are not comparable."""
        # Pair seed i with seed i, and a run without a seed (the base model) with every run of the other experiment.
        sides = found.get(a, []), found.get(b, [])
        pairs = [pair for pair in itertools.product(*sides) if len({run.seed for run in pair} - {None}) < 2]
        paths = (tuple(tuple(job.folder / artifacts.RESULTS for job in run.jobs) for run in pair) for pair in pairs)
        try:
            found = self._compared(tuple(paths), tuple(self.grid.scored))
        except UserError as error:
            self.refused[f"{b} - {a}"] = str(error)
            return None
        if not found and all(sides):
            self.refused[f"{b} - {a}"] = "no seed or no task in common"
        found = found and found | {"delta_m": delta_m_over(pairs, self.grid.scored)}
        if not found or len(pairs) < 2:
            return found
        values = {name: [b.tasks[name].value - a.tasks[name].value for a, b in pairs] for name in found["tasks"]}
        of_seeds = zip(*(values[name] for name in self.grid.scored), strict=True) if found["average"] else [[None]]
        averages = [None if None in of_seed else statistics.fmean(of_seed) for of_seed in of_seeds]
        return found | {"over_seeds": model.Summary.over_seeds(values, averages)}


def delta_m_over(pairs: Sequence[tuple[PlannedRun, PlannedRun]], scored: Sequence[str]) -> Estimate | None:
    """Return Delta_m of B against A over ``pairs`` (A, B) of runs; None if the ``scored`` tasks have one unit, or if
    ``gain_over`` is None for a pair."""
    if one_unit(result.metric for run in pairs[0] for name, result in run.tasks.items() if name in scored):
        return None
    gains = [model.gain_over(a.tasks, b.tasks, scored) for a, b in pairs]
    return None if None in gains else Estimate.over_seeds(gains)


def compared(pairs: tuple[tuple[Paths, Paths], ...], scored: tuple[str, ...]) -> dict | None:
    """Return B minus A on the same questions, as the mean over ``pairs`` of a run of A and a run of B, for the tasks of
    all runs and on average, see ``differences``; raises ``UserError`` if the runs are not comparable."""
    measured: dict[str, tuple[str, list]] = {}
    for a, b in pairs:
        of_a, of_b = ({name: each for each in map(Results.load, paths) for name in each.tasks} for paths in (a, b))
        for name in [name for name in of_a if name in of_b]:
            paired = paired_answers(of_a[name], of_b[name], [name])[name]
            measured.setdefault(name, (paired.metric, []))[1].append(paired.rows)
    everywhere = {name: found for name, found in measured.items() if len(found[1]) == len(pairs)}
    return differences(everywhere, scored, SEED, RESAMPLES)


def notes(study: model.Study, grid: Grid, mode: str, refused: Mapping[str, str]) -> list[str]:
    """Return the notes of the table: the data, the meaning of ± and of the intervals, and what is missing. mode: how
    the questions were answered. refused: by difference, why it is not computed."""
    spread = "one seed; ± is one standard error over the questions"
    if study.has_seeds:
        spread = "mean ± standard deviation over seeds; a row without ± is a single run. "
        spread += f"Interval: {LEVEL} Student t interval of the mean over seeds, on the same questions"
    units = units_text({study.metric(task) for task in study.scored})
    has_differences = study.transfer or any(experiment.against for experiment in study.experiments)
    texts = {
        f"Base model: {study.base_model}.{f' Mode: {mode}.' * bool(mode)} {units}{spread}.": True,
        "Differences: question by question, seed i against seed i (the base model against every seed); "
        f"{LEVEL} percentile intervals of {RESAMPLES:,} resamples of the questions within each task, seed {SEED}. They "
        "say how far other questions could move a difference, not other seeds; none where all are equal. None is "
        "widened for the number of comparisons.": has_differences,
        f"{OVER_SEEDS}: the mean of the averages' differences, seed i against seed i, with its {LEVEL} Student t "
        "interval: how far other seeds could move it, on the same questions. "
        f"{OVER_QUESTIONS}: as of the tasks.": study.compared_over_seeds,
        f"{DELTA_M}: by how much the first is better than the second, on average over the tasks, relative to each "
        f"(arXiv 1904.08918); the mean over seeds with its {LEVEL} Student t interval, none where a task lacks a "
        "value or the second has one that is not above 0.": has_differences and not study.has_average,
    }
    done = {each.name: len(each.runs) for each in study.experiments}
    planned = [(each.name, done.get(each.name, 0), len(each.run_seeds)) for each in grid.experiments]
    seeds = {each.name: len(each.runs) for each in study.experiments if each.trained_on}
    asked = {"train": {name for each in study.experiments for name in each.trained_on or ()}, "test": {*study.scored}}
    searches = study.search.experiments if study.search else ()
    at_edge = [each.name for each in searches if each.chosen in (each.candidates[0].value, each.candidates[-1].value)]
    averages = {each.name: [round(tried.dev, 12) for tried in each.candidates] for each in searches}
    tied = [name for name, found in averages.items() if found.count(max(found)) > 1]
    earlier = {job.train_commit for run in study.runs for job in run.jobs} - {*study.commits, None}
    counts = {
        part: [f"{name} {n:,} of {sample.of[name]:,}" for name, n in sample.records.items() if name in asked[part]]
        for part, sample in study.data.items()
    }
    lists = {
        "Training examples": counts["train"],
        "Test questions": counts["test"],
        "Not compared": [f"{difference} ({reason})" for difference, reason in refused.items()],
        "Seeds (a difference is over those that both have)": [f"{name} {n}" for name, n in seeds.items()]
        * (len({*seeds.values()}) > 1),
        "Not all runs are finished": [f"{name} {n} of {whole}" for name, n, whole in planned if n < whole],
        "The search chose the smallest or the largest value that it tried, so others may be better, for": at_edge,
        "The search found several values equally good and took the smallest of them, for": tied,
        "Runs were evaluated at different commits": study.commits if len(study.commits) > 1 else [],
        "Trainings of earlier commits were kept": sorted(earlier),
        "Runs were evaluated on different devices": study.devices if len(study.devices) > 1 else [],
    }
    found = [text for text, holds in texts.items() if holds]
    return found + [f"{text}: {', '.join(map(str, entries))}." for text, entries in lists.items() if entries]


def render(study: model.Study) -> str:
    """Return the text of table.md: the tables of a study, and its notes as a list."""
    return f"# {markdown_text(study.name)}\n\n{markdown_text(study.about)}\n\n{study_report(study).markdown()}"


def collect(folder: Path, target: Path) -> None:
    """Write study.json, table.md and figures of the study in ``folder`` to ``target``, without this machine's paths;
    raises ``UserError`` if ``target`` is that folder, or holds another study or more runs of this one."""
    study = model.Study.load(folder)
    if target.resolve() == folder.resolve():
        raise UserError(f"--collect {target} is the study's own folder; name another one")
    other = model.Study.load(target) if (target / artifacts.STUDY).is_file() else study
    if other.name != study.name or len(other.runs) > len(study.runs):
        raise UserError(f"--collect {target} holds {len(other.runs)} runs of {other.name!r}; name another folder")
    value = study.to_json()
    runs = (run for experiment in value["experiments"] for run in experiment["runs"])
    for job in itertools.chain.from_iterable((run, *run["parts"].values()) for run in runs):
        job |= dict.fromkeys(("results", "log", "analysis"))
    shown = {path: Path(path).name for path in re.findall(r'"(/[^"]*)"', json.dumps(study.grid, ensure_ascii=False))}
    shown |= {str(Path.cwd()): ".", str(folder.absolute()): f"output/study/{study.name}"}
    files.write_json(target / artifacts.STUDY, json.loads(without_paths(json.dumps(value, ensure_ascii=False), shown)))
    files.write_text(target / artifacts.STUDY_TABLE, render(model.Study.load(target)))
    try:
        write_figures([str(folder)], str(target), ["png"], analyses=False)
    except (UserError, ModuleNotFoundError) as error:
        print(f"no figures: {error}")


def without_paths(text: str, shown: dict[str, str]) -> str:
    """Return the text with every path in ``shown``, longer ones first, replaced by its value, wherever it is a path or
    begins one."""
    for path in sorted(shown, key=len, reverse=True):
        if path != Path(path).anchor:  # every path begins with /
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-]|\.\w)", lambda _, path=path: shown[path], text)
    return text
