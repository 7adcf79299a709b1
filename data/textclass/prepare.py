"""Build the data set in this folder: ``mtl-lora prepare textclass``, written into the project."""

import sys
from pathlib import Path

from mtl_lora.cli import prepare
from mtl_lora.errors import user_errors_to_exit_code

if __name__ == "__main__":
    with user_errors_to_exit_code():
        prepare(["textclass", *sys.argv[1:]], root=Path(__file__).resolve().parents[2])
