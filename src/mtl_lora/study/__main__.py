"""``python -m mtl_lora.study``: the same as ``mtl-lora study``."""

import sys

from mtl_lora.cli import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
