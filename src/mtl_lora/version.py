"""The library version and the checkout's commit, both recorded in every checkpoint and every results file."""

import contextlib
import os
import subprocess
from pathlib import Path

__version__ = "0.2.0"


def checkout_commit(*without: str) -> str | None:
    """Return the commit of the git checkout from which the package runs, with ``+changes`` if files differ from it.

    For a package that ``script/unbundle.sh`` installed, this is the bundled commit. Otherwise None, also for a package
    that is installed inside another project's checkout. without: paths, relative to the top of the checkout, whose
    changes are ignored.
    """
    checkout = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        # Drop the variables that point git at another repository, as they do in a hook.
        elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
        environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # An installed package lies in site-packages, so its parents[2] is not the top of a checkout.
        top = Path(git("rev-parse", "--show-toplevel")).resolve()
        if top == checkout and (checkout / "pyproject.toml").is_file():
            changed = git("status", "--porcelain", "-uno", "--", ":/", *(f":(top,exclude){path}" for path in without))
            return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    with contextlib.suppress(OSError):
        return (checkout / "BUNDLE_COMMIT").read_text().strip()
    return None
