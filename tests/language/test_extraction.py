"""Answer extraction and metrics, without a model."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.language.evaluate import Evaluator, Question
from mtl_lora.language.examples import Example
from mtl_lora.language.tasks import COMMONSENSE, Task, extract_answer, strict_answer

few = settings(max_examples=30, deadline=None)
texts = st.text(alphabet=st.sampled_from("aenoprstuw 0123456789\n.,:"), max_size=60)


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "untrue, so the correct answer is false", "true"),
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


@few
@given(st.sampled_from(COMMONSENSE.names), texts, texts)
def test_an_option_in_the_text_is_found_unless_another_stands_before_it(name, before, after):
    task = COMMONSENSE[name]
    for option in task.options:
        found = extract_answer(task, before + option + after)
        assert found
        assert re.fullmatch(task.answer_pattern, found)
        if not re.search(task.answer_pattern, before + option[:-1]):
            assert found.startswith(option[:-1])


@few
@given(st.sampled_from(COMMONSENSE.names), texts)
def test_what_is_found_stands_in_the_text_and_nothing_is_made_up(name, text):
    found = extract_answer(COMMONSENSE[name], text)
    assert found in text
    assert bool(found) == bool(re.search(COMMONSENSE[name].answer_pattern, text.strip()))


LETTERS, YES, NUMBERS = ("A", "B", "C", "D"), ("no", "yes"), ("1", "2", "3", "10")
MOODS = ("negative", "very negative", "neutral")


@pytest.mark.parametrize(
    ("options", "text", "answer"),
    [
        (LETTERS, "Answer: B", "B"),
        (LETTERS, "Answer:B", "B"),
        (LETTERS, "Antwort: C", "C"),
        (LETTERS, "(b)", "B"),
        (LETTERS, "The answer is D. Madrid", "D"),
        (LETTERS, "A dog and I, so C", "C"),
        (LETTERS, "I think it is a cat", ""),
        (YES, "I do not know, yes", "yes"),
        (YES, "yesterday", ""),
        (YES, "Yes.", "yes"),
        (YES, "no-one, or No. The correct answer is yes", "yes"),
        (NUMBERS, "the correct answer is 12", ""),
        (NUMBERS, "In 1999 it was 3.", "3"),
        (NUMBERS, "-1 or 1.5", ""),
        (NUMBERS, "10", "10"),
        (MOODS, "very negative", "very negative"),
        (MOODS, "non-negative", ""),
        (("C", "C++", "C#"), "C#, not C", "C#"),
        (("ja", "nein"), "答案ja", "ja"),
        ((" yes", " no"), "yes", " yes"),
        ((" yes", " no"), "the correct answer is no", " no"),
        (("true", "false"), "untrue, so false", "false"),  # of BoolQ, where LLM-Adapters' pattern finds true
        (("true", "false"), "False. It is not true that cats fly.", "false"),
        (YES, "Yes, there is no difference.", "yes"),
        (("happy", "sad"), "The correct answer is HAPPY, not sad.", "happy"),
        (MOODS, "Very Negative", "very negative"),
        (("May", "June"), "It may be June", "June"),
        (("a", "b", "c"), "it is a cat, so b", "b"),
        (("a", "b", "c"), "a) the cat", "a"),
    ],
)
def test_options_of_ones_own_tasks_are_found_as_whole_words_and_numbers_first_behind_the_prefix(options, text, answer):
    assert extract_answer(Task("own", 0, options), text) == answer
    assert Task("own", 0, options).extraction == 5
    assert {task.extraction for task in COMMONSENSE} == {1}


@pytest.mark.parametrize("text", ["yes", " yes.", "the correct answer is yes"])
def test_white_space_around_an_option_counts_for_nothing_in_a_text(text):
    task = Task("own", 0, (" yes", " no"), answer_prefix="the correct answer is")
    assert strict_answer(task, task.options, text) == extract_answer(task, text) == " yes"


def test_options_with_signs_that_mean_something_in_a_pattern_are_found_as_they_are():
    task = Task("math", 0, ("x+y", "x*y"))
    assert extract_answer(task, "the correct answer is x*y") == "x*y"


def test_a_task_of_ones_own_with_the_name_of_another_is_read_as_ones_own():
    own = Task("boolq", 0, ("no", "yes"))
    assert not own.is_matched_by_pattern and extract_answer(own, "I know: yes") == "yes"
    assert Task("sum", 0, ("1", "2"), answer_prefix="of 1 and 2 it is ").extraction == 5


@pytest.mark.parametrize("options", [("correct", "incorrect"), ("answer", "no answer")])
def test_options_that_the_prefix_holds_are_not_read_out_of_it(options):
    task = Task("own", 0, options)
    assert task.extraction == 5
    for text in ("", " unclear", " the correct answer is"):
        assert extract_answer(task, f"the correct answer is{text}") == ""
    for option in options:
        assert extract_answer(task, f"the correct answer is the correct answer is {option}") == option
        assert extract_answer(task, f"{option}, I think") == option


@pytest.mark.parametrize(
    ("prefix", "text", "answer"),
    [
        ("The answer, yes or no, is ", "Not no. The answer, yes or no, is yes.", "yes"),
        ("The answer, yes or no, is ", "No. The answer, yes or no, is that.", "no"),
        ("The answer is ", "No. The answer is yes.", "yes"),
        ("The answer is ", "No. The answer is that.", "no"),
    ],
)
def test_an_answer_stands_behind_the_prefix_or_else_before_it(prefix, text, answer):
    assert extract_answer(Task("own", 0, YES, answer_prefix=prefix), text) == answer


@pytest.mark.parametrize(
    ("prefix", "options", "text", "answer"),
    [
        ("is ", ("Paris", "London"), "This is Paris", "Paris"),
        ("A: ", ("NBA: finals", "other"), "A: NBA: finals", "NBA: finals"),
        ("Label ", ("Label 1", "Label 2"), "Label Label 2", "Label 2"),
        ("the correct answer is ", ("Yes", "No"), "the correct answer is yes. the correct answer is No", "No"),
    ],
)
def test_prefixes_that_hold_no_option_are_taken_from_texts_as_before(prefix, options, text, answer):
    assert extract_answer(Task("own", 0, options, answer_prefix=prefix), text) == answer


@pytest.mark.parametrize(
    ("prefix", "version"), [(" Answer: ", 5), ("Answer:\n", 5), ("\nAnswer: ", 5), ("Answer: ", 1), ("", 1)]
)
def test_white_space_around_a_prefix_is_no_part_of_free_text(prefix, version):
    task = Task("free", 0, answer_prefix=prefix, metric="accuracy")
    assert extract_answer(task, f"{prefix}42\nand more") == "42" and task.extraction == version
    assert Task("free", 0, answer_prefix=prefix).extraction == 5  # compared as free text


def test_free_text_is_the_first_line_without_the_prefix():
    task = Task("free", 0)
    assert extract_answer(task, " the correct answer is a red kite\nand more") == "a red kite"
    assert extract_answer(task, "\n") == extract_answer(task, "the correct answer is \nfoo") == ""


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
def test_strict_extraction_takes_nothing_but_an_option(text, answer):
    task = COMMONSENSE["ARC-Easy"]
    assert strict_answer(task, task.options[:4], text) == answer


@few
@given(st.sampled_from(COMMONSENSE.names), texts)
def test_an_answer_extracted_strictly_is_found_by_the_pattern_too(name, text):
    task = COMMONSENSE[name]
    strict = strict_answer(task, task.options, text)
    assert strict == "" or extract_answer(task, text) == strict


@few
@given(st.sampled_from(COMMONSENSE.names), st.data())
def test_the_answer_that_training_shows_is_extracted_alike_both_ways(name, data):
    task = COMMONSENSE[name]
    option = data.draw(st.sampled_from(task.options))
    text = task.answer_prefix + option
    assert strict_answer(task, task.options, text) == option == extract_answer(task, text)


# ---- results ----

OPTIONS, FREE = Task("letters", 0, ("a", "b")), Task("free", 0)


def line(answer, parsed, kind=None, **more):
    line = {"answer": answer, "parsed": parsed, "correct": answer == parsed, **more}
    return line | ({"kind": kind} if kind else {})


def test_a_result_counts_right_unparsed_and_majority_answers():
    lines = [line("a", "a", "easy"), line("a", "b", "hard"), line("b", "", "hard"), line("a", "a", "easy")]
    result = Evaluator.task_result(OPTIONS, lines)
    assert (result.metric, result.value, result.stderr, result.n) == ("accuracy", 0.5, 0.25, 4)
    assert result.majority == 0.75
    assert result.measured == {"correct": 2, "unparsed": 0.25, "predicted": {"": 1, "a": 2, "b": 1}}
    assert {kind: (group.value, group.n) for kind, group in result.groups.items()} == {"easy": (1, 2), "hard": (0, 2)}


def test_a_result_has_the_other_measures_where_every_line_has_them():
    strict = Evaluator.task_result(OPTIONS, [line("a", "a", strict="a"), line("a", "a", strict="")]).others["strict"]
    assert (strict.value, strict.stderr, strict.n) == (0.5, pytest.approx(0.5 / math.sqrt(2)), 2)
    assert strict.measured == {"unparsed": 0.5}
    scored = Evaluator.task_result(OPTIONS, [line("a", "b", normalised="a"), line("b", "b", normalised="a")])
    assert scored.others["acc_norm"].value == 0.5
    assert Evaluator.task_result(OPTIONS, [line("a", "a")]).others == {}


@pytest.mark.parametrize(("metric", "correct"), [("", 3), ("accuracy", 1)])
def test_right_answers_of_free_text_are_those_that_its_metric_counts(metric, correct):
    task, said = Task("free", 0, metric=metric), ["paris", "the dog", "London"]
    lines = []
    for answer, text in zip(["Paris", "dog", "London"], said, strict=True):
        question = Question(task, Example("Which?", "", answer, answer, 0, 0), [], "")
        lines.append(question.line(question.answer_in(text)))
    result = Evaluator.task_result(task, lines)
    assert (result.value, result.measured["correct"]) == (pytest.approx(correct / 3), correct)


def test_a_task_names_the_metric_that_decides_its_result():
    lines = [line("red kite", "red", f1=2 / 3), line("red kite", "the red kite.", f1=1.0)]
    result = Evaluator.task_result(FREE, lines)
    assert (result.metric, result.value) == ("exact_match", 0.5)
    assert result.measured["f1"] == pytest.approx(5 / 6)
    result = Evaluator.task_result(Task("free", 0, metric="f1"), lines)
    assert (result.metric, result.value) == ("f1", pytest.approx(5 / 6))
