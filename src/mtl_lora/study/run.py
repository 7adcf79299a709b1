"""What a study does, from its grid to study.json and table.md."""

from collections.abc import Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.report.results import mean_score, read_results
from mtl_lora.study import record as records
from mtl_lora.study import table
from mtl_lora.study.collect import collect
from mtl_lora.study.data import StudyData
from mtl_lora.study.execute import execute, locked, read_state
from mtl_lora.study.grid import Experiment, Study, read_grid
from mtl_lora.study.jobs import Job, Planner, Run
from mtl_lora.study.progress import Progress
from mtl_lora.study.search import outcome
from mtl_lora.study.settings import StudyConfig


def run(config: StudyConfig) -> None:
    """Check everything, then do what is not done yet; raises ``UserError`` and ``JobFailed``."""
    study = read_grid(config.grid)
    if not Path("finetune.py").is_file():
        raise UserError("start the study in the project's folder, where finetune.py lies")
    folder = output_folder(config, study)
    planner = Planner(study, StudyData(study, folder), folder)
    chosen = [study.experiment(name) for name in config.only] or list(study.experiments)
    work = Work(planner, chosen, config.overwrite)
    if config.check:
        print(work.plan())
        return
    if config.report:
        work.report()
    else:
        with locked(folder) as lock:
            work.run(lock)
    if config.collect:
        collect(folder, Path(config.collect))


def output_folder(config: StudyConfig, study: Study) -> Path:
    """Where the study lies, relative to the working folder where that is possible without leaving it."""
    folder = Path(config.output_dir or f"output/study/{study.grid.name}")
    inside = folder.is_absolute() and folder.is_relative_to(Path.cwd())
    return folder.relative_to(Path.cwd()) if inside else folder


class Work:
    """The jobs of the chosen experiments: the search first, then every seed."""

    def __init__(self, planner: Planner, chosen: Sequence[Experiment], overwrite: bool):
        self.planner, self.chosen, self.overwrite = planner, chosen, overwrite
        study = planner.study
        searched = dict.fromkeys(
            home.name for experiment in chosen if (home := study.searched_as(experiment)) is not None
        )
        self.candidates = {name: planner.candidates(study.experiment(name)) for name in searched}
        self.found: dict[str, dict] = {}
        for name, runs in self.candidates.items():
            if all(_finished(run, overwrite) for run in runs):
                self.found[name] = outcome(planner, name, runs)
        # Recipes of other runs than the chosen ones may have changed; they only keep away from the table.
        self.check_recipes()

    def check_recipes(self) -> None:
        """Raise ``UserError`` for folders of another recipe, of all runs whose recipe is known by now."""
        for run in self.runs():
            _finished(run, self.overwrite)

    def runs(self, experiments: Sequence[Experiment] | None = None) -> list[Run]:
        """The runs whose recipe is known: those that wait for no search."""
        study, found = self.planner.study, []
        for experiment in self.chosen if experiments is None else experiments:
            home = study.searched_as(experiment)
            if home is None or home.name in self.found:
                value = self.found[home.name]["chosen"] if home else None
                found += [self.planner.run(experiment, seed, value) for seed in study.seeds(experiment)]
        return found

    def run(self, lock: int) -> None:
        """Do every job that is not done; after each run the tables are written anew."""
        progress = Progress([job.kind for job in self._all_jobs()])
        _say(f"{self.planner.study.grid.name}: {progress.total} runs, in {self.planner.folder}")
        for name, candidates in self.candidates.items():
            for run in candidates:
                self._execute(run, progress, lock)
            self.found[name] = outcome(self.planner, name, candidates)
        self.check_recipes()
        for run in self.runs():
            self._execute(run, progress, lock)
            self.report()

    def _all_jobs(self) -> list[Job]:
        study = self.planner.study
        jobs = [job for runs in self.candidates.values() for run in runs for job in run.jobs]
        for experiment in self.chosen:
            for seed in study.seeds(experiment):
                jobs += self.planner.run(experiment, seed).jobs
        return jobs

    def _execute(self, run: Run, progress: Progress, lock: int) -> None:
        for job in run.jobs:
            state = read_state(job, self.overwrite)
            skipped = state is not None and state.finished
            state = execute(job, lock, self.overwrite)
            seconds = state.seconds
            steps = [step for step in (state.train, state.evaluate) if step]
            whole = all(step["starts"] == 1 for step in steps)
            progress.finish(job.kind, sum(step["seconds"] for step in steps), whole)
            if not skipped:
                average = mean_score(list(read_results(job.folder).tasks.values())).accuracy
                _say(progress.line(job.label, seconds, average))

    def report(self) -> None:
        """Write study.json and table.md of all finished runs, those of other experiments included."""
        study = self.planner.study
        for experiment in study.experiments:
            home = study.searched_as(experiment)
            if home is not None and home.name not in self.found:
                runs = self.candidates.get(home.name) or self.planner.candidates(home)
                if all(_finished(run, True) for run in runs):
                    self.found[home.name] = outcome(self.planner, home.name, runs)
        finished = [run for run in self.runs(study.experiments) if _finished(run, True)]
        value = records.record(self.planner, finished, list(self.found.values()))
        if value is None:
            raise UserError(f"no run in {self.planner.folder} is finished, so there is nothing to report")
        files.write_json(self.planner.folder / records.FILE_NAME, value)
        files.write_text(self.planner.folder / table.FILE_NAME, table.render(value))

    def plan(self) -> str:
        """What would be done, a line an experiment."""
        study = self.planner.study
        lines = [f"{study.grid.name}: {study.grid.about}"]
        for experiment in self.chosen:
            seeds = study.seeds(experiment)
            jobs = [job for seed in seeds for job in self.planner.run(experiment, seed).jobs]
            lines.append(f"  {experiment.name}: {len(jobs)} runs, seeds {', '.join(map(str, seeds))}")
            lines += [f"    {command}" for command in jobs[0].commands]
        for name, candidates in self.candidates.items():
            jobs = [job for run in candidates for job in run.jobs]
            lines.append(f"  search for {name}: {len(jobs)} runs")
        lines.append(f"every recipe is fine; {len(self._all_jobs())} runs")
        return "\n".join(lines)


def _finished(run: Run, overwrite: bool) -> bool:
    """Whether every job of a run is done; raises ``UserError`` for another recipe unless ``overwrite``."""
    states = [read_state(job, overwrite) for job in run.jobs]
    return all(state is not None and state.finished for state in states)


def _say(text: str) -> None:
    print(text, flush=True)
