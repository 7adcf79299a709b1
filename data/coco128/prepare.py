"""Build the data set in this folder: ``mtl-lora prepare coco128``, written into the project."""

import sys
from pathlib import Path

from mtl_lora.cli import main

if __name__ == "__main__":
    main(["prepare", "coco128", *sys.argv[1:]], root=Path(__file__).resolve().parents[2])
