"""``mtl-lora evaluate`` and ``predict`` for language models: by generated text, by the likeliest option, or by both."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mtl_lora import artifacts, evaluation, files
from mtl_lora.errors import UserError
from mtl_lora.evaluation import Predictions, claimed_folders, evaluate, load_questions
from mtl_lora.language.config import PROTOCOLS, AnswerConfig, EvalConfig, PredictConfig
from mtl_lora.language.evaluator import Evaluator
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import COMMONSENSE
from mtl_lora.results import Results


def run(config: EvalConfig) -> dict[str, Results]:
    """Answer every question that has no answer yet; writes the results and returns them by protocol.

    With ``mode="both"`` each protocol has its own folder and results, and ``agreement.json`` beside them says how often
    the protocols agree. Returns an empty dict with ``check``, and on every process but the first.
    """
    evaluator = Evaluator(config)
    made_by = config.made_by if evaluator.tasks.names == COMMONSENSE.names else ""
    data = config.data_dir, evaluator.tasks, config.tasks
    asked = load_questions(*data, load_examples, evaluator.questions, config.limit, made_by)
    questions = dict.fromkeys(config.protocols, asked.questions)
    if config.mode == "both":
        free_text = {question.task.name for question in asked.questions if not question.options}
        questions["score"] = [each for each in asked.questions if each.task.name not in free_text]
    # If all tasks are free text, there is nothing to score.
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
    """The fraction of the ``asked`` questions to which two protocols give the same answer, by task and over all."""
    by_task: dict[str, list[bool]] = {}
    for key in asked:
        by_task.setdefault(key[0], []).append(first[key]["parsed"] == second[key]["parsed"])
    same = [value for values in by_task.values() for value in values]
    return {
        "tasks": {task: sum(values) / len(values) for task, values in by_task.items()},
        "all": sum(same) / len(same),
        "n": len(same),
    }


# ---- prediction ----


class Predictor(evaluation.Predictor):
    """Answers examples from Python; the model is loaded at the first call of ``predict``.

        predictor = Predictor("output/run")
        predictor.predict([{"instruction": "Is the sky blue?"}], task="boolq")
        # [{"index": 0, "task": "boolq", "answer": "true", "scores": {...}, "probabilities": {...}}]

    checkpoint: adapter folder, which names its base model, prompt and tasks. flags: any other flag of
    ``mtl-lora predict`` (``base_model``, ``peft``, ``tasks_file``, ``dtype``, ``batch_size`` ...), by name. Raises
    ``UserError`` as the command does. A result with scored options has their ``scores`` (log-probabilities in nats) and
    ``probabilities`` (normalised over the options); a result with generated text has ``text``.
    """

    evaluator_class, config_class, field = Evaluator, AnswerConfig, "instruction"

    def predict(
        self, examples: Sequence[Mapping | str], task: str | None = None, mode: str | None = None
    ) -> list[dict]:
        """As ``evaluation.Predictor.predict``.

        mode: ``score``, ``generate``, or None: score questions with options and generate for free text.
        """
        if mode not in (None, *PROTOCOLS):
            raise UserError(f"mode must be one of {', '.join(PROTOCOLS)}, or None, not {mode!r}")
        return super().predict(examples, task, mode=mode)


def predict(config: PredictConfig) -> None:
    """Answer every example of the input file that has no answer yet, then write the complete output file."""
    evaluation.predict(Evaluator(config), config.mode or "score, generate for free text", mode=config.mode)
