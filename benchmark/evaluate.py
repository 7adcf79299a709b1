"""Questions a second of our two protocols, against one question at a time without a cache.

    python benchmark/evaluate.py --checkpoint output/quickstart/checkpoint --data_dir data/commonsense/test

The checkpoint is a trained one, and the questions are of all its tasks. All sides run in one process and take turns,
with the same model object, dtype and threads. The baseline is baselines/one_at_a_time.py. The floor of ``score`` is a
side as well: the time of the tokens that must run, without any other work.
"""

import random
from pathlib import Path

import torch
from baselines import one_at_a_time
from measure import count, keep, markdown_table, parser, ratio, rounds, shown, spread

from mtl_lora.errors import user_errors_to_exit_code
from mtl_lora.evaluation import load_questions
from mtl_lora.language.answering import continuations
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import Evaluator, Question
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import extract_answer


def main() -> None:
    flags = parser(__doc__)
    flags.add_flag("checkpoint", "folder of a trained adapter", required=True)
    flags.add_flag("data_dir", "folder with <task>/test.json", default="data/commonsense/test")
    flags.add_flag("questions", "questions per task for our side (the baseline gets an eighth)", type=count, default=64)
    flags.add_flag("rounds", "turns of every side", type=count, default=5)
    flags.add_flag("dtype", "of the base model", default="auto")
    arguments = flags.parse_args()
    evaluator, asked = prepared(arguments.checkpoint, arguments.data_dir, arguments.dtype)
    chosen = sample(asked, arguments.questions)
    few = sample(asked, max(arguments.questions // 8, 1))
    rates = rounds(
        {
            "one at a time, no cache": lambda: baseline(evaluator, few),
            "generate": lambda: ours(evaluator, chosen, "generate"),
            "score": lambda: ours(evaluator, chosen, "score"),
            "floor of score": lambda: floor(evaluator, chosen),
        },
        arguments.rounds,
    )
    same = agreement(evaluator, few)
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
        f"\n\n{arguments.questions} questions of each of {len(evaluator.tasks)} tasks, {evaluator.base_model.name}, "
        f"{evaluator.model.dtype}; median (smallest to largest) of {arguments.rounds} rounds. Generated answers equal "
        f"the baseline's on {same[0]} of {same[1]} questions."
    )
    keep(__file__, text, {"dtype": str(evaluator.model.dtype), "sides": results}, arguments)


def prepared(checkpoint: str | Path, data_dir: str | Path, dtype: str) -> tuple[Evaluator, list[Question]]:
    """Return an evaluator with its model loaded, and the questions of all its tasks."""
    flags = {"mode": "both", "dtype": dtype, "max_new_tokens": 8, "data_dir": str(data_dir)}
    config = EvalConfig(checkpoint=str(checkpoint), **flags)
    evaluator = Evaluator(config)
    asked = load_questions(evaluator, load_examples).questions
    evaluator.prepare(dict.fromkeys(config.protocols, asked))
    evaluator.load()
    return evaluator, asked


def sample(questions: list[Question], count: int) -> list[Question]:
    """Return ``count`` questions of each task, drawn with a fixed seed."""
    by_task: dict[str, list] = {}
    for question in questions:
        by_task.setdefault(question.task.name, []).append(question)
    return [question for rows in by_task.values() for question in random.Random(0).sample(rows, min(count, len(rows)))]


def baseline(evaluator: Evaluator, questions: list[Question]) -> int:
    for question in questions:
        one_at_a_time.answer(evaluator.model, evaluator.encoder.tokenizer, question)
    return len(questions)


def ours(evaluator: Evaluator, questions: list[Question], protocol: str) -> int:
    for batch in evaluator.batches(questions, protocol):
        evaluator.answer(batch, protocol)
    return len(questions)


@torch.inference_mode()
def floor(evaluator: Evaluator, questions: list[Question]) -> int:
    """Run the tokens that scoring must run, as rows of equal length without padding or cache, projecting one position.

    These are each task's prefix once, the rest of each prompt, the tokens that its options share, and the options
    without their last tokens.
    """
    tasks = {question.task.id for question in questions}
    tokens = sum(len(evaluator.prefixes.get(task, ())) for task in tasks)
    for question in questions:
        shared, own = continuations(question, evaluator.encoder)
        rest = len(question.prompt_ids) - len(evaluator.prefixes.get(question.task.id, ()))
        tokens += rest + len(shared) + sum(len(option) - 1 for option in own)
    length = max(tokens // len(questions), 1)
    rows = max(evaluator.token_budget // length, 1)
    for start in range(0, len(questions), rows):
        ids = torch.randint(evaluator.model.config.vocab_size, (min(rows, len(questions) - start), length))
        ids = ids.to(evaluator.model.device)
        evaluator.model(input_ids=ids, task_ids=[0] * len(ids), logits_to_keep=1, use_cache=False)
    return len(questions)


def agreement(evaluator: Evaluator, questions: list[Question]) -> tuple[int, int]:
    """Return (same, all): the number of questions whose extracted answer is the baseline's, and of all questions."""
    same = [
        extract_answer(one.task, one_at_a_time.answer(evaluator.model, evaluator.encoder.tokenizer, one))
        == line["parsed"]
        for batch in evaluator.batches(questions, "generate")
        for one, line in zip(batch, evaluator.answer(batch, "generate"), strict=True)
    ]
    return sum(same), len(same)


if __name__ == "__main__":
    torch.manual_seed(0)
    with user_errors_to_exit_code():
        main()
