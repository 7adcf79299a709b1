"""The one exception for a user's mistake, and how a command line turns it into a sentence and exit code 2."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input: one sentence naming the file, record or flag, what was found and the way out.

    field: the configuration's field that the sentence begins with, where it is about one.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


EXIT_CODE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors (Rust) and torch (C++) report a full disk by words of their own; torch does not say why it cannot write.
_FULL_WORDS = rf"\(os error ({'|'.join(map(str, _FULL))})\)|code: 28,|PytorchStreamWriter failed|unexpected pos \d"


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception says that a file could not be written for want of room."""
    return getattr(error, "errno", None) in _FULL or re.search(_FULL_WORDS, str(error)) is not None


@contextlib.contextmanager
def user_errors_to_exit_code() -> Iterator[None]:
    """Print a ``UserError``, or that the disk is full, as ``error: <sentence>`` on stderr and exit with code 2.

    SIGINT exits with 130 and SIGTERM with 143. No traceback. Under a launcher each rank checks the same input, so only
    local rank 0 prints.
    """
    try:
        with _sigterm_unwinds():
            yield
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, UserError) and not disk_is_full(error):
            raise
        if not isinstance(error, UserError):
            where = f"of {error.filename} " if getattr(error, "filename", None) else ""
            error = f"the disk {where}is full; free some space, then run the same command again"
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """A block in which SIGTERM ends the process as SIGINT does: temporary files are removed on the way out.

    Not under a launcher, whose processes may wait for each other outside Python, where no handler runs.
    """
    if threading.current_thread() is not threading.main_thread() or os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def files_within_reach():
    """Turn an ``OSError`` inside the block, such as a folder without permission, into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"a file or folder cannot be used: {error}") from None
