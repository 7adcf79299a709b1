"""Running what is left of a job: its commands one after another, each with a log file."""

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.study import data
from mtl_lora.study.jobs import Job
from mtl_lora.study.state import State, finished, read_state

LOCK_NAME = ".lock"
_LOGS = {"train": "train.out", "evaluate": "evaluate.out"}
_WORDS = {"train": "training", "evaluate": "evaluation"}
_WEIGHTS_NAME = "mtl_lora.safetensors"
# Launchers that are modules of this very interpreter, whatever the path says.
_MODULES = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}


class JobFailed(Exception):
    """A command ended with an error: one line that says which, where its log is, and what it said last."""


def execute(job: Job, lock: int, overwrite: bool = False) -> State:
    """Do what is left of a job; raises ``JobFailed`` if a command fails and ``UserError`` for another recipe's folder.

    lock: a file descriptor that the commands keep open, see ``locked``.
    """
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
        _step(job, state, "train", job.train_command(**going_on(job, state)), lock)
    _step(job, state, "evaluate", job.evaluate_command(), lock)
    return state


def going_on(job: Job, state: State) -> dict[str, bool]:
    """The flags that a training gets besides its recipe's: from its last whole checkpoint, if it had come to one."""
    if not state.train["starts"]:
        return {}
    if any(job.folder.glob("checkpoint-*/trainer_state.json")):
        return {"resume_from_checkpoint": True}
    return {"overwrite_output_dir": True}


def _step(job: Job, state: State, step: str, command: list[str], lock: int) -> None:
    """One command of a job, and what the state says of it before and after."""
    known = state.steps[step]
    known["starts"] += 1
    state.write(job)
    began, log = time.monotonic(), job.folder / _LOGS[step]
    if command[0] != "python":
        # A launcher hides the sentence of a user's mistake behind a traceback of its own.
        script = next(index for index, word in enumerate(command) if word.endswith(".py"))
        _logged(job, step, ["python", *command[script:], "--check", "True"], log, lock)
    _logged(job, step, command, log, lock)
    known["done"], known["seconds"] = True, round(time.monotonic() - began, 3)
    state.write(job)


def _logged(job: Job, step: str, command: list[str], log: Path, lock: int) -> None:
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        code = start(command, output, lock)
    if code:
        raise JobFailed(
            f"{job.label}: the {_WORDS[step]} ended with exit code {code}; {log} ends with: {last_line(log)}"
        )


def start(command: list[str], output, lock: int) -> int:
    """Run a command with its output in an open file; returns its exit code. It ends when the study is ended."""
    words = [sys.executable, *_MODULES[command[0]], *command[1:]] if command[0] in _MODULES else command
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[lock])
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def check_launcher(launcher: str) -> None:
    """Raise ``UserError`` if the program that starts the commands is not there."""
    program = shlex.split(launcher)[0]
    if program not in _MODULES and shutil.which(program) is None:
        raise UserError(f"the launcher {launcher!r} can not be started: there is no program {program}")


def last_line(log: Path) -> str:
    """What a log says last, or the last ``error:`` of its end, for launchers talk on after it."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    lines = [line.strip() for line in lines if line.strip()][-60:]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """A block in which no other study runs in ``folder``; yields the descriptor of its lock file.

    The commands inherit it, so a training that outlives a killed study still holds the lock. Raises ``UserError``.
    """
    files.require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"a study, or a command of one that was killed, still runs in {folder}; wait for it, end it, or pass "
                "another --output_dir"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)
