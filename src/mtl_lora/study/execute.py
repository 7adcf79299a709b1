"""Running what is left of a job: its commands one after another, each with a log file."""

import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.language.output import delete_evaluation
from mtl_lora.study import data
from mtl_lora.study.commands import MODULES, Commands
from mtl_lora.study.jobs import Job
from mtl_lora.study.state import State, finished, read_state

_LOGS = {"train": "train.out", "evaluate": "evaluate.out"}
_WORDS = {"train": "training", "evaluate": "evaluation"}
_WEIGHTS_NAME = "mtl_lora.safetensors"


class JobFailed(Exception):
    """A command ended with an error: one line that says which, where its log is, and what it said last."""


def execute(job: Job, commands: Commands, overwrite: bool = False) -> State:
    """Do what is left of a job; raises ``JobFailed``, and ``UserError`` for another recipe's folder."""
    state = read_state(job, overwrite)
    if state is None:
        shutil.rmtree(job.folder, ignore_errors=True)
        state = State.fresh(job)
    if finished(job, overwrite):
        return state
    for part in job.data.values():
        data.write(part)
    state.commands = job.commands
    if state.train and not (state.train["done"] and (job.folder / _WEIGHTS_NAME).is_file()):
        _step(job, state, "train", job.train_command(**going_on(job, state)), commands)
    if not state.evaluate["starts"]:
        # What another recipe's evaluation has left beside a training that is kept.
        delete_evaluation(job.folder)
    _step(job, state, "evaluate", job.evaluate_command(), commands)
    return state


def execute_all(jobs: Sequence[Job], commands: Commands, overwrite: bool = False) -> Iterator[tuple[Job, State]]:
    """Do what is left of every job, ``commands.at_once`` at a time; yields each when it is done.

    The first that fails ends those that run beside it, and its exception is raised; so does whatever ends this block.
    """
    if commands.at_once == 1:
        yield from ((job, execute(job, commands, overwrite)) for job in jobs)
        return
    with ThreadPoolExecutor(commands.at_once) as pool:
        working = {pool.submit(execute, job, commands, overwrite): job for job in jobs}
        try:
            for done in as_completed(working):
                yield working[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            commands.end()
            raise


def going_on(job: Job, state: State) -> dict[str, bool]:
    """The flags that a training gets besides its recipe's: from its last whole checkpoint, if it had come to one."""
    if not state.train["starts"]:
        return {}
    if any(job.folder.glob("checkpoint-*/trainer_state.json")):
        return {"resume_from_checkpoint": True}
    return {"overwrite_output_dir": True}


def _step(job: Job, state: State, step: str, command: list[str], commands: Commands) -> None:
    """One command of a job, and what the state says of it before and after."""
    known = state.steps[step]
    known["starts"] += 1
    state.write(job)
    began, log = time.monotonic(), job.folder / _LOGS[step]
    if command[0] != "python":
        # A launcher hides the sentence of a user's mistake behind a traceback of its own.
        script = next(index for index, word in enumerate(command) if word.endswith(".py"))
        _logged(job, step, ["python", *command[script:], "--check", "True"], log, commands)
    _logged(job, step, command, log, commands)
    known["done"], known["seconds"] = True, round(time.monotonic() - began, 3)
    state.write(job)


def _logged(job: Job, step: str, command: list[str], log: Path, commands: Commands) -> None:
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        code = commands.start(command, output)
    if code:
        raise JobFailed(
            f"{job.label}: the {_WORDS[step]} ended with exit code {code}; {log} ends with: {last_line(log)}"
        )


def check_launcher(launcher: str) -> None:
    """Raise ``UserError`` if the program that starts the commands is not there."""
    program = shlex.split(launcher)[0]
    if program not in MODULES and shutil.which(program) is None:
        raise UserError(f"the launcher {launcher!r} can not be started: there is no program {program}")


def last_line(log: Path) -> str:
    """What a log says last, or the last ``error:`` of its end, for launchers talk on after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    lines = [line.strip() for line in lines if line.strip()][-60:]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1]
