"""Doing a study: its jobs side by side, what is known of each on disk, progress, and resuming after a kill."""

import contextlib
import dataclasses
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from mtl_lora import artifacts, cli
from mtl_lora.errors import UserError, files_within_reach
from mtl_lora.files import claimed, remove_leftovers
from mtl_lora.metrics import value_text
from mtl_lora.results import Results
from mtl_lora.study.config import ABOUT, ExperimentConfig, StudyConfig, read_grid
from mtl_lora.study.plan import STATE, Plan, PlannedJob, PlannedRun, State, jobs_of
from mtl_lora.study.summary import StudyWriter, collect

# Launchers that are modules of this very interpreter, whatever the path has under their names.
_MODULES = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
# What a command leaves when it is done.
_MADE = {"train": artifacts.CHECKPOINT_WEIGHTS, "evaluate": artifacts.RESULTS}


class JobFailed(Exception):
    """A command ended with an error: one line that says which, where its log is, and what it said last."""


def main(arguments: Sequence[str]) -> None:
    """``mtl-lora study``: ends with exit code 2 for a user's mistake, 1 for a job that failed."""
    config = cli.parse(StudyConfig, arguments, ABOUT)
    try:
        with files_within_reach():
            run(config)
    except JobFailed as error:
        raise SystemExit(f"error: {error}") from None  # printed to stderr, with exit code 1


def run(config: StudyConfig) -> None:
    """Check everything, then do what is not done yet; raises ``UserError`` and ``JobFailed``."""
    grid = read_grid(config.grid, config.trust_remote_code)
    program = shlex.split(grid.launcher)[0]
    if program not in _MODULES and shutil.which(program) is None:
        raise UserError(f"the launcher {grid.launcher!r} of {grid.path} cannot be started: there is no {program}")
    if config.parallel > 1 and grid.launcher != "python":
        raise UserError(f"--parallel is for jobs of one process, and {grid.path} has the launcher {grid.launcher!r}")
    folder = Path(config.output_dir or f"output/study/{grid.name}")
    if folder.is_absolute() and folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # commands then read as one types them
    plan = Plan(grid, folder, with_fingerprint=not config.check and not config.report)
    chosen = [grid.experiment(name) for name in dict.fromkeys(config.only)] or list(grid.experiments)
    runner = Runner(plan, chosen, config.overwrite or config.report)
    if config.check:
        print(*plan.describe(chosen, runner.trials), sep="\n")
        return
    with claimed(folder) as lock:
        if not config.report:
            # Commands inherit the lock: a training that outlives a killed study still holds it.
            runner.run([{"env": {**os.environ, **slot}, "pass_fds": lock} for slot in environments(config.parallel)])
        elif not runner.report():
            raise UserError(f"no run in {folder} is finished, so there is nothing to report")
    if config.collect:
        with claimed(config.collect):
            collect(folder, Path(config.collect))


class Runner:
    """The jobs of the chosen experiments: the search first, then all of them with one seed after the other. What a
    search has not yet decided does not keep the others waiting.

    overwrite: folders of another configuration count as not started; without it, making this object raises
    ``UserError`` for them, as far as searches are decided, before anything is started.
    """

    def __init__(self, plan: Plan, chosen: Sequence[ExperimentConfig], overwrite: bool):
        self.plan, self.chosen, self.overwrite, self.writer = plan, chosen, overwrite, StudyWriter(plan)
        # Of an experiment's name and its searched value: made once, for they are asked for after every job.
        self._runs_of = functools.cache(lambda name, value: plan.runs(plan.grid.experiment(name), value))
        self._known()

    def _checked(self, jobs: list[PlannedJob]) -> list[PlannedJob]:
        for job in jobs:
            check_folder(job, self.overwrite)
        return jobs

    @property
    def trials(self) -> dict[str, list[PlannedRun]]:
        """The trials of each search that the chosen experiments need, as far as they are known."""
        return {each.search: self.plan.trials(each.search)[0] for each in self.chosen if each.search}

    def _searching(self) -> list[PlannedJob]:
        return self._checked([job for runs in self.trials.values() for job in jobs_of(runs)])

    def _runs(self, experiments: Iterable[ExperimentConfig]) -> list[PlannedRun]:
        """The runs whose configuration is known: those that wait for no search."""
        found = []
        for each in experiments:
            if each.search and each.search not in self.writer.chosen:
                trials, best = self.plan.trials(each.search)
                if best is None:
                    continue
                self.writer.add_search(each.search, trials, best)
            found += self._runs_of(each.name, self.writer.chosen.get(each.search))
        return found

    def _counts(self) -> tuple[int, int]:
        """The number of jobs, trials beyond an edge as far as they are known, and of those that are finished."""
        total = sum(len(jobs_of(self._runs_of(each.name, None))) for each in self.chosen) + len(self._searching())
        return total, sum(job.is_finished for job in self._known())

    def _known(self) -> list[PlannedJob]:
        """The jobs whose configuration is known, in order."""
        runs = self._runs(self.chosen)
        runs.sort(key=lambda run: run.experiment.seeds.index(run.seed))  # stopped early, it still compares experiments
        return self._searching() + self._checked(jobs_of(runs))

    def run(self, slots: Sequence[dict]) -> None:
        """Do every job that is not done; study.json and table.md are written anew as it goes, and at the end."""
        total, finished = self._counts()
        print(f"{self.plan.grid.name}: {total} jobs, {finished} of them finished, in {self.plan.folder}", flush=True)
        began, due = time.monotonic(), 0.0
        try:
            with contextlib.closing(execute_all(self._known, slots, self.overwrite)) as working:
                for done, (job, state) in enumerate(working, start=1):
                    facts = [f"{step} {timedelta(seconds=round(seconds))}" for step, seconds in state.seconds.items()]
                    if average := (results := Results.load(job.folder / artifacts.RESULTS)).average:
                        metric = next(iter(results.tasks.values())).metric
                        facts.append(f"average {value_text(average.value, None, metric)}")
                    total, finished = self._counts()
                    if total > finished:
                        seconds = (time.monotonic() - began) / done * (total - finished)
                        facts.append(f"about {timedelta(seconds=round(seconds))} left")
                    print(f"[{finished:>{len(str(total))}}/{total}] {job.label}: {', '.join(facts)}", flush=True)
                    if (now := time.monotonic()) >= due:  # a report of many runs takes a while, and starts no job
                        self.report()
                        due = time.monotonic() + 20 * (time.monotonic() - now)
        except (JobFailed, UserError):
            self.report()
            raise
        self.report()

    def report(self) -> bool:
        """Write study.json and table.md of all finished runs, also of experiments not chosen; whether there is any."""
        runs = self._runs(self.plan.grid.experiments)
        if finished := [run for run in runs if all(job.is_finished for job in run.jobs)]:
            self.writer.write(finished)
        return bool(finished)


def check_folder(job: PlannedJob, overwrite: bool) -> None:
    """Raise ``UserError`` for a folder of another configuration unless ``overwrite``, naming what differs, and for a
    folder with anything else in any case."""
    if (job.folder / STATE).is_file():
        if overwrite or not (changes := job.changes(State.load(job.folder).configuration)):
            return
        texts = {key: f"{key} {then} -> {now}" for key, (then, now) in changes.items()}
        changed = "; ".join(text if len(text) < 100 else key for key, text in texts.items())
        again = "evaluate it again and keep its training" if job.state else "repeat it"
        way_out = f"pass --overwrite to {again}, or another --output_dir"
        raise UserError(f"{job.folder} was made by another configuration ({changed}); {way_out}")
    # The job of a task trained alone lies inside the folder of its run, which is no job's itself.
    if held := [path for path in [job.folder.parent / STATE, *job.folder.glob("[!.]*")] if path.exists()]:
        raise UserError(f"there is {min(held)}, which is not of this job; delete it, or pass another --output_dir")


# ---- doing jobs ----


def execute_all(
    known: Callable[[], Iterable[PlannedJob]], slots: Sequence[dict], overwrite: bool = False
) -> Iterator[tuple[PlannedJob, State]]:
    """Do what is left of every job; yields each when it is done.

    known: the jobs in order, asked again after each. slots: options of processes, one job at a time with each.
    overwrite: a half-done evaluation begins anew, for its answers may be of another device's dtype. The first that
    fails, which raises ``JobFailed``, ends those that run beside it; so does closing this generator.
    """
    free, working, waiting = deque(slots), {}, None
    try:
        while True:
            if waiting is None:
                waiting = deque(job for job in known() if not job.is_finished and job.folder not in working)
            while waiting and free:
                job, slot = waiting.popleft(), free.popleft()
                working[job.folder] = job, slot, execute(job, slot, overwrite)
            if not working:
                return
            for job, slot, work in list(working.values()):
                try:
                    next(work)
                except StopIteration as done:
                    del working[job.folder]
                    free.append(slot)
                    yield job, done.value
                    waiting = None
            time.sleep(0.05)
    finally:
        for _, _, work in working.values():
            work.close()


def execute(job: PlannedJob, slot: dict, overwrite: bool = False) -> Generator[None, None, State]:
    """Do what is left of a job, step by step while its commands run; raises ``JobFailed``."""
    remove_leftovers(job.folder / STATE)
    state = job.state
    if state is None:
        if (job.folder / STATE).is_file():
            # From here on nothing of the other configuration counts, also where a kill leaves some of it.
            State(State.load(job.folder).configuration).save(job.folder)
        for path in job.folder.glob("*"):
            if path.name != STATE:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        state = State(job.configuration)
    for step in job.flags:
        if step in state.seconds and (job.folder / _MADE[step]).is_file():
            continue
        for sample in job.data.values():
            sample.write()
        flags, started = {}, step in state.starts
        if step == "train" and started:
            resume = artifacts.checkpoints(job.folder)
            flags = {"resume_from_checkpoint": True} if resume else {"overwrite_output_dir": True}
        if step == "train" or overwrite or not started:
            # What an evaluation has left of other weights, or of another configuration beside a training that is kept.
            artifacts.remove_evaluation(job.folder)
        state = dataclasses.replace(state, starts={**state.starts, step: state.starts.get(step, 0) + 1})
        state.save(job.folder)
        began = time.monotonic()
        yield from _command(job, step, flags, slot)
        seconds = round(time.monotonic() - began, 3)
        state = dataclasses.replace(state, seconds={**state.seconds, step: seconds})
        state.save(job.folder)
    return state


def _command(job: PlannedJob, step: str, flags: dict, slot: dict) -> Iterator[None]:
    """Run one command of a job with its output in a log file; closing this ends it."""
    log, commands = job.folder / f"{step}.out", [job.command(step, **flags)]
    if job.facts["launcher"] != "python":
        # A launcher hides the sentence of a user's mistake behind a traceback of its own.
        commands.insert(0, job.command(step, "python", **flags, check=True))
    for command in commands:
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            code = yield from until_done(command, output, slot)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
            lines = [line.strip() for line in lines if line.strip()][-60:]
            # Launchers talk on after the error.
            (*_, last) = [line for line in lines if line.startswith("error: ")] or lines
            raise JobFailed(f"{job.label}: {step} ended with exit code {code}; {log} ends with: {last}")


def until_done(command: Sequence[str], output, slot: dict) -> Generator[None, None, int]:
    """Run a command with its output in an open file, and yield while it runs; returns its exit code. Closing this ends
    the command."""
    program, *words = command
    command = [sys.executable, *_MODULES[program], *words] if program in _MODULES else command
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **slot)
    try:
        while process.poll() is None:
            yield
        return process.returncode
    finally:
        process.terminate()
        process.wait()


def environments(parallel: int) -> list[dict[str, str]]:
    """What each of ``parallel`` commands gets in its environment: its part of the CPU threads, and a GPU of those in
    CUDA_VISIBLE_DEVICES, or of all that nvidia-smi finds. They are shared where they are fewer: a small model leaves a
    GPU mostly idle. One at a time gets the machine as it is. A thread count that the user has set stays."""
    if parallel == 1:
        return [{}]
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if "CUDA_VISIBLE_DEVICES" not in os.environ and (program := shutil.which("nvidia-smi")):
        listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True).stdout
        gpus = [str(number) for number in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // parallel))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}) for index in range(parallel)]
