"""What commonsense_evaluate.py does: questions to predictions to ``results.json``."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.language.collect_results import agreement, collect
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import Evaluation
from mtl_lora.language.output import RESULTS_NAME, SETTINGS_NAME, delete_evaluation
from mtl_lora.language.predictions import Predictions

AGREEMENT_NAME = "agreement.json"


def run(config: EvalConfig) -> dict:
    """Answer every question that has no answer yet and write ``results.json``; returns its content.

    With ``mode="both"`` each protocol has a folder and results of its own, and ``agreement.json`` says how often they
    agree; returned is then ``{protocol: results, "agreement": ...}``.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    evaluation = Evaluation(config)
    for protocol, folder in config.protocols.items():
        _check_settings(Path(folder), evaluation.settings(protocol), config.overwrite)
    if config.check:
        print(f"every setting is fine; {len(evaluation.questions):,} questions", file=sys.stderr)
        return {}
    with _process_group(world_size) as barrier:
        if rank == 0:
            claim_output(evaluation)
        barrier()
        found = {protocol: _run(evaluation, protocol, rank, world_size, barrier) for protocol in config.protocols}
        if config.mode != "both":
            return found[config.mode]
        if rank == 0:
            asked = [question.key for question in evaluation.questions]
            found["agreement"] = agreement(asked, *(Predictions(folder).read() for folder in config.protocols.values()))
            files.write_json(Path(config.output_folder) / AGREEMENT_NAME, found["agreement"])
    return found


def _run(evaluation: Evaluation, protocol: str, rank: int, world_size: int, barrier: Callable) -> dict:
    """One protocol in its folder, the questions shared over the processes; the first one returns the results."""
    folder = evaluation.config.protocols[protocol]
    predictions = Predictions(folder, rank)
    done = known_predictions(evaluation, predictions)
    barrier()  # nobody appends before everybody has read
    # A batch of which a part is missing is answered whole: its figures then do not depend on where a run was cut.
    waiting = [batch for batch in evaluation.batches() if any(question.key not in done for question in batch)]
    answer_all(evaluation, protocol, waiting[rank::world_size], predictions, rank)
    predictions.close()
    barrier()
    results = {}
    if rank == 0:
        results = collect(evaluation, protocol, predictions.gather())
        files.write_json(Path(folder) / RESULTS_NAME, results)
    barrier()
    return results


@contextlib.contextmanager
def _process_group(world_size: int):
    """The processes of a distributed launch, and a barrier between them; nothing for one process."""
    if world_size == 1:
        yield lambda: None
        return
    # Only barriers cross between processes, so gloo serves GPU runs too.
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.barrier
    finally:
        torch.distributed.destroy_process_group()


def claim_output(evaluation: Evaluation) -> None:
    """Make the output folders, which were checked, this evaluation's."""
    config = evaluation.config
    for protocol, folder in config.protocols.items():
        if config.overwrite:
            delete_evaluation(Path(folder))
        files.write_json(Path(folder) / SETTINGS_NAME, evaluation.settings(protocol))


def _check_settings(folder: Path, settings: dict, overwrite: bool) -> None:
    """Raise ``UserError`` naming what differs if a folder holds the results of another evaluation."""
    path = folder / SETTINGS_NAME
    if overwrite or not path.exists():
        return
    earlier = files.read_json(path, "the settings of an earlier evaluation")
    different = sorted(key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key))
    if different:
        raise UserError(
            f"{folder} holds results with another {', '.join(different)}; pass another --output_dir, "
            "or --overwrite True to delete them"
        )


def known_predictions(evaluation: Evaluation, predictions: Predictions) -> set[tuple[str, int]]:
    """Keys of the questions already answered, each for the very prompt and right answer it has now."""
    found = predictions.read()
    return {
        question.key
        for question in evaluation.questions
        if (record := found.get(question.key))
        and record["prompt_sha256"] == question.prompt_sha256
        and record["answer"] == question.example.answer
    }


def answer_all(evaluation: Evaluation, protocol: str, batches: list, predictions: Predictions, rank: int) -> None:
    """Answer batches of questions, appending as they come; those of a task follow each other, the longest first."""
    if not batches:
        return
    evaluation.load()
    total = sum(len(batch) for batch in batches)
    with tqdm(total=total, desc=protocol, unit=" questions", smoothing=0.02, disable=rank > 0) as bar:
        for batch in batches:
            predictions.append(evaluation.answer(batch, protocol))
            bar.update(len(batch))
