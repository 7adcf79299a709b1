"""``python -m mtl_lora.study --grid FILE``: ends with exit code 2 for a user's mistake, 1 for a run that failed."""

import signal
import sys

from mtl_lora import cli
from mtl_lora.errors import files_within_reach, user_errors_to_exit_code
from mtl_lora.study.execute import JobFailed
from mtl_lora.study.run import run
from mtl_lora.study.settings import ABOUT, StudyConfig


def _stop(number, frame):
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Run a study."""
    # Ending the study shall end the command that it waits for.
    signal.signal(signal.SIGTERM, _stop)
    with user_errors_to_exit_code(), files_within_reach():
        config = cli.parse(StudyConfig, sys.argv[1:] if arguments is None else arguments, ABOUT)
        try:
            run(config)
        except JobFailed as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
