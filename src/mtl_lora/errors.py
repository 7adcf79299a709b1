"""The one exception for a user's mistake, and how a command line turns it into a sentence and exit code 2."""

import contextlib
import importlib.util
import os
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

    Under a launcher other processes than the first say which they are: what stops them may be theirs alone.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        print(f"error{f' on local rank {rank}' if rank != '0' else ''}: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def files_within_reach():
    """Turn an ``OSError`` inside the block, such as a folder without permission, into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"a file or folder cannot be used: {error}") from None
