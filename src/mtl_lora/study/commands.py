"""The commands of a study that run now: each with its share of the machine, and all of them ended together."""

import contextlib
import fcntl
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError

LOCK_NAME = ".lock"
# Launchers that are modules of this very interpreter, whatever the path says.
MODULES = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}


class Commands:
    """Starts commands, at most ``at_once`` at a time, for a study that holds the lock of its folder.

    lock: descriptor of the lock file. The commands inherit it, so a training that outlives a killed study still holds
    the lock. Raises ``UserError`` if there are GPUs, but fewer than ``at_once``.
    """

    def __init__(self, lock: int, at_once: int = 1):
        self.at_once, self._lock = at_once, lock
        self._slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in shares_of_the_machine(at_once):
            self._slots.put(slot)
        self._running: set[subprocess.Popen] = set()
        self._starting, self._over = threading.Lock(), False

    def start(self, command: Sequence[str], output) -> int:
        """Run a command with its output in an open file; returns its exit code."""
        known = command[0] in MODULES
        words = [sys.executable, *MODULES[command[0]], *command[1:]] if known else command
        slot = self._slots.get()
        with self._starting:
            if self._over:
                raise RuntimeError("the study is ended")  # seen by nobody: the main thread has its own reason
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[self._lock],
                env={**os.environ, **slot},
            )
            self._running.add(process)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            self._running.discard(process)
            self._slots.put(slot)

    def end(self) -> None:
        """End every command that runs; none starts after it."""
        with self._starting:
            self._over = True
        for process in list(self._running):
            process.terminate()


def shares_of_the_machine(at_once: int) -> list[dict[str, str]]:
    """What each of so many commands gets in its environment: a share of the CPU's threads, and a GPU of its own.

    One at a time gets the machine as it is. A thread count that the user has set stays.
    """
    if at_once == 1:
        return [{}]
    gpus = visible_gpus()
    if gpus and at_once > len(gpus):
        raise UserError(f"--parallel {at_once} needs as many GPUs, and there are {len(gpus)}")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cpus() // at_once))
    slots = [{"OMP_NUM_THREADS": threads} for _ in range(at_once)]
    for slot, gpu in zip(slots, gpus, strict=False):
        slot["CUDA_VISIBLE_DEVICES"] = gpu
    return slots


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that a command may use, as CUDA_VISIBLE_DEVICES names them; none where nvidia-smi finds none."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [name for name in asked.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return []
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    return [str(number) for number in range(count)]


@contextlib.contextmanager
def locked(folder: Path, at_once: int = 1) -> Iterator[Commands]:
    """A block in which no other study runs in ``folder``; yields what starts its commands. Raises ``UserError``."""
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
        yield Commands(descriptor, at_once)
    finally:
        os.close(descriptor)
