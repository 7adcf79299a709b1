"""Running a job: what is already there, what is left to do, the commands with their log files, the record of it."""

import contextlib
import dataclasses
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
from mtl_lora.report.results import FILE_NAME as RESULTS_NAME
from mtl_lora.study import data
from mtl_lora.study.jobs import Job

STATE_NAME, LOCK_NAME = "job.json", ".lock"
LOGS = {"train": "train.out", "evaluate": "evaluate.out"}
_WEIGHTS_NAME = "mtl_lora.safetensors"
_MODULES = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}


class JobFailed(Exception):
    """A command ended with an error: one line that says which, where its log is, and what it said last."""


@dataclasses.dataclass
class State:
    """What ``job.json`` keeps of a job: its recipe, and for each command its seconds, how often it was started, done.

    A command that was killed and started again has the seconds of its last start alone.
    """

    recipe: dict
    commands: list[str]
    train: dict | None
    evaluate: dict

    @classmethod
    def fresh(cls, job: Job) -> "State":
        """Of a job that was never started."""
        steps = [{"done": False, "seconds": 0.0, "starts": 0} for _ in range(2)]
        return cls(job.recipe, job.commands, steps[0] if job.train else None, steps[1])

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.evaluate["done"] and (self.train is None or self.train["done"])

    @property
    def seconds(self) -> dict[str, float | None]:
        """By command; None without a training."""
        return {"train": self.train and self.train["seconds"], "evaluate": self.evaluate["seconds"]}


def read_state(job: Job, overwrite: bool = False) -> State | None:
    """The state of a job that was started before; None for one that was not, or is to be made anew (``overwrite``).

    Raises ``UserError`` naming what differs if the folder's job has another recipe.
    """
    path = job.folder / STATE_NAME
    if not path.is_file():
        if job.folder.is_dir() and any(job.folder.glob("*.*")):
            raise UserError(f"{job.folder} holds files of something else than a study; pass another --output_dir")
        return None
    state = State(**files.read_json(path, "the state of a job,"))
    if changed := _changes(state.recipe, job.recipe):
        if overwrite:
            return None
        raise UserError(
            f"{job.folder} was made by another recipe ({'; '.join(changed)}); pass --overwrite True to make it anew, "
            "or another --output_dir"
        )
    return state


def _changes(before: dict, now: dict) -> list[str]:
    """``train.lora_r 8 -> 4``, one a key that differs; long values are only named."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "not given"), now.get(key, "not given")
        if old != new:
            short = len(str(old)) + len(str(new)) < 80
            found.append(f"{key} {old} -> {new}" if short else key)
    return found


def has_checkpoint(folder: Path) -> bool:
    """Whether a training that was killed can go on from a whole checkpoint."""
    return any(folder.glob("checkpoint-*/trainer_state.json"))


def execute(job: Job, lock: int, overwrite: bool = False) -> State:
    """Do what is left of a job; raises ``JobFailed`` if a command fails and ``UserError`` for another recipe's folder.

    lock: a file descriptor that the commands keep open, see ``locked``.
    """
    state = read_state(job, overwrite)
    if state is None:
        shutil.rmtree(job.folder, ignore_errors=True)
        state = State.fresh(job)
    for part in job.data.values():
        data.write(part)
    state.commands = job.commands
    if state.train and not (state.train["done"] and (job.folder / _WEIGHTS_NAME).is_file()):
        again = {"resume_from_checkpoint": True} if has_checkpoint(job.folder) else {"overwrite_output_dir": True}
        if not state.train["starts"]:
            again = {}
        _start(job, state, "train", job.train_command(**again), lock)
    if not (state.evaluate["done"] and (job.folder / RESULTS_NAME).is_file()):
        _start(job, state, "evaluate", job.evaluate_command(), lock)
    return state


def _start(job: Job, state: State, step: str, command: list[str], lock: int) -> None:
    record = getattr(state, step)
    record["starts"] += 1
    files.write_json(job.folder / STATE_NAME, dataclasses.asdict(state))
    began = time.monotonic()
    log = job.folder / LOGS[step]
    if not command[0].startswith("python"):
        # A launcher hides the sentence of a user's mistake behind a traceback of its own.
        script = next(index for index, word in enumerate(command) if word.endswith(".py"))
        _run(job, step, ["python", *command[script:], "--check", "True"], log, lock)
    _run(job, step, command, log, lock)
    record["done"], record["seconds"] = True, round(time.monotonic() - began, 3)
    files.write_json(job.folder / STATE_NAME, dataclasses.asdict(state))


def _run(job: Job, step: str, command: list[str], log: Path, lock: int) -> None:
    words = [sys.executable, *_MODULES[command[0]], *command[1:]] if command[0] in _MODULES else command
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[lock])
        except OSError as error:
            raise JobFailed(f"{job.label}: {words[0]} can not be started ({error.strerror})") from None
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        what = {"train": "training", "evaluate": "evaluation"}[step]
        raise JobFailed(f"{job.label}: the {what} ended with exit code {code}; {log} ends with: {last_line(log)}")


def last_line(log: Path) -> str:
    """What a log says last: its last ``error:`` line among the last ones, for launchers go on after it."""
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
