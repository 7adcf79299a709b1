"""Questions, the batches in which they are answered, and the prompt prefix that they share."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.errors import UserError
from mtl_lora.evaluation import Evaluator
from mtl_lora.language.answering import shared_prefix
from mtl_lora.language.evaluate import Question
from mtl_lora.language.examples import Example
from mtl_lora.language.tasks import COMMONSENSE

few = settings(max_examples=30, deadline=None)
SIZES = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 60)), min_size=1, max_size=40)


class Row(int):
    """A question of as many tokens as its number."""

    class task:
        name = ""


class Halves(Evaluator):
    """An evaluator without a model."""

    build = task_result = answer = None

    def __init__(self):
        self.fitting = {}

    def tokens(self, question: Row, protocol: str) -> int:
        return int(question)


def in_halves(answer, rows: list[int], fitting: dict) -> list:
    evaluator = Halves()
    evaluator.fitting = fitting
    return evaluator.in_halves(answer, [Row(row) for row in rows], "")


def batched(made: list[Question], batch_size: int | str, budget: int) -> list[list[Question]]:
    evaluator = Halves()
    evaluator.config, evaluator.token_budget, evaluator.gpu_token_budget = (
        SimpleNamespace(batch_size=batch_size),
        budget,
        budget,
    )
    evaluator.tokens = lambda question, protocol: len(question.prompt_ids)
    return evaluator.batches(made, "")


def questions(sizes: list[tuple[int, int]]) -> list[Question]:
    return [
        Question(COMMONSENSE[task], Example("", "", "", "", task, index), list(range(length)), "")
        for index, (task, length) in enumerate(sizes)
    ]


@few
@given(SIZES, st.one_of(st.integers(1, 9), st.just("auto")), st.integers(10, 200))
def test_every_question_is_in_one_batch_of_its_task_the_longest_first(sizes, batch_size, budget):
    made = questions(sizes)
    batches = batched(made, batch_size, budget)
    assert sorted(question.key for batch in batches for question in batch) == sorted(one.key for one in made)
    for batch in batches:
        assert len({question.task.id for question in batch}) == 1
        lengths = [len(question.prompt_ids) for question in batch]
        assert lengths == sorted(lengths, reverse=True)
        if batch_size == "auto":
            assert len(batch) == 1 or len(batch) * lengths[0] <= budget
        else:
            assert len(batch) <= batch_size


@few
@given(SIZES)
def test_the_batches_do_not_depend_on_the_order_of_the_questions(sizes):
    made = questions(sizes)
    shuffled = random.Random(0).sample(made, len(made))
    planned = [[[one.key for one in batch] for batch in batched(given_, 4, 0)] for given_ in (made, shuffled)]
    assert sorted(planned[0]) == sorted(planned[1])


@few
@given(
    st.lists(st.integers(0, 3), max_size=20), st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=6)
)
def test_the_shared_prefix_is_what_all_begin_with_but_never_a_whole_prompt(start, rest):
    prompts = [start + row + [9] for row in rest]
    found = shared_prefix(prompts)
    length = 0
    while length < min(map(len, prompts)) - 1 and len({prompt[length] for prompt in prompts}) == 1:
        length += 1
    assert found == (prompts[0][:length] if length >= 8 else [])


@pytest.mark.parametrize("prompts", [[list(range(30))], [list(range(30))] * 3])
def test_equal_prompts_keep_their_last_token(prompts):
    assert shared_prefix(prompts) == list(range(29))


@pytest.mark.parametrize(
    ("change", "answered"),
    [
        ({}, True),
        ({"parsed": ...}, False),
        ({"parsed": None}, False),
        ({"parsed": ..., "text": "true"}, True),
        ({"prompt_sha256": "other"}, False),
        ({"prompt_sha256": ...}, False),
        ({"answer": "false"}, False),
    ],
)
def test_a_line_answers_its_question_only_if_it_says_what_was_answered(change, answered):
    question = Question(COMMONSENSE["boolq"], Example("q", "", "", "true", 0, 0), [1], "sha")
    line = {"prompt_sha256": "sha", "answer": "true", "parsed": "true", **change}
    assert question.answered_by({key: value for key, value in line.items() if value is not ...}) == answered
    assert not question.answered_by(None)


def test_a_scored_line_takes_the_group_that_its_question_has_now():
    question = Question(COMMONSENSE["boolq"], Example("q", "", "", "true", 0, 0, {"kind": "new"}), [1], "sha")
    before = question.line({"parsed": "false", "normalised": "true", "scores": {"true": -2.0, "false": -1.0}})
    assert question.extract_again({**before, "kind": "old"}) == before and before["kind"] == "new"


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 200))
def test_a_batch_that_does_not_fit_in_memory_is_answered_in_parts_in_its_order(rows, fits):
    """A row is its tokens."""
    answered, failed, fitting = [], [], {}

    def answer(part):
        if len(part) * max(part) > fits:
            failed.append(part)
            raise torch.OutOfMemoryError("CUDA out of memory")
        answered.append(part)
        return [row + 1 for row in part]

    assert in_halves(answer, rows, fitting) == [row + 1 for row in rows]
    assert [row for part in answered for row in part] == rows
    failed.clear()
    assert in_halves(answer, rows, fitting) == [row + 1 for row in rows] and not failed


def test_shorter_questions_are_answered_in_larger_batches_though_longer_ones_did_not_fit():
    parts, fitting = [], {}

    def answer(part):
        if sum(part) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        parts.append(len(part))
        return part

    for rows in ([40] * 4, [5] * 16):
        in_halves(answer, rows, fitting)
    assert parts == [2, 2, 16]


def test_a_question_too_large_for_the_memory_is_said_in_one_sentence():
    def answer(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="does not hold a single question"):
        in_halves(answer, [1, 2, 3], {})
