"""The commands train, evaluate and predict for every system; flags are parsed, without torch, before anything else is
imported."""

from collections.abc import Sequence

from mtl_lora.artifacts import RESULTS
from mtl_lora.cli import UnknownFlag, parse, take
from mtl_lora.config import Config
from mtl_lora.errors import UserError
from mtl_lora.systems import SYSTEMS, part


def _configuration(system: str, kind: str, about: str, arguments: Sequence[str]) -> Config:
    """Return the arguments as the configuration ``kind`` of a system; an error about a flag that only other systems
    have names those systems."""
    home = part(system, "config")
    try:
        return parse(getattr(home, kind), arguments, getattr(home, about))
    except UnknownFlag as error:
        of = {each: {flag.name for flag in getattr(part(each, "config"), kind).flags()} for each in SYSTEMS}
        if not (others := [each for each in SYSTEMS if error.field in of[each]]):
            raise
        found = f"--{error.field} is a flag of --system {' and '.join(others)}, not of {system}"
        if take("checkpoint", list(arguments))[0] is not None:
            raise UserError(f"{found}, the system of the checkpoint; leave the flag out") from None
        raise UserError(f"{found}; pass --system {' or '.join(others)}") from None


def train(system: str, arguments: Sequence[str]) -> None:
    """Run ``mtl-lora train`` and ``finetune.py``."""
    config = _configuration(system, "TrainConfig", "TRAIN_ABOUT", arguments)
    config.check_files()
    run = part(system, "train").run
    from mtl_lora.training.distributed import destroy_process_group, prepare_process

    prepare_process(config)
    run(config)
    destroy_process_group()


def evaluate(system: str, arguments: Sequence[str]) -> None:
    """Run ``mtl-lora evaluate`` and ``commonsense_evaluate.py``; prints the results as tables at the end."""
    config = _configuration(system, "EvalConfig", "EVALUATE_ABOUT", arguments)
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
    """Run ``mtl-lora predict``."""
    config = _configuration(system, "PredictConfig", "PREDICT_ABOUT", arguments)
    config.check_files()
    part(system, "evaluate").predict(config)
