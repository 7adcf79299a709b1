"""``python -m mtl_lora.report`` is ``mtl-lora report``."""

import sys

from mtl_lora.errors import user_errors_to_exit_code
from mtl_lora.report.cli import main

if __name__ == "__main__":
    with user_errors_to_exit_code():
        main(sys.argv[1:])
