"""Fine-tune a language model on many tasks; ``python finetune.py --help`` lists the flags."""

import sys

from mtl_lora import cli
from mtl_lora.errors import one_sentence
from mtl_lora.train.settings import ABOUT, TrainConfig

if __name__ == "__main__":
    with one_sentence():
        config = cli.parse(TrainConfig, sys.argv[1:], ABOUT)
        # Imported after the flags are understood: a mistake in them is answered at once.
        from mtl_lora.train.launch import leave
        from mtl_lora.train.run import run

        run(config)
        leave()
