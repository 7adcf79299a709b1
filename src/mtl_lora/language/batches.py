"""Questions to batches: one task a batch, rows of similar length, the same for any number of processes."""

from collections.abc import Sequence

from mtl_lora.language.config import AUTO
from mtl_lora.language.questions import Question

TOKEN_BUDGET = 2048  # tokens of a batch with --batch_size auto on a CPU, where larger ones are no faster
GPU_TOKEN_BUDGET = 65536


def plan_batches(questions: Sequence[Question], batch_size: int | str, token_budget: int) -> list[list[Question]]:
    """Batches of at most ``batch_size`` questions, or with ``auto`` of at most ``token_budget`` prompt tokens.

    Each holds questions of one task, the longest first, so that it shares its opening tokens and wastes little on
    padding; a batch has one question at least.
    """
    batches = []
    by_task: dict[int, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task.id, []).append(question)
    for rows in by_task.values():
        rows.sort(key=lambda question: (-len(question.prompt_ids), question.key))
        start = 0
        while start < len(rows):
            longest = len(rows[start].prompt_ids)
            size = max(token_budget // longest, 1) if batch_size == AUTO else batch_size
            batches.append(rows[start : start + size])
            start += size
    return batches
