"""Comparing two runs: the numbers, which runs are not comparable, and broken predictions."""

import math
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paired_runs import outcomes, predictions_of, write_lines, write_run
from report_records import TWO_TASKS, changed

from mtl_lora.errors import UserError
from mtl_lora.report.compare import Comparison, compare
from mtl_lora.report.results import read_results

RIGHT_A = {"first": outcomes("1100"), "second": outcomes("10")}
RIGHT_B = {"first": outcomes("1011"), "second": outcomes("11")}


@pytest.fixture
def compared(tmp_path):
    """Compare two sets of prediction records, the second run's results changed in ``places``."""

    def run(a, b, resamples=200, seed=0, **places) -> Comparison:
        folders = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b, **places)
        return compare(*map(read_results, folders), seed=seed, resamples=resamples)

    return run


def interval(change) -> tuple[float, float]:
    return change.low, change.high


# ---- the numbers ----


def test_rows_count_pairs_and_the_average_weighs_tasks_equally(compared):
    comparison = compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B))
    first, second = comparison.rows
    assert (first.task.name, first.n, first.accuracy.a, first.accuracy.b) == ("first", 4, 0.5, 0.75)
    assert (first.accuracy.difference, first.only_a, first.only_b, first.p) == (0.25, 1, 2, 1.0)
    assert (second.task.name, second.n, second.only_a, second.only_b, second.p) == ("second", 2, 0, 1, 1.0)
    average = comparison.average
    assert (average.n, average.accuracy.a, average.accuracy.b) == (6, 0.5, 0.875)
    # Pooled: 1 against 3 of 4 discordant pairs, 2 (1 + 4) / 16.
    assert (average.only_a, average.only_b, average.p) == (1, 3, 0.625)
    assert average.f1 is None and first.f1 is None


def test_rows_are_in_column_order_and_questions_are_paired_by_index(tmp_path):
    columns = {**TWO_TASKS, "columns": ["second", "first"]}
    records = predictions_of(RIGHT_B)
    shuffled = {task: lines[::-1] for task, lines in records.items()}
    folders = write_run(tmp_path / "a", records, task_set=columns), write_run(tmp_path / "b", shuffled)
    comparison = compare(*map(read_results, folders), resamples=100)
    assert [row.task.name for row in comparison.rows] == ["second", "first"]
    assert all((row.only_a, row.only_b) == (0, 0) for row in comparison.rows)


def test_equal_runs_have_no_difference_and_no_spread(compared):
    comparison = compared(predictions_of(RIGHT_A), predictions_of(RIGHT_A))
    for row in (*comparison.rows, comparison.average):
        assert (row.accuracy.difference, *interval(row.accuracy), row.p) == (0, 0, 0, 1)


def test_a_constant_shift_has_no_spread(compared):
    low, high = ({"first": [0.25, 0.5, 0.75, 0], "second": [0.5, 0.25]}, {"first": [0.5, 0.75, 1, 0.25]})
    high["second"] = [0.75, 0.5]
    comparison = compared(predictions_of(RIGHT_A, low), predictions_of(RIGHT_A, high))
    for row in (*comparison.rows, comparison.average):
        assert (row.f1.difference, *interval(row.f1)) == pytest.approx((0.25, 0.25, 0.25))
        assert row.accuracy.difference == 0
    assert (comparison.rows[0].f1.a, comparison.rows[1].f1.a) == (0.375, 0.375)


def test_f1_is_left_out_of_a_task_that_lacks_one_and_so_of_the_average(compared):
    whole, partly = {"first": [0.5] * 4, "second": [0.5, 1]}, {"first": [0.5] * 4, "second": [0.5]}
    comparison = compared(predictions_of(RIGHT_A, whole), predictions_of(RIGHT_A, partly))
    first, second = comparison.rows
    assert first.f1.difference == 0 and second.f1 is None and comparison.average.f1 is None
    assert "No F1 for second, nor on average: not every prediction has one." in comparison.notes


def test_average_interval_resamples_within_each_task(compared):
    # Of many questions the interval is the normal one, with the variances of the tasks' means added over T^2.
    a = {"first": [True] * 900, "second": [False] * 100}
    b = {"first": [index % 10 != 0 for index in range(900)], "second": [index % 4 == 0 for index in range(100)]}
    comparison = compared(predictions_of(a), predictions_of(b), resamples=20_000)
    differences = [[y - x for x, y in zip(a[task], b[task], strict=True)] for task in a]
    half = 1.96 * math.sqrt(sum(statistics.pvariance(task) / len(task) for task in differences)) / 2
    assert comparison.average.accuracy.difference == pytest.approx((-0.1 + 0.25) / 2)
    assert interval(comparison.average.accuracy) == pytest.approx((0.075 - half, 0.075 + half), abs=0.004)


def test_tasks_are_resampled_independently_of_each_other(compared):
    # Drawn alike, two tasks with the same answers would make the average no more certain than either of them.
    a, b = {}, {}
    for task in ("first", "second"):
        a[task], b[task] = [True] * 400, [index % 2 == 0 for index in range(400)]
    comparison = compared(predictions_of(a), predictions_of(b), resamples=5000)
    widths = [row.accuracy.high - row.accuracy.low for row in (*comparison.rows, comparison.average)]
    assert widths[2] == pytest.approx(widths[0] / math.sqrt(2), rel=0.1)
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_interval_of_a_task_depends_on_seed_and_not_on_other_tasks(compared):
    f1 = [index / 50 for index in range(50)], [(index * 7 % 50) / 50 for index in range(50)]
    flags = [True] * 50
    both = [predictions_of({"first": flags, "second": flags}, {"first": one, "second": one}) for one in f1]
    alone = [{"second": records["second"]} for records in both]
    rows = [compared(*both).rows[1], compared(*both, seed=1).rows[1], compared(*alone).rows[0]]
    assert rows[0] == rows[2]
    assert interval(rows[0].f1) != interval(rows[1].f1) and rows[0].f1.difference == rows[1].f1.difference


@given(answers=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), seed=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_swapping_the_runs_negates_every_difference(compared, answers, seed):
    sides = [{"first": [pair[side] for pair in answers[1:]], "second": [answers[0][side]]} for side in (0, 1)]
    records = [predictions_of(side, {task: list(map(float, side[task])) for task in side}) for side in sides]
    forth, back = compared(*records, seed=seed), compared(*records[::-1], seed=seed)
    for one, other in zip((*forth.rows, forth.average), (*back.rows, back.average), strict=True):
        assert (one.p, one.only_a, one.only_b) == (other.p, other.only_b, other.only_a) and 0 < one.p <= 1
        assert (one.accuracy.a, one.accuracy.b) == (other.accuracy.b, other.accuracy.a)
        assert interval(one.accuracy) == pytest.approx((-other.accuracy.high, -other.accuracy.low), abs=1e-12)
        assert one.accuracy.low <= one.accuracy.high
        assert one.f1 == one.accuracy  # the same numbers, resampled by the same stream


# ---- runs that are not comparable ----

OTHER_OPTIONS = changed(TWO_TASKS)
OTHER_OPTIONS["tasks"][0]["options"] = ["yes", "no"]


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ({"settings__mode": "score"}, "they differ in mode ('generate' and 'score')"),
        ({"settings__template": "plain"}, "template ('alpaca' and 'plain')"),
        ({"settings__cutoff_len": 512}, "cutoff_len (256 and 512)"),
        ({"settings__max_new_tokens": 8}, "max_new_tokens (32 and 8)"),
        ({"settings__num_beams": 4}, "num_beams (1 and 4)"),
        ({"settings__num_beams": ...}, "num_beams (1 and none)"),
        ({"settings__unheard_of": 1}, "unheard_of (none and 1)"),
        ({"settings__mode": "score", "settings__num_beams": 4}, "mode ('generate' and 'score'), num_beams (1 and 4)"),
        ({"data__second": "other"}, "test data of second are not the same"),
        ({"data": {"first": "x", "second": "y"}}, "test data of first, second are not the same"),
        ({"tasks__second": ...}, "there are scores of second in"),
        ({"task_set": OTHER_OPTIONS}, "other options, pattern or answer prefix of first"),
    ],
)
def test_other_protocol_data_or_tasks_are_not_comparable(compared, tmp_path, places, complaint):
    with pytest.raises(UserError) as caught:
        compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B), **places)
    results = [tmp_path / run / "results.json" for run in "ab"]
    assert str(caught.value).startswith(f"{results[0]} and {results[1]} are not comparable: ")
    assert complaint in str(caught.value)


def test_a_task_that_the_second_run_alone_scored_is_named(compared, tmp_path):
    with pytest.raises(UserError, match=r"there are scores of second in .*/b/results.json alone"):
        compared(predictions_of({"first": RIGHT_A["first"]}), predictions_of(RIGHT_B))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": "maybe"}, "question 1 of first has another right answer in each"),
        ({"prompt_sha256": "other"}, "question 1 of first has another prompt in each, with one base model"),
        ({"index": 7}, "is in one of them alone (limit 0 and 0)"),
    ],
)
def test_other_questions_are_not_comparable(compared, tmp_path, change, complaint):
    records = predictions_of(RIGHT_B)
    records["first"][1] |= change
    with pytest.raises(UserError) as caught:
        compared(predictions_of(RIGHT_A), records)
    assert "are not comparable: question 1 of first" in str(caught.value) and complaint in str(caught.value)
    assert f"{tmp_path / 'a' / 'predictions' / 'first.jsonl'}, line 2" in str(caught.value)


def test_question_of_the_second_run_alone_names_its_line_and_the_limits(compared, tmp_path):
    limited = {task: lines[:2] for task, lines in predictions_of(RIGHT_A).items()}
    with pytest.raises(UserError) as caught:
        compared(limited, predictions_of(RIGHT_B), settings__limit=4)
    place = f"{tmp_path / 'b' / 'predictions' / 'first.jsonl'}, line 3"
    assert f"question 2 of first ({place}) is in one of them alone (limit 0 and 4)" in str(caught.value)


def test_answers_beyond_the_limit_that_the_results_count_are_left_out(tmp_path):
    # A folder evaluated with limit 4, then again with limit 2, keeps all four lines.
    a, b = (write_run(tmp_path / run, predictions_of({"first": outcomes("1100")})) for run in "ab")
    fewer = {"accuracy": 1.0, "stderr": 0.0, "n": 2}
    two = [
        write_run(folder, predictions_of({"first": outcomes(flags)}), settings__limit=2, tasks__first=fewer)
        for folder, flags in ((a, "1100"), (b, "1111"))
    ]
    row = compare(*map(read_results, two), resamples=100).rows[0]
    assert (row.n, row.only_a, row.only_b) == (2, 0, 0)


def test_adapter_base_model_dtype_and_limit_may_differ_and_are_noted(compared):
    other_tasks = {"tasks": [{"name": name, "id": id} for id, name in enumerate(["new", "second", "first"])]}
    records = predictions_of(RIGHT_B)
    records["first"][0]["prompt_sha256"] = "other tokenizer"
    comparison = compared(
        predictions_of(RIGHT_A),
        records,
        base_model="other",
        task_set=other_tasks,
        settings__base_fingerprint="other",
        settings__adapter_sha256="adapter",
        settings__dtype="torch.float32",
        settings__batch_size=1,
        settings__limit=4,
    )
    assert comparison.rows[0].only_b == 2
    assert comparison.notes[-2:] == (
        "The base models differ: A smollm2-135m, B other.",
        "The dtypes differ: A torch.bfloat16, B torch.float32.",
    )


# ---- broken files ----


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        ({"settings": ...}, "settings.mode is missing"),
        ({"settings": 3}, "settings is 3; it must be an object"),
        ({"settings__template": None}, "settings.template is missing"),
        ({"settings__base_fingerprint": ...}, "settings.base_fingerprint is missing"),
        ({"data__first": ...}, "data.first is missing"),
        ({"tasks__first__n": 5}, "has 3 of 4 questions right where"),
        ({"tasks__first__n": 5, "tasks__first__accuracy": 0.6}, "counts 3 of 5; evaluate again"),
        ({"tasks__first__accuracy": 0.5}, "counts 2 of 4; evaluate again with --overwrite True"),
    ],
)
def test_results_without_what_a_comparison_needs_are_named(compared, tmp_path, places, complaint):
    with pytest.raises(UserError) as caught:
        compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B), **places)
    assert str(tmp_path / "b" / "results.json") in str(caught.value) and complaint in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ('{"task": "first", "index"', 'is \'{"task": "first", "index"\', not a whole JSON object'),
        ("", "is '', not a whole JSON object"),
        ("[]", "is '[]', not a whole JSON object"),
        ({"index": 0}, "answers question 0 a second time, after"),
        ({"task": "second"}, "is a prediction of the task 'second'; this file holds those of first"),
        ({"correct": ...}, "has no 'correct'; it must be true or false"),
        ({"correct": 1}, "'correct' is 1; it must be true or false"),
        ({"index": True}, "'index' is True; it must be a whole number from 0"),
        ({"index": -1}, "'index' is -1; it must be a whole number from 0"),
        ({"answer": None}, "'answer' is None; it must be a string"),
        ({"prompt_sha256": ...}, "has no 'prompt_sha256'; it must be a string"),
        ({"f1": 1.5}, "'f1' is 1.5; it must be a fraction from 0 to 1"),
        ({"f1": math.nan}, "'f1' is nan; it must be a fraction from 0 to 1"),
    ],
)
def test_a_broken_line_is_named(compared, tmp_path, change, complaint):
    a, b = (write_run(tmp_path / run, predictions_of(right)) for run, right in (("a", RIGHT_A), ("b", RIGHT_B)))
    path = b / "predictions" / "first.jsonl"
    lines = predictions_of(RIGHT_B)["first"]
    lines[2] = change if isinstance(change, str) else changed(lines[2], **change)
    write_lines(path, lines)
    with pytest.raises(UserError) as caught:
        compare(read_results(a), read_results(b))
    assert str(caught.value).startswith(f"{path}, line 3") and complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "can not be read (No such file"), (b"\xff\n", "are not UTF-8 text"), (b"", "has 0 of 0 questions right")],
)
def test_a_missing_or_unreadable_file_is_named(tmp_path, content, complaint):
    a, b = (write_run(tmp_path / run, predictions_of(RIGHT_A)) for run in "ab")
    path = b / "predictions" / "second.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        compare(read_results(a), read_results(b))
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_other_line_separators_of_unicode_end_no_line(compared):
    records = predictions_of(RIGHT_A)
    records["first"][0]["text"] = "one\u2028two\x85three"
    assert compared(records, predictions_of(RIGHT_B)).rows[0].n == 4
