"""``mtl-lora predict`` and ``Predictor``: the answers of a trained adapter, or of a base model alone, to any examples.

An example is a JSON object with ``instruction`` (and ``input``), and ``task`` or ``task_id`` where several tasks are
mixed; its other fields are kept. A result has ``index`` (its place, from 0), the example's other fields, ``task`` and
``answer``; where options were scored, ``scores`` (log-probabilities in nats) and ``probabilities`` (among the
options) by option; where text was generated, ``text``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtl_lora import evaluation
from mtl_lora.errors import UserError
from mtl_lora.language.config import PROTOCOLS, AnswerConfig, PredictConfig
from mtl_lora.language.evaluator import Evaluator
from mtl_lora.language.examples import parse_example
from mtl_lora.language.questions import Question, encode_questions


class Predictor:
    """Answers examples in Python; the model is loaded with the first of them.

        predictor = Predictor("output/run")
        predictor.predict([{"instruction": "Is the sky blue?"}], task="boolq")
        # [{"index": 0, "task": "boolq", "answer": "true", "scores": {...}, "probabilities": {...}}]

    checkpoint: folder of an adapter, which names its base model, prompt and tasks. flags: any other flag of
    ``mtl-lora predict`` (``base_model``, ``peft``, ``tasks_file``, ``dtype``, ``batch_size`` ...), by name. Raises
    ``UserError`` as the command does.
    """

    def __init__(self, checkpoint: str | Path | None = None, **flags):
        path = None if checkpoint is None else str(checkpoint)
        self.evaluator = Evaluator(AnswerConfig(checkpoint=path, **flags))

    def predict(
        self, examples: Sequence[Mapping | str], task: str | None = None, mode: str | None = None
    ) -> list[dict]:
        """One result per example, in their order; a string is an instruction alone.

        task: of all examples that name none. mode: ``score``, ``generate``, or None: score where there are options.
        """
        if mode not in (None, *PROTOCOLS):
            raise UserError(f"mode must be one of {', '.join(PROTOCOLS)}, or None, not {mode!r}")
        values = [{"instruction": example} if isinstance(example, str) else dict(example) for example in examples]
        by_protocol = _questions(values, self.evaluator, task, mode, "the examples")
        return evaluation.answers(self.evaluator, by_protocol, _result)


def run(config: PredictConfig) -> None:
    """Answer every example of the input file that has no answer yet, then write the output file whole.

    Until then the answers lie in ``<output>.partial``, from which the same command resumes.
    """
    config.check_files()
    evaluator = Evaluator(config)

    def ask(values: Sequence[object], source: str) -> dict[str, list[Question]]:
        return _questions(values, evaluator, config.task, config.mode, source)

    evaluation.predict(evaluator, ask, config.mode or "score, generate for free text", _result)


def _questions(
    values: Sequence[object], evaluator: Evaluator, task: str | None, mode: str | None, source: str
) -> dict[str, list[Question]]:
    """The questions by the protocol that answers them, prepared; raises ``UserError`` naming source and example."""
    tasks = evaluator.tasks
    examples = evaluation.inputs(parse_example, values, source, tasks, task)
    by_protocol: dict[str, list[Question]] = {}
    for question in encode_questions(examples, tasks, evaluator.encoder, source) if examples else ():
        protocol = mode or ("score" if question.options else "generate")
        by_protocol.setdefault(protocol, []).append(question)
    evaluator.prepare(by_protocol)
    return by_protocol


def _result(question: Question, line: Mapping) -> dict:
    """What is returned for an example, from its prediction line."""
    return evaluation.result_of(question, line, question.options)
