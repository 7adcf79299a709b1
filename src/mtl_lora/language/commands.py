"""The commands of this system: each parses its flags, which needs no torch, before importing what does the work."""

from collections.abc import Sequence

from mtl_lora.artifacts import AGREEMENT, RESULTS
from mtl_lora.cli import parse
from mtl_lora.files import read_json
from mtl_lora.language.config import EvalConfig, PredictConfig, TrainConfig

TRAIN_ABOUT = "Fine-tune a language model on many tasks with MTL-LoRA or another low-rank adapter."
EVALUATE_ABOUT = "Score a checkpoint, or a base model alone, on the test sets of its tasks."
PREDICT_ABOUT = "Answer the examples of a file with a checkpoint, or with a base model alone."


def train(arguments: Sequence[str]) -> None:
    """``mtl-lora train``, and ``finetune.py``."""
    config = parse(TrainConfig, arguments, TRAIN_ABOUT)
    from mtl_lora.language.train import run
    from mtl_lora.training.distributed import destroy_process_group, prepare_process

    prepare_process(config)
    run(config)
    destroy_process_group()


def evaluate(arguments: Sequence[str]) -> None:
    """``mtl-lora evaluate``, and ``commonsense_evaluate.py``; prints the results as tables at the end."""
    config = parse(EvalConfig, arguments, EVALUATE_ABOUT)
    from mtl_lora.language.evaluate import run

    if not run(config):
        return
    from mtl_lora.report.__main__ import main as report

    results = [f"{folder}/{RESULTS}" for folder in config.protocols.values()]
    report(["table", *results])
    print()
    report(["details", *results])
    if config.mode == "both":
        agreement = read_json(f"{config.output_folder}/{AGREEMENT}", "the agreement of the protocols")
        print(f"\nThe protocols give the same answer to {100 * agreement['all']:.1f} % of the questions.")


def predict(arguments: Sequence[str]) -> None:
    """``mtl-lora predict``."""
    config = parse(PredictConfig, arguments, PREDICT_ABOUT)
    from mtl_lora.language.predict import run

    run(config)
