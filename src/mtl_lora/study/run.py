"""What a study does, from its grid to study.json and table.md."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.report.results import mean_score, read_results
from mtl_lora.study import record as records
from mtl_lora.study import table
from mtl_lora.study.collect import collect
from mtl_lora.study.commands import Commands, locked
from mtl_lora.study.data import StudyData
from mtl_lora.study.execute import check_launcher, execute_all
from mtl_lora.study.grid import Experiment, Study
from mtl_lora.study.jobs import Job
from mtl_lora.study.plan import plan
from mtl_lora.study.planner import Planner, Run
from mtl_lora.study.progress import Progress
from mtl_lora.study.read_grid import read_grid
from mtl_lora.study.search import outcome
from mtl_lora.study.settings import StudyConfig
from mtl_lora.study.state import State, finished, read_state


def run(config: StudyConfig) -> None:
    """Check everything, then do what is not done yet; raises ``UserError`` and ``JobFailed``."""
    study = read_grid(config.grid)
    if not Path("finetune.py").is_file():
        raise UserError("start the study in the project's folder, where finetune.py lies")
    check_launcher(study.grid.launcher)
    if config.parallel > 1 and study.grid.launcher != "python":
        raise UserError(
            f"--parallel is for runs of one process, and the grid {study.path} starts each with "
            f"{study.grid.launcher!r}; take its launcher out, or --parallel"
        )
    folder = output_folder(config, study)
    planner = Planner(study, StudyData(study, folder), folder)
    chosen = [study.experiment(name) for name in config.only] or list(study.experiments)
    work = Work(planner, chosen, config.overwrite or config.report)
    if config.check:
        print(plan(planner, chosen, work.candidates))
        return
    if config.report:
        work.report()
    else:
        with locked(folder, config.parallel) as commands:
            work.run(commands)
    if config.collect:
        collect(folder, Path(config.collect))


def output_folder(config: StudyConfig, study: Study) -> Path:
    """Where the study lies, relative to the project's folder if it lies in it: commands then read as one types them."""
    folder = Path(config.output_dir or f"output/study/{study.grid.name}")
    inside = folder.is_absolute() and folder.is_relative_to(Path.cwd())
    return folder.relative_to(Path.cwd()) if inside else folder


class Work:
    """The jobs of the chosen experiments: the search first, then every seed.

    overwrite: folders of another recipe count as not started; without it, making this object raises ``UserError``
    for them, before anything is started.
    """

    def __init__(self, planner: Planner, chosen: Sequence[Experiment], overwrite: bool):
        self.planner, self.chosen, self.overwrite = planner, chosen, overwrite
        study = planner.study
        searched = dict.fromkeys(home.name for home in map(study.searched_as, chosen) if home)
        self.candidates = {name: planner.candidates(study.experiment(name)) for name in searched}
        self.found: dict[str, dict] = {}
        for name, runs in self.candidates.items():
            self._search_outcome(name, runs, overwrite)
        self._check_recipes()

    def _search_outcome(self, name: str, candidates: Sequence[Run], overwrite: bool) -> None:
        """Keep what a search has found, if all its candidates are finished."""
        if not [run for run in candidates if not done(run, overwrite)]:
            self.found[name] = outcome(self.planner, name, candidates)

    def _check_recipes(self) -> None:
        for run in self.runs(self.chosen):
            done(run, self.overwrite)

    def runs(self, experiments: Sequence[Experiment]) -> list[Run]:
        """The runs whose recipe is known: those that wait for no search."""
        study, known = self.planner.study, []
        for experiment in experiments:
            home = study.searched_as(experiment)
            if home is None or home.name in self.found:
                value = self.found[home.name]["chosen"] if home else None
                known += [self.planner.run(experiment, seed, value) for seed in study.seeds(experiment)]
        return known

    def run(self, commands: Commands) -> None:
        """Do every job that is not done; after each run study.json and table.md are written anew."""
        study = self.planner.study
        jobs: list[Job] = [job for runs in self.candidates.values() for run in runs for job in run.jobs]
        for experiment in self.chosen:
            jobs += [job for seed in study.seeds(experiment) for job in self.planner.run(experiment, seed).jobs]
        known = [job for run in self._known() for job in run.jobs]
        states = {job.folder: read_state(job, self.overwrite) for job in known}
        left = {job.folder: (job.kind, (states.get(job.folder) or State.fresh(job)).left) for job in jobs}
        progress = Progress(left, commands.at_once)
        done_before = sum(finished(job, self.overwrite) for job in known)
        print(
            f"{study.grid.name}: {progress.total} runs, {done_before} of them finished, in {self.planner.folder}",
            flush=True,
        )
        self._execute([run for runs in self.candidates.values() for run in runs], progress, commands)
        for name, candidates in self.candidates.items():
            self.found[name] = outcome(self.planner, name, candidates)
        self._check_recipes()
        self._execute(self.runs(self.chosen), progress, commands, self.report)
        self.report()

    def _known(self) -> list[Run]:
        """All runs whose recipe is known by now, those of the search among them."""
        return [*(run for runs in self.candidates.values() for run in runs), *self.runs(self.chosen)]

    def _execute(
        self,
        runs: Sequence[Run],
        progress: Progress,
        commands: Commands,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Do what is left of the runs, with a line a job; ``after_each`` is called when a run has become whole."""
        home = {job.folder: run for run in runs for job in run.jobs}
        skipped = {job.folder for run in runs for job in run.jobs if finished(job, self.overwrite)}
        left = Counter(run.folder for folder, run in home.items() if folder not in skipped)
        for job, state in execute_all([job for run in runs for job in run.jobs], commands, self.overwrite):
            _finish(progress, job, state, job.folder in skipped)
            if job.folder not in skipped:
                run = home[job.folder].folder
                left[run] -= 1
                if not left[run]:
                    after_each()

    def report(self) -> None:
        """Write study.json and table.md of all finished runs, those of experiments that are not chosen included."""
        study, folder = self.planner.study, self.planner.folder
        for home in filter(None, map(study.searched_as, study.experiments)):
            if home.name not in self.found:
                self._search_outcome(home.name, self.planner.candidates(home), True)
        kept = [run for run in self.runs(study.experiments) if done(run, True)]
        value = records.record(self.planner, kept, list(self.found.values()))
        if value is None:
            raise UserError(f"no run in {folder} is finished, so there is nothing to report")
        files.write_json(folder / records.FILE_NAME, value)
        files.write_text(folder / table.FILE_NAME, table.render(value))


def done(run: Run, overwrite: bool) -> bool:
    """Whether every job of a run is finished; raises ``UserError`` for another recipe's folder unless ``overwrite``."""
    # Every job is looked at, for a folder behind an unfinished one may be another recipe's.
    return not [job for job in run.jobs if not finished(job, overwrite)]


def _finish(progress: Progress, job: Job, state: State, skipped: bool) -> None:
    """Count a job that is done, and print its line if it was done now."""
    # Those of a command that was started more than once are of its last start alone.
    progress.finish(job.folder, {step: known["seconds"] for step, known in state.steps.items() if known["starts"] == 1})
    if not skipped:
        seconds = {step: known["seconds"] for step, known in state.steps.items()}
        average = mean_score(list(read_results(job.folder).tasks.values())).accuracy
        print(progress.line(job.label, seconds, average), flush=True)
