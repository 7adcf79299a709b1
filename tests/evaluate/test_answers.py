"""Answer extraction and figures, without a model."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_lora.evaluate.answers import average, extract_answer, standard_error, summarise_task
from mtl_lora.tasks import COMMONSENSE, Task

texts = st.text(alphabet=st.sampled_from("aenoprstuw 0123456789\n.,:"), max_size=60)


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("piqa", " the correct answer is solution2.", "solution2"),
        ("social_i_qa", "answer5", "answer5"),  # LLM-Adapters' pattern has five answers for every answer task
        ("hellaswag", "ending4 and ending1", "ending4"),
        ("winogrande", "Option1", ""),
        ("ARC-Easy", "the answer is 1", ""),
        ("openbookqa", "answer12", "answer1"),
        ("boolq", "", ""),
    ],
)
def test_the_first_match_of_the_pattern_is_the_answer(task, text, answer):
    assert extract_answer(COMMONSENSE[task], text) == answer


@given(st.sampled_from(COMMONSENSE.names), texts, texts)
def test_an_option_in_the_text_is_found_unless_another_stands_before_it(name, before, after):
    task = COMMONSENSE[name]
    for option in task.options:
        found = extract_answer(task, before + option + after)
        assert found
        assert re.fullmatch(task.answer_pattern, found)
        if not re.search(task.answer_pattern, before + option[:-1]):
            assert found.startswith(option[:-1])


@given(st.sampled_from(COMMONSENSE.names), texts)
def test_what_is_found_stands_in_the_text_and_nothing_is_made_up(name, text):
    found = extract_answer(COMMONSENSE[name], text)
    assert found in text
    assert bool(found) == bool(re.search(COMMONSENSE[name].answer_pattern, text.strip()))


def test_options_with_signs_that_mean_something_in_a_pattern_are_found_as_they_are():
    task = Task("math", 0, ("x+y", "x*y"))
    assert extract_answer(task, "the correct answer is x*y") == "x*y"


def test_free_text_is_the_first_line_without_the_prefix():
    task = Task("free", 0)
    assert extract_answer(task, " the correct answer is a red kite\nand more") == "a red kite"
    assert extract_answer(task, "\n") == ""


@given(st.integers(1, 400), st.data())
def test_the_standard_error_is_that_of_the_mean_of_zeros_and_ones(total, data):
    correct = data.draw(st.integers(0, total))
    values = [1.0] * correct + [0.0] * (total - correct)
    mean = sum(values) / total
    variance = sum((value - mean) ** 2 for value in values) / total
    assert standard_error(correct, total) == pytest.approx(math.sqrt(variance / total))


def record(answer, parsed, kind=None):
    return {"answer": answer, "parsed": parsed, "correct": answer == parsed, **({"kind": kind} if kind else {})}


def test_a_summary_counts_right_unparsed_and_most_frequent_answers():
    records = [record("a", "a", "easy"), record("a", "b", "hard"), record("b", "", "hard"), record("a", "a", "easy")]
    summary = summarise_task(records)
    assert (summary["accuracy"], summary["n"], summary["correct"]) == (0.5, 4, 2)
    assert (summary["unparsed"], summary["majority"]) == (0.25, 0.75)
    assert summary["predicted"] == {"": 1, "a": 2, "b": 1}
    assert {kind: group["accuracy"] for kind, group in summary["groups"].items()} == {"easy": 1.0, "hard": 0.0}


def test_the_average_gives_every_task_the_same_weight_whatever_its_size():
    small, large = summarise_task([record("a", "a")] * 2), summarise_task([record("a", "b"), record("a", "a")] * 50)
    result = average([small, large])
    assert result["accuracy"] == 0.75
    assert result["stderr"] == pytest.approx(math.sqrt(0.05**2) / 2)
    assert "groups" not in result
