"""The exception for a user's mistake, and how the command line turns it into one sentence and exit code 2."""

import contextlib
import errno
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence


class UserError(ValueError):
    """Bad input; the message is one sentence that names the file, example or flag, what was found and the way out.

    field: the configuration field with which the message begins, if it is about one.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


@contextlib.contextmanager
def within(place: object, then: str = ": ") -> Iterator[None]:
    """Put a place, such as a file or an example, in front of the message of a ``UserError`` raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}{then}{error}") from None


def note(*lines: str) -> None:
    """Print lines on stderr, from the first process of a launch only."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr, flush=True)


def require_package(flag: str, package: str, wanted: bool = True) -> None:
    """Raise ``UserError`` if a package that a flag needs is not installed. wanted: whether the flag is set."""
    if wanted and importlib.util.find_spec(package) is None:
        raise UserError(f"--{flag} needs the package {package}; install it with `pip install {package}`")


def first_of(names: Sequence[str]) -> str:
    """Return the first of at least one name and the number of the others: ``q_proj and 2 others``."""
    return f"{names[0]} and {len(names) - 1} others" if len(names) > 1 else names[0]


EXIT_CODE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors (Rust) and torch (C++) have their own messages for a full disk; torch does not say why it cannot write.
_FULL_WORDS = rf"\(os error ({'|'.join(map(str, _FULL))})\)|code: 28,|PytorchStreamWriter failed|unexpected pos \d"


def disk_is_full(error: BaseException) -> bool:
    """Return whether an exception says that a file could not be written because the disk is full."""
    return getattr(error, "errno", None) in _FULL or re.search(_FULL_WORDS, str(error)) is not None


@contextlib.contextmanager
def user_errors_to_exit_code() -> Iterator[None]:
    """Print a ``UserError`` as ``error: <sentence>`` on stderr and exit with code 2, without a traceback.

    An ``OSError`` that nothing else explained ends in the same way. SIGINT exits with 130, SIGTERM with 143. If the
    reader of the output has left, as ``head`` does, the command ends silently. Under a launcher, processes other than
    the first add their local rank, because an error may concern that process alone.
    """
    try:
        with _signals_unwind():
            try:
                yield
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python would write again at its exit
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        rank = os.environ.get("LOCAL_RANK", "0")
        sentence = sentence.replace("\n", "\\n")  # a flag's value may hold line ends
        print(f"error{f' on local rank {rank}' if rank != '0' else ''}: {sentence}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def _sentence(error: Exception) -> str | None:
    """Return what to tell the user of a ``UserError``, a full disk or another ``OSError``; None for a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        text = f"{error.object[:50]!a} cannot be written as {error.encoding}"
        return f"{text}; set PYTHONUTF8=1 or a UTF-8 locale"
    if disk_is_full(error):
        where = f" of {error.filename}" if getattr(error, "filename", None) else ""
        return f"the disk{where} is full ({error}); free some space, then run the same command again"
    return f"a file or folder cannot be used: {error}" if isinstance(error, OSError) else None


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """A context in which SIGTERM, like SIGINT, ends the process by an exception, so temporary files are removed.

    SIGTERM is left alone under a launcher, whose processes may wait for each other outside Python, where no handler
    runs.
    """
    hook, main = sys.unraisablehook, threading.current_thread() is threading.main_thread()
    before, stopped = {}, []

    def stop(number: int, _) -> None:
        stopped.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise stopped[-1]

    def again(ignored) -> None:
        # Python ignores exceptions in destructors, and with them a signal that arrives there; send the signal again.
        number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(ignored.exc_type)
        if number is None:
            return hook(ignored)
        # Delayed: a signal within the destructor would be ignored again, and the thread takes a while to start.
        timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    if main and os.environ.get("WORLD_SIZE", "1") == "1":
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stop)
    sys.unraisablehook = again
    try:
        yield
    except Exception:
        if stopped:  # native code that a signal interrupts raises its own error
            raise stopped[0] from None
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def check_environment() -> None:
    """Raise ``UserError`` for invalid environment variables of a launcher, before libraries fail on them."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            os.environ.pop("LOCAL_RANK", None)
            raise UserError(f"the environment variable {name} must be a whole number, not {value!r}; unset it")
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank >= processes:
        found = f"the environment has RANK={rank} and WORLD_SIZE={processes}"
        raise UserError(f"RANK must be below WORLD_SIZE, but {found}; start with torchrun, or unset both")
    if processes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("the environment has WORLD_SIZE but no MASTER_ADDR; start with torchrun, or unset WORLD_SIZE")
