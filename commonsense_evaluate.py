"""Score a checkpoint or a base model on its tasks; ``python commonsense_evaluate.py --help`` lists the flags."""

import os
import sys

from mtl_lora import cli
from mtl_lora.errors import one_sentence
from mtl_lora.evaluate.settings import ABOUT, EvalConfig

if __name__ == "__main__":
    with one_sentence():
        config = cli.parse(EvalConfig, sys.argv[1:], ABOUT)
        # Imported after the flags are understood: a mistake in them is answered at once.
        from mtl_lora.evaluate.run import RESULTS_NAME, run
        from mtl_lora.report.__main__ import main as report

        found = run(config)
        if not config.check and int(os.environ.get("RANK", "0")) == 0:
            report(["table", *(f"{folder}/{RESULTS_NAME}" for folder in config.protocols.values())])
            report(["details", *(f"{folder}/{RESULTS_NAME}" for folder in config.protocols.values())])
            if config.mode == "both":
                print(
                    f"\nThe protocols give the same answer to {100 * found['agreement']['all']:.1f} % of the questions."
                )
