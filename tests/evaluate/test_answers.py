"""Answer extraction and figures, without a model."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_lora.language.metrics import (
    average,
    exact_match,
    extract_answer,
    standard_error,
    strict_answer,
    summarise_task,
    token_f1,
)
from mtl_lora.language.tasks import COMMONSENSE, Task

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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the correct answer is answer1", "answer1"),
        (" answer4.\n", "answer4"),
        ("the correct answer is answer12", ""),
        ("not answer1", ""),
        ("answer1 answer2", ""),
        ("Answer1", ""),
        ("answer5", ""),  # not one of this record's
        ("", ""),
    ],
)
def test_the_strict_reading_takes_nothing_but_an_option(text, answer):
    task = COMMONSENSE["ARC-Easy"]
    assert strict_answer(task, task.options[:4], text) == answer


@given(st.sampled_from(COMMONSENSE.names), texts)
def test_whatever_is_read_strictly_the_pattern_finds_too(name, text):
    task = COMMONSENSE[name]
    strict = strict_answer(task, task.options, text)
    assert strict == "" or extract_answer(task, text) == strict


@given(st.sampled_from(COMMONSENSE.names), st.data())
def test_the_answer_that_training_shows_is_read_alike_both_ways(name, data):
    task = COMMONSENSE[name]
    option = data.draw(st.sampled_from(task.options))
    text = task.answer_prefix + option
    assert strict_answer(task, task.options, text) == option == extract_answer(task, text)


@pytest.mark.parametrize(
    ("text", "right", "f1", "exact"),
    [
        ("The red kite.", "red kite", 1.0, True),
        ("a red kite", "red kite flies", 0.8, False),
        ("red red", "red", 2 / 3, False),
        ("blue", "red", 0.0, False),
        ("", "red", 0.0, False),
        ("the", "", 1.0, True),
    ],
)
def test_free_text_is_compared_word_by_word(text, right, f1, exact):
    assert token_f1(text, right) == pytest.approx(f1)
    assert exact_match(text, right) == exact


words = st.lists(st.sampled_from(["red", "kite", "the", "sky", "a", "blue"]), max_size=6).map(" ".join)


@given(words, words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(text, right):
    given_words = [word for word in text.split() if word not in ("a", "the")]
    wanted = [word for word in right.split() if word not in ("a", "the")]
    shared, left = 0, list(wanted)
    for word in given_words:
        if word in left:
            left.remove(word)
            shared += 1
    if given_words and wanted and shared:
        precision, recall = shared / len(given_words), shared / len(wanted)
        assert token_f1(text, right) == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert token_f1(text, right) == float(not given_words and not wanted)
    assert token_f1(text, right) == pytest.approx(token_f1(right, text))


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


def test_a_summary_counts_the_other_readings_where_every_record_has_them():
    records = [record("a", "a") | {"strict": "a"}, record("a", "a") | {"strict": ""}]
    assert summarise_task(records)["strict"] == {
        **summarise_task(records[:1])["strict"],
        "accuracy": 0.5,
        "stderr": pytest.approx(0.5 / math.sqrt(2)),
        "n": 2,
        "correct": 1,
        "unparsed": 0.5,
    }
    scored = [record("a", "b") | {"normalised": "a"}, record("b", "b") | {"normalised": "a"}]
    assert summarise_task(scored)["normalised"]["accuracy"] == 0.5
    assert summarise_task([record("a", "b") | {"f1": 0.25}, record("a", "a") | {"f1": 1.0}])["f1"] == 0.625
    assert not {"strict", "normalised", "f1"} & summarise_task([record("a", "a")]).keys()


def test_the_average_gives_every_task_the_same_weight_whatever_its_size():
    small, large = summarise_task([record("a", "a")] * 2), summarise_task([record("a", "b"), record("a", "a")] * 50)
    result = average([small, large])
    assert result["accuracy"] == 0.75
    assert result["stderr"] == pytest.approx(math.sqrt(0.05**2) / 2)
    assert "groups" not in result
