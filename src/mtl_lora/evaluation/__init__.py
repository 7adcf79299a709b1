"""Evaluation and prediction for any system: answer questions, resume after a kill, write ``results.json``.

A system's ``Evaluator`` provides the model and its answers. Each answer is appended as one JSON line as soon as it is
given, so a killed run can resume. Several processes share the questions.
"""

from mtl_lora.evaluation.evaluator import (
    Evaluator,
    Question,
    QuestionSets,
    generate,
    inputs,
    likeliest,
    load_questions,
    not_finite,
)
from mtl_lora.evaluation.run import Predictions, Predictor, evaluate, predict

__all__ = [
    "Evaluator",
    "Predictions",
    "Predictor",
    "Question",
    "QuestionSets",
    "evaluate",
    "generate",
    "inputs",
    "likeliest",
    "load_questions",
    "not_finite",
    "predict",
]
