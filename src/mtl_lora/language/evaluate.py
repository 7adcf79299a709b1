"""``mtl-lora evaluate`` of language models: by generated text, by the likeliest option, or by both."""

from collections.abc import Iterable
from pathlib import Path

from mtl_lora import artifacts, files
from mtl_lora.evaluation import Predictions, claimed_folders, evaluate
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import Evaluator
from mtl_lora.language.predict import run as predict
from mtl_lora.language.questions import load_questions
from mtl_lora.results import Results

__all__ = ["agreement", "predict", "run"]


def run(config: EvalConfig) -> dict[str, Results]:
    """Answer every question that has no answer yet; writes and returns the results of each protocol.

    With ``mode="both"`` each protocol has a folder, results and a name of its own, and ``agreement.json`` beside them
    says how often they agree. Empty with ``check``, and on every process but the first.
    """
    evaluator = Evaluator(config)
    asked = load_questions(config.data_dir, evaluator.tasks, config.tasks, evaluator.encoder, config.limit)
    questions = dict.fromkeys(config.protocols, asked.questions)
    if config.mode == "both":
        free_text = {question.task.name for question in asked.questions if not question.options}
        questions["score"] = [each for each in asked.questions if each.task.name not in free_text]
    # Of free text alone there is nothing to score.
    folders = {protocol: folder for protocol, folder in config.protocols.items() if questions[protocol]}
    evaluator.prepare(questions)
    with claimed_folders(config, folders):
        results = evaluate(evaluator, asked, questions, folders)
        if len(results) > 1:
            lines = [Predictions(folder).read() for folder in folders.values()]
            value = agreement((question.key for question in questions["score"]), *lines)
            files.write_json(Path(config.output_folder) / artifacts.AGREEMENT, value)
    return results


def agreement(
    asked: Iterable[tuple[str, int]], first: dict[tuple[str, int], dict], second: dict[tuple[str, int], dict]
) -> dict:
    """How often two protocols give a question the same answer: a fraction by task and over all."""
    by_task: dict[str, list[bool]] = {}
    for key in asked:
        by_task.setdefault(key[0], []).append(first[key]["parsed"] == second[key]["parsed"])
    same = [value for values in by_task.values() for value in values]
    return {
        "tasks": {task: sum(values) / len(values) for task, values in by_task.items()},
        "all": sum(same) / len(same),
        "n": len(same),
    }
