"""The commands of this system: each parses its flags, which needs no torch, before importing what does the work."""

import os
from collections.abc import Sequence

from mtl_lora.artifacts import RESULTS
from mtl_lora.cli import parse
from mtl_lora.language.config import EVALUATE_ABOUT, TRAIN_ABOUT, EvalConfig, TrainConfig


def train(arguments: Sequence[str]) -> None:
    """``mtl-lora train``, and ``finetune.py``."""
    config = parse(TrainConfig, arguments, TRAIN_ABOUT)
    from mtl_lora.language.train import run
    from mtl_lora.training.distributed import destroy_process_group, prepare_process

    prepare_process(config)
    run(config)
    destroy_process_group()


def evaluate(arguments: Sequence[str]) -> None:
    """``mtl-lora evaluate``, and ``commonsense_evaluate.py``; prints the table at the end."""
    config = parse(EvalConfig, arguments, EVALUATE_ABOUT)
    from mtl_lora.language.evaluate import run
    from mtl_lora.report.cli import main as report

    found = run(config)
    if not config.check and int(os.environ.get("RANK", "0")) == 0:
        results = [f"{folder}/{RESULTS}" for folder in config.protocols.values()]
        report(["table", *results])
        report(["details", *results])
        if config.mode == "both":
            agreement = 100 * found["agreement"]["all"]
            print(f"\nThe protocols give the same answer to {agreement:.1f} % of the questions.")
