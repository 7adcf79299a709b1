"""train, evaluate and predict, the same for every system: flags are parsed, which needs no torch, before what does the
work is imported."""

from collections.abc import Sequence

from mtl_lora.artifacts import RESULTS
from mtl_lora.cli import parse
from mtl_lora.systems import part


def train(system: str, arguments: Sequence[str]) -> None:
    """``mtl-lora train``, and ``finetune.py``."""
    flags = part(system, "config")
    config = parse(flags.TrainConfig, arguments, flags.TRAIN_ABOUT)
    config.check_files()
    run = part(system, "train").run
    from mtl_lora.training.distributed import destroy_process_group, prepare_process

    prepare_process(config)
    run(config)
    destroy_process_group()


def evaluate(system: str, arguments: Sequence[str]) -> None:
    """``mtl-lora evaluate``, and ``commonsense_evaluate.py``; prints the results as tables at the end."""
    flags = part(system, "config")
    config = parse(flags.EvalConfig, arguments, flags.EVALUATE_ABOUT)
    config.check_files()
    found = part(system, "evaluate").run(config)
    if not found:
        return
    from mtl_lora.report.__main__ import main as report

    results = [f"{config.protocols[protocol]}/{RESULTS}" for protocol in found]
    report(["table", *results])
    print()
    report(["details", *results])
    print(*config.closing_lines(found), sep="\n", end="")


def predict(system: str, arguments: Sequence[str]) -> None:
    """``mtl-lora predict``."""
    flags = part(system, "config")
    config = parse(flags.PredictConfig, arguments, flags.PREDICT_ABOUT)
    config.check_files()
    part(system, "evaluate").predict(config)
