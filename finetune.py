"""Fine-tune a language model on many tasks: the same as ``mtl-lora train``; ``--help`` lists the flags."""

import sys

import fire

from mtl_lora.cli import main

if __name__ == "__main__":
    # fire calls the parser that all commands share, which rejects wrong flags before any work starts.
    fire.Fire(lambda: main(["train", *sys.argv[1:]]), command=[])
