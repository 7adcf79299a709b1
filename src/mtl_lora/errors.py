"""The one exception for a user's mistake, and how a command line turns it into a sentence and exit code 2."""

import contextlib
import importlib.util
import os
import signal
import sys


class UserError(ValueError):
    """Bad input: one sentence naming the file, record or flag, what was found and the way out.

    field: the configuration's field that the sentence begins with, where it is about one.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def require_package(flag: str, package: str, wanted: bool = True) -> None:
    """Raise ``UserError`` if a flag that is set needs a package that is not there."""
    if wanted and importlib.util.find_spec(package) is None:
        raise UserError(f"--{flag} needs the package {package}; install it with `pip install {package}`")


EXIT_CODE = 2


@contextlib.contextmanager
def user_errors_to_exit_code():
    """Print a ``UserError`` as ``error: <sentence>`` on stderr and exit with code 2; no traceback.

    So ends a file that the system refuses and that nothing else explained. A reader of the output that has left, as
    ``head`` does, ends the command in silence. Under a launcher other processes than the first say which they are: what
    stops them may be theirs alone.
    """
    try:
        try:
            with files_within_reach():
                yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        print(f"error{f' on local rank {rank}' if rank != '0' else ''}: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again at its end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def files_within_reach():
    """Turn an ``OSError`` inside the block, such as a folder without permission, into a ``UserError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"a file or folder cannot be used: {error}") from None
    except UnicodeEncodeError as error:
        text = f"{error.object[:50]!a} cannot be written as {error.encoding}"
        raise UserError(f"{text}; set PYTHONUTF8=1, or a locale with UTF-8") from None


def check_environment() -> None:
    """Raise ``UserError`` for a launcher's variables that cannot be, before libraries trip over them."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            os.environ.pop("LOCAL_RANK", None)
            raise UserError(f"the environment's {name} must be a whole number, not {value!r}; unset it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("the environment has WORLD_SIZE but no MASTER_ADDR; start with torchrun, or unset WORLD_SIZE")
