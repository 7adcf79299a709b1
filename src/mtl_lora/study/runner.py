"""Run a study: its jobs in parallel, the state of each on disk, progress, and resuming after a kill."""

import contextlib
import functools
import itertools
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
from mtl_lora.errors import UserError
from mtl_lora.files import claimed, remove_leftovers
from mtl_lora.metrics import value_text
from mtl_lora.results import Results
from mtl_lora.study.config import ExperimentConfig, StudyConfig, read_grid
from mtl_lora.study.plan import STATE, Plan, PlannedJob, PlannedRun, State, jobs_of
from mtl_lora.study.summary import StudyWriter, collect

# Launchers that are run as modules of this interpreter, whatever programs of these names are on the PATH.
_MODULES = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
_MADE = {"train": artifacts.CHECKPOINT_WEIGHTS, "evaluate": artifacts.RESULTS}  # what a finished command leaves


class JobFailed(Exception):
    """A command ended with an error: one line with the command, the place of its log, and the log's last message."""


def main(arguments: Sequence[str]) -> None:
    """Run ``mtl-lora study``: exit code 2 for a user error, 1 for a job that failed."""
    config = cli.parse(StudyConfig, arguments, StudyConfig.__doc__)
    try:
        run(config)
    except JobFailed as error:
        raise SystemExit(f"error: {error}") from None  # printed to stderr, with exit code 1


def run(config: StudyConfig) -> None:
    """Check everything, then run the jobs that are not finished. Raises ``UserError`` and ``JobFailed``."""
    grid = read_grid(config.grid, config.trust_remote_code)
    program = shlex.split(grid.launcher)[0]
    if program not in _MODULES and shutil.which(program) is None:
        raise UserError(f"the launcher {grid.launcher!r} of {grid.path} cannot be started: there is no {program}")
    if config.parallel > 1 and grid.launcher != "python":
        raise UserError(f"--parallel needs the launcher python, but {grid.path} has {grid.launcher!r}; leave it out")
    folder = Path(config.output_dir or f"output/study/{grid.name}")
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())  # so that commands read as a user would type them
    plan = Plan(grid, folder, with_fingerprint=not config.check and not config.report)
    chosen = [grid.experiment(name) for name in dict.fromkeys(config.only)] or list(grid.experiments)
    runner = Runner(plan, chosen, config.overwrite or config.report)
    if config.check:
        print(*plan.describe(chosen, runner.trials), sep="\n")
        return
    with claimed(folder) as lock:
        if not config.report:
            # Commands inherit the lock, so a training that outlives a killed study still holds it.
            runner.run([{"env": {**os.environ, **slot}, "pass_fds": lock} for slot in environments(config.parallel)])
        elif not runner.report():
            raise UserError(f"no run in {folder} is finished, so there is nothing to report")
    if config.collect:
        with claimed(config.collect):
            collect(folder, Path(config.collect))


class Runner:
    """Runs the jobs of the chosen experiments: the searches first, then all experiments, one seed after the other.

    Experiments that need no search, or whose search is finished, do not wait for the others. overwrite: treat folders
    of another configuration as not started; otherwise the constructor raises ``UserError`` for those that are known.
    """

    def __init__(self, plan: Plan, chosen: Sequence[ExperimentConfig], overwrite: bool):
        self.plan, self.chosen, self.overwrite, self.writer = plan, chosen, overwrite, StudyWriter(plan)
        # By an experiment's name and its searched value; cached, since it is called after every job.
        self._runs_of = functools.cache(lambda name, value: plan.runs(plan.grid.experiment(name), value))
        self._known()

    @property
    def trials(self) -> dict[str, list[PlannedRun]]:
        """The trials of each search that the chosen experiments need, as far as they are known yet."""
        return {each.search: self.plan.trials(each.search)[0] for each in self.chosen if each.search}

    def _runs(self, experiments: Iterable[ExperimentConfig]) -> list[PlannedRun]:
        """Return the runs whose configuration is known, which are those that do not wait for a search."""
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
        """Return the number of all jobs, including the search trials known so far, and of the finished ones."""
        runs = [self._runs_of(each.name, None) for each in self.chosen]
        total = len(jobs_of(itertools.chain(*self.trials.values(), *runs)))
        return total, sum(job.is_finished for job in self._known())

    def _known(self) -> list[PlannedJob]:
        """Return the jobs whose configuration is known, in the order in which to run them; checks their folders."""
        runs = self._runs(self.chosen)
        # Seed by seed, so that a study that is stopped early still compares all experiments.
        runs.sort(key=lambda run: run.experiment.run_seeds.index(run.seed))
        jobs = jobs_of(itertools.chain(*self.trials.values(), runs))
        for job in jobs:
            check_folder(job, self.overwrite)
        return jobs

    def run(self, slots: Sequence[dict]) -> None:
        """Run every job that is not finished; rewrite study.json and table.md along the way and at the end."""
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
                    if (now := time.monotonic()) >= due:  # a long report delays the next job
                        self.report()
                        due = time.monotonic() + 20 * (time.monotonic() - now)
        except (JobFailed, UserError):
            self.report()
            raise
        self.report()

    def report(self) -> bool:
        """Write study.json and table.md of all finished runs, also of experiments that were not chosen, and return
        whether there are any."""
        runs = self._runs(self.plan.grid.experiments)
        if finished := [run for run in runs if all(job.is_finished for job in run.jobs)]:
            self.writer.write(finished)
        return bool(finished)


def check_folder(job: PlannedJob, overwrite: bool) -> None:
    """Raise ``UserError`` if a job's folder was made with another configuration, naming the differences, unless
    ``overwrite``; and always if it holds anything else."""
    if (job.folder / STATE).is_file():
        if overwrite or not (changes := job.changes(State.load(job.folder).configuration)):
            return
        texts = {key: f"{key} {then} -> {now}" for key, (then, now) in changes.items()}
        changed = "; ".join(text if len(text) < 100 else key for key, text in texts.items())
        again = "evaluate it again and keep its training" if job.state else "repeat it"
        way_out = f"pass --overwrite to {again}, or another --output_dir"
        raise UserError(f"{job.folder} was made with another configuration ({changed}); {way_out}")
    # The job of a task trained alone lies in a folder inside its run's folder, which must not belong to a job itself.
    if held := [path for path in [job.folder.parent / STATE, *job.folder.glob("[!.]*")] if path.exists()]:
        raise UserError(f"{min(held)} does not belong to this job; delete it, or pass another --output_dir")


def execute_all(
    known: Callable[[], Iterable[PlannedJob]], slots: Sequence[dict], overwrite: bool = False
) -> Iterator[tuple[PlannedJob, State]]:
    """Run the remaining commands of every job; yield each job and its state when it is finished.

    known: returns the jobs in order; called again after each finished job. slots: keyword arguments of ``Popen``, each
    used by one job at a time. overwrite: restart a half-done evaluation, whose answers may be in another device's
    dtype. The first job that fails raises ``JobFailed``; this, or closing the generator, ends the jobs beside it.
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
    """Run the remaining commands of a job, yielding while they run; return its state. Raises ``JobFailed``."""
    remove_leftovers(job.folder / STATE)
    state = job.state
    if state is None:
        if (job.folder / STATE).is_file():
            # From here on nothing made with the other configuration counts, even if a kill leaves some of its files.
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
            saved = [one for one in artifacts.checkpoints(job.folder) if (one / artifacts.CHECKPOINT_WEIGHTS).is_file()]
            flags = {"resume_from_checkpoint" if saved else "overwrite_output_dir": True}
        if step == "train" or overwrite or not started:
            # Remove the remains of an evaluation of other weights, or of another configuration if the training is kept.
            artifacts.remove_evaluation(job.folder)
        state.starts[step] = state.starts.get(step, 0) + 1
        state.save(job.folder)
        began = time.monotonic()
        yield from _command(job, step, flags, slot)
        state.seconds[step] = round(time.monotonic() - began, 3)
        state.save(job.folder)
    return state


def _command(job: PlannedJob, step: str, flags: dict, slot: dict) -> Iterator[None]:
    """Run one command of a job with its output in a log file; closing this generator ends the command."""
    log, commands = job.folder / f"{step}.out", [job.command(step, **flags)]
    if job.grid.launcher != "python":
        # A launcher hides the message of a user error behind a traceback of its own, so check in one process first.
        commands.insert(0, job.command(step, "python", **flags, check=True))
    for command in commands:
        with log.open("ab") as output:
            offset = output.tell()
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            code = yield from until_done(command, output, slot)
        if code:
            text = log.read_bytes()[offset:].decode(errors="replace")
            lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()][-60:]
            # Launchers print more after the error.
            (*_, last) = [line for line in lines if line.startswith("error: ")] or lines
            raise JobFailed(f"{job.label}: {step} ended with exit code {code}; {log} ends with: {last}")


def until_done(command: Sequence[str], output, slot: dict) -> Generator[None, None, int]:
    """Run a command with its output in an open file, yielding while it runs; return its exit code. Closing this
    generator ends the command."""
    program, *words = command
    if program in _MODULES:  # PYTHONSAFEPATH: whose modules are not taken from the current folder
        command = [sys.executable, *_MODULES[program], *words]
        slot = {**slot, "env": {**slot.get("env", os.environ), "PYTHONSAFEPATH": "1"}}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **slot)
    try:
        while process.poll() is None:
            yield
        return process.returncode
    finally:
        process.terminate()
        process.wait()


def environments(parallel: int) -> list[dict[str, str]]:
    """Return the environment variables for each of ``parallel`` commands: its part of the CPU threads, and one GPU.
    The GPUs are those in CUDA_VISIBLE_DEVICES, else all that nvidia-smi finds; fewer than commands are shared, since a
    small model leaves a GPU mostly idle. A single command gets the whole machine. The user's own threads are kept."""
    if parallel == 1:
        return [{}]
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if "CUDA_VISIBLE_DEVICES" not in os.environ and (program := shutil.which("nvidia-smi")):
        listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True).stdout
        gpus = [str(number) for number in range(len(re.findall("^GPU ", listed, re.MULTILINE)))]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus // parallel))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}) for index in range(parallel)]
