"""The library version and the checkout's commit: every checkpoint and every results file names both."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def checkout_commit(*without: str) -> str | None:
    """The project's commit, when it runs from a git checkout; ``+changes`` if files differ from it.

    without: paths from the checkout's top whose differences do not count.
    """
    here = ["git", "-C", str(Path(__file__).parent)]
    counted = ["--", ":/", *(f":(top,exclude){path}" for path in without)]
    try:
        commit, changed = (
            subprocess.run([*here, *asked], capture_output=True, text=True, check=True).stdout.strip()
            for asked in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno", *counted])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")
