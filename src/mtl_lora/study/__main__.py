"""``mtl-lora study``, and ``python -m mtl_lora.study``: exit code 2 for a user's mistake, 1 for a job that failed."""

import signal
import sys
from collections.abc import Sequence

from mtl_lora import cli
from mtl_lora.errors import files_within_reach
from mtl_lora.study.config import ABOUT, StudyConfig
from mtl_lora.study.runner import JobFailed, run


def _stop(number, frame):
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> None:
    """Run a study by its flags; raises ``UserError`` and ``SystemExit``."""
    config = cli.parse(StudyConfig, arguments, ABOUT)
    # A study that is ended ends the commands that it waits for.
    signal.signal(signal.SIGTERM, _stop)
    try:
        with files_within_reach():
            run(config)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    cli.main(["study", *sys.argv[1:]])
