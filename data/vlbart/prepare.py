"""Build the data set in this folder: ``mtl-lora prepare vlbart``, written into the project."""

import sys
from pathlib import Path

from mtl_lora.cli import main

if __name__ == "__main__":
    main(["prepare", "vlbart", *sys.argv[1:]], root=Path(__file__).resolve().parents[2])
