"""How many questions a second: our two protocols against one question at a time without a cache.

    python benchmark/evaluate.py --checkpoint output/quickstart/checkpoint --data_dir data/commonsense/test

A tuned checkpoint, questions of all its tasks, one process: both sides use the same model object, dtype and threads and
take turns. The baseline is baselines/one_at_a_time.py.
"""

import random
from pathlib import Path

import torch
from baselines import one_at_a_time
from measure import count, keep, markdown_table, parser, ratio, rounds, shown, spread

from mtl_lora.errors import user_errors_to_exit_code
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import Evaluator
from mtl_lora.language.metrics import extract_answer
from mtl_lora.language.questions import Question, load_questions


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("checkpoint", "folder of a trained adapter", required=True)
    flags.add_flag("data_dir", "folder with <task>/test.json", default="data/commonsense/test")
    flags.add_flag("questions", "of each task for our side (the baseline: an eighth)", type=count, default=64)
    flags.add_flag("rounds", "turns of every side", type=count, default=5)
    flags.add_flag("dtype", "of the base model", default="auto")
    arguments = flags.parse_args()
    evaluation = Evaluator(
        EvalConfig(
            checkpoint=arguments.checkpoint,
            data_dir=arguments.data_dir,
            mode="both",
            dtype=arguments.dtype,
            max_new_tokens=8,
        )
    )
    questions = load_questions(arguments.data_dir, evaluation.tasks, [], evaluation.encoder).questions
    evaluation.prepare({"generate": questions, "score": questions})
    evaluation.load()
    chosen = sample(questions, arguments.questions)
    few = sample(questions, max(arguments.questions // 8, 1))
    rates = rounds(
        {
            "one at a time, no cache": lambda: baseline(evaluation, few),
            "generate": lambda: ours(evaluation, chosen, "generate"),
            "score": lambda: ours(evaluation, chosen, "score"),
        },
        arguments.rounds,
    )
    same = agreement(evaluation, few)
    first, *others = rates
    results = {name: {"questions/s": spread(values)} for name, values in rates.items()}
    for name in others:
        results[name]["ratio"] = ratio(rates[name], rates[first])
    lines = [
        [name, shown(one["questions/s"]), shown(one["ratio"], 1) if "ratio" in one else "1"]
        for name, one in results.items()
    ]
    text = markdown_table(["evaluation", "questions/s", "ratio"], lines)
    text += (
        f"\n\n{arguments.questions} questions of each of {len(evaluation.tasks)} tasks, {evaluation.base_model.name}, "
        f"{evaluation.model.dtype}; median (smallest to largest) of {arguments.rounds} rounds. Generated answers equal "
        f"the baseline's on {same[0]} of {same[1]} questions."
    )
    keep(
        Path(__file__).stem,
        text,
        {"questions": arguments.questions, "dtype": str(evaluation.model.dtype), "sides": results},
        arguments.results,
    )


def sample(questions: list[Question], count: int) -> list[Question]:
    """``count`` questions of each task, drawn by a fixed seed."""
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task.name, []).append(question)
    return [question for rows in by_task.values() for question in random.Random(0).sample(rows, min(count, len(rows)))]


def baseline(evaluation: Evaluator, questions: list[Question]) -> int:
    for question in questions:
        one_at_a_time.answer(evaluation.model, evaluation.encoder.tokenizer, question)
    return len(questions)


def ours(evaluation: Evaluator, questions: list[Question], protocol: str) -> int:
    for batch in evaluation.batches(questions):
        evaluation.answer(batch, protocol)
    return len(questions)


def agreement(evaluation: Evaluator, questions: list[Question]) -> tuple[int, int]:
    """On how many of the questions the answers found in generated text are the baseline's."""
    found = {}
    for batch in evaluation.batches(questions):
        found |= {one.key: line for one, line in zip(batch, evaluation.answer(batch, "generate"), strict=True)}
    same = [
        extract_answer(one.task, one_at_a_time.answer(evaluation.model, evaluation.encoder.tokenizer, one))
        == found[one.key]["parsed"]
        for one in questions
    ]
    return sum(same), len(same)


if __name__ == "__main__":
    torch.manual_seed(0)
    with user_errors_to_exit_code():
        main()
