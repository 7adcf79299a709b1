"""Score a checkpoint or a base model on its tasks: the same as ``mtl-lora evaluate``; ``--help`` lists the flags."""

import sys

import fire

from mtl_lora.cli import main

if __name__ == "__main__":
    # fire starts the one parser of all commands, which refuses wrong flags before any work.
    fire.Fire(lambda: main(["evaluate", *sys.argv[1:]]), command=[])
