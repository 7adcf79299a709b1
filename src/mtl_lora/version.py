"""The library version and the checkout's commit: every checkpoint and every results file names both."""

import os
import subprocess
from pathlib import Path

__version__ = "0.2.0"


def checkout_commit(*without: str) -> str | None:
    """The project's commit where the package runs from its own git checkout; ``+changes`` if files differ from it.

    Where ``script/unbundle.sh`` installed the package, the commit that was bundled. None elsewhere, also for a package
    that is installed inside another project's checkout. without: paths from the checkout's top whose differences do not
    count.
    """
    checkout = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        # Without what points git at another repository, as in a hook.
        elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
        environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        # An installed package lies in site-packages, so its parents[2] is the top of no checkout.
        if (
            Path(git("rev-parse", "--show-toplevel")).resolve() != checkout
            or not (checkout / "pyproject.toml").is_file()
        ):
            return _bundled_commit(checkout)
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", ":/", *(f":(top,exclude){path}" for path in without))
    except (OSError, subprocess.CalledProcessError):
        return _bundled_commit(checkout)
    return commit + ("+changes" if changed else "")


def _bundled_commit(folder: Path) -> str | None:
    """The commit in the file that a bundle carries beside its packages; None without one."""
    try:
        return (folder / "BUNDLE_COMMIT").read_text().strip()
    except OSError:
        return None
