"""Comparing two runs: statistics against slow versions of them, the numbers, which runs cannot be compared."""

import collections
import csv
import io
import itertools
import json
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_cases import (
    TWO_TASKS,
    assert_mistakes,
    changed,
    grid,
    outcomes,
    predictions_of,
    run_command,
    write_lines,
    write_run,
)

from mtl_lora.errors import UserError
from mtl_lora.estimates import bootstrap_means, mcnemar_p
from mtl_lora.metrics import p_text
from mtl_lora.predictions import check_comparable, differences
from mtl_lora.report.compare import compare
from mtl_lora.results import Results

RIGHT_A = {"first": outcomes("1100"), "second": outcomes("10")}
RIGHT_B = {"first": outcomes("1011"), "second": outcomes("11")}


class Numbers(dict):
    """A JSON object whose keys are attributes too."""

    __getattr__ = dict.__getitem__


def numbers(*arguments, **flags) -> Numbers:
    return json.loads(json.dumps(compare(*arguments, **flags).value), object_hook=Numbers)


@pytest.fixture
def compared(tmp_path):
    """Compare two sets of prediction records, the second run's results changed in ``places``."""

    def run(a, b, resamples=200, seed=0, **places) -> "Numbers":
        folders = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b, **places)
        return numbers(*map(Results.load, folders), seed=seed, resamples=resamples)

    return run


def interval(change) -> tuple[float, float]:
    return change.low, change.high


# ---- statistics ----


@pytest.mark.parametrize("n", range(11))
def test_mcnemar_is_the_proportion_of_equally_likely_outcomes(n):
    """Of all ways to hand n discordant questions to A or B, those that are at least as one-sided."""
    sums = [sum(way) for way in itertools.product((-1, 1), repeat=n)]
    for only_a in range(n + 1):
        exact = Fraction(sum(abs(total) >= abs(2 * only_a - n) for total in sums), len(sums))
        assert mcnemar_p(only_a, n - only_a) == pytest.approx(float(exact), rel=1e-12)


EXACT = 2 * sum(math.comb(2000, k) for k in range(901)) / 2**2000


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [
        # Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13:91), airway reactivity, as it is printed
        (1, 7, pytest.approx(0.070, abs=0.0005)),
        # R, exact2x2, mcnemar.exact on Agresti's approval ratings, as it is printed
        (86, 150, pytest.approx(3.716e-05, abs=0.0005e-05)),
        (900, 1100, pytest.approx(EXACT, rel=1e-9)),
        (500, 501, 1.0),
        (0, 100_000, math.ulp(0.0)),  # below the smallest float, and not zero
    ],
)
def test_mcnemar_gives_published_values_and_those_of_large_counts(only_a, only_b, expected):
    assert mcnemar_p(only_a, only_b) == mcnemar_p(only_b, only_a) == expected


@pytest.mark.parametrize("differences", [(1, 0, 0, -1, 1), (0.25, -0.5, 1, 0, -0.5), (0, 0, 0, 0, 1)])
@pytest.mark.slow
def test_bootstrap_has_the_distribution_of_all_resamples(differences):
    n = len(differences)
    every = collections.Counter(sum(drawn) for drawn in itertools.product(differences, repeat=n))
    means = bootstrap_means(differences, [0], 200_000)
    drawn = collections.Counter(round(mean * n, 9) for mean in means.tolist())
    assert len(means) == 200_000 and set(drawn) <= set(every)
    for total, count in every.items():
        p = count / n**n
        # Five standard errors of a proportion of 200,000 draws.
        assert drawn[total] / len(means) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / len(means)))


def test_drawing_in_parts_gives_what_drawing_at_once_gives(monkeypatch):
    differences = [0.1 * step for step in range(-5, 6)]
    whole = bootstrap_means(differences, [3], 1000)
    monkeypatch.setattr("mtl_lora.estimates._DRAWN_AT_ONCE", 11 * 300)
    assert (bootstrap_means(differences, [3], 1000) == whole).all()


# ---- the numbers ----


def test_tasks_count_pairs_and_the_average_weighs_them_equally(compared):
    comparison = compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B))
    first, second = comparison.tasks["first"], comparison.tasks["second"]
    assert (first.n, first.value.a, first.value.b, first.value.difference) == (4, 0.5, 0.75, 0.25)
    assert (first.only_a, first.only_b, first.p) == (1, 2, 1.0)
    assert (second.n, second.only_a, second.only_b, second.p) == (2, 0, 1, 1.0)
    average = comparison.average
    assert (average.n, average.value.a, average.value.b) == (6, 0.5, 0.875)
    # Pooled: 1 against 3 of 4 discordant pairs, 2 (1 + 4) / 16.
    assert (average.only_a, average.only_b, average.p) == (1, 3, 0.625)
    assert average.f1 is None and first.f1 is None


def test_tasks_are_in_column_order_and_questions_are_paired_by_index(tmp_path):
    columns = {**TWO_TASKS, "columns": ["second", "first"]}
    records = predictions_of(RIGHT_B)
    shuffled = {task: lines[::-1] for task, lines in records.items()}
    folders = write_run(tmp_path / "a", records, task_set=columns), write_run(tmp_path / "b", shuffled)
    tasks = numbers(*map(Results.load, folders), resamples=100).tasks
    assert list(tasks) == ["second", "first"]
    assert all((task.only_a, task.only_b) == (0, 0) for task in tasks.values())


def test_differences_that_are_all_equal_have_no_interval(compared):
    low = {"first": [0.25, 0.5, 0.75, 0], "second": [0.5, 0.25]}
    high = {task: [value + 0.25 for value in values] for task, values in low.items()}
    comparison = compared(predictions_of(RIGHT_A, low), predictions_of(RIGHT_A, high))
    for row in (*comparison.tasks.values(), comparison.average):
        assert row.f1.difference == pytest.approx(0.25) and interval(row.f1) == (None, None)
        assert (row.value.difference, *interval(row.value), row.p) == (0, None, None, 1)
    # A task that has none takes it from no other, nor from the average.
    mixed = compared(predictions_of(RIGHT_A), predictions_of({**RIGHT_A, "first": outcomes("1011")}))
    intervals = [interval(row.value) for row in (*mixed.tasks.values(), mixed.average)]
    assert intervals[1] == (None, None) and None not in (*intervals[0], *intervals[2])
    assert any("No interval for second:" in note for note in mixed.notes)


def test_f1_is_left_out_of_a_task_that_lacks_one_and_so_of_the_average(compared):
    whole, partly = {"first": [0.5] * 4, "second": [0.5, 1]}, {"first": [0.5] * 4, "second": [0.5]}
    comparison = compared(predictions_of(RIGHT_A, whole), predictions_of(RIGHT_A, partly))
    assert comparison.tasks["first"].f1.difference == 0
    assert comparison.tasks["second"].f1 is None and comparison.average.f1 is None
    assert any("F1" in note and "second" in note for note in comparison.notes)


def test_average_interval_resamples_within_each_task(compared):
    # Of many questions the interval is the normal one, with the variances of the tasks' means added over T^2.
    a = {"first": [True] * 900, "second": [False] * 100}
    b = {"first": [index % 10 != 0 for index in range(900)], "second": [index % 4 == 0 for index in range(100)]}
    comparison = compared(predictions_of(a), predictions_of(b), resamples=20_000)
    differences = [[y - x for x, y in zip(a[task], b[task], strict=True)] for task in a]
    half = 1.96 * math.sqrt(sum(statistics.pvariance(task) / len(task) for task in differences)) / 2
    assert comparison.average.value.difference == pytest.approx((-0.1 + 0.25) / 2)
    assert interval(comparison.average.value) == pytest.approx((0.075 - half, 0.075 + half), abs=0.004)


def test_differences_of_several_units_have_no_average():
    of_words = ("accuracy", [([0.0, 1.0, 1.0], [1.0, 1.0, 1.0])])
    of_depths = ("depth_rmse", [(np.array([[4.0, 1], [1, 1], [9, 1]]), np.array([[1.0, 1], [1, 1], [4, 1]]))])
    mixed = differences({"first": of_words, "second": of_depths}, ["first", "second"], 0, 50)
    assert mixed["average"] is None and {*mixed["tasks"]} == {"first", "second"}
    alike = differences({"first": of_words, "second": of_words}, ["first", "second"], 0, 50)
    assert alike["average"] is not None
    more = {"first": of_words, "unscored": ("accuracy", [([0.0, 0.0, 1.0], [0.0, 0.0, 0.0])])}
    found = differences(more, ["first"], 0, 50)
    assert found["average"] == found["tasks"]["first"] != found["tasks"]["unscored"]


def test_interval_of_a_task_depends_on_seed_and_not_on_other_tasks(compared):
    f1 = [index / 50 for index in range(50)], [(index * 7 % 50) / 50 for index in range(50)]
    flags = [True] * 50
    both = [predictions_of({"first": flags, "second": flags}, {"first": one, "second": one}) for one in f1]
    alone = [{"second": records["second"]} for records in both]
    found = [compared(*both), compared(*both, seed=1), compared(*alone)]
    found = [comparison.tasks["second"] for comparison in found]
    assert found[0] == found[2]
    assert interval(found[0].f1) != interval(found[1].f1) and found[0].f1.difference == found[1].f1.difference


@given(answers=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), seed=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@pytest.mark.slow
def test_swapping_the_runs_negates_every_difference(compared, answers, seed):
    sides = [{"first": [pair[side] for pair in answers[1:]], "second": [answers[0][side]]} for side in (0, 1)]
    records = [predictions_of(side, {task: list(map(float, side[task])) for task in side}) for side in sides]
    forth, back = compared(*records, seed=seed), compared(*records[::-1], seed=seed)
    for one, other in zip((*forth.tasks.values(), forth.average), (*back.tasks.values(), back.average), strict=True):
        assert (one.p, one.only_a, one.only_b) == (other.p, other.only_b, other.only_a) and 0 < one.p <= 1
        assert (one.value.a, one.value.b) == (other.value.b, other.value.a)
        if None in interval(one.value):
            assert interval(one.value) == interval(other.value) == (None, None)
        else:
            assert interval(one.value) == pytest.approx((-other.value.high, -other.value.low), abs=1e-12)
            assert one.value.low <= one.value.high
        assert one.f1 == one.value  # the same numbers, resampled by the same stream


# ---- runs that cannot be compared ----

OTHER_OPTIONS = changed(TWO_TASKS)
OTHER_OPTIONS["tasks"][0]["options"] = ["yes", "no"]
OTHER_PATTERN = changed(TWO_TASKS)
OTHER_PATTERN["tasks"][1]["pattern"] = "yes|no"


@pytest.mark.parametrize(
    ("places", "fact"),
    [
        ({"settings__mode": "score"}, "mode ('generate' and 'score')"),
        ({"settings__template": "plain"}, "template ('alpaca' and 'plain')"),
        ({"settings__cutoff_len": 512}, "cutoff_len (256 and 512)"),
        ({"settings__num_beams": ...}, "num_beams (1 and none)"),
        ({"settings__unheard_of": 1}, "unheard_of (none and 1)"),
        ({"settings__mode": "score", "settings__num_beams": 4}, "mode ('generate' and 'score'), num_beams (1 and 4)"),
        ({"data__second": "other"}, "test data of second"),
        ({"data": {"first": "x", "second": "y"}}, "test data of first, second"),
        ({"task_set": OTHER_OPTIONS}, "for first"),
        ({"task_set": OTHER_PATTERN}, "for second"),
    ],
)
def test_other_protocol_data_or_tasks_are_not_comparable(compared, tmp_path, places, fact):
    with pytest.raises(UserError) as caught:
        compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B), **places)
    results = [tmp_path / run / "results.json" for run in "ab"]
    assert str(caught.value).startswith(f"{results[0]} and {results[1]} are not comparable: ")
    assert fact in str(caught.value)


def test_captions_of_other_tokenizers_are_not_comparable(tmp_path):
    cider = {"tasks__first__metric": "cider"}
    a, b = (
        Results.load(write_run(tmp_path / name, predictions_of(RIGHT_A), **cider, tasks__first__tokenizer=tokenizer))
        for name, tokenizer in (("a", "ptb"), ("b", "plain"))
    )
    check_comparable(a, a, ["first"])
    with pytest.raises(UserError, match="they measure first by cider, tokenizer ptb and cider, tokenizer plain"):
        check_comparable(a, b, ["first"])


def test_runs_are_compared_on_the_tasks_that_both_have_or_on_those_that_are_named(tmp_path, capsys):
    a = write_run(tmp_path / "a", predictions_of(RIGHT_A))
    b = write_run(tmp_path / "b", predictions_of(RIGHT_B), tasks__second=...)
    found = numbers(Results.load(a), Results.load(b), resamples=100)
    assert list(found.tasks) == ["first"] and "Left out: second." in found.notes
    assert found.average.value.difference == found.tasks["first"].value.difference
    rows = grid(run_command(capsys, "compare", a, a, "--tasks", "second")[1])
    assert "second" in rows and "First" not in rows
    nothing = write_run(tmp_path / "c", predictions_of(RIGHT_B), tasks__first=...)
    mistakes = [
        ([a, b, "--tasks", "second"], "scores of first, but not of second"),
        ([b, nothing], "no scored task in common"),
    ]
    assert_mistakes(capsys, "compare", mistakes)


def test_folders_of_both_protocols_are_compared_by_one(tmp_path, capsys):
    for run, mode in itertools.product("ab", ("generate", "score")):
        right = RIGHT_B if (run, mode) == ("b", "score") else RIGHT_A
        write_run(tmp_path / run / mode, predictions_of(right), mode=mode, settings__mode=mode)
    folders = tmp_path / "a", tmp_path / "b"
    rows = grid(run_command(capsys, "compare", *folders, "--mode", "score")[1])
    assert rows["First"][1:4] == ["50.0", "75.0", "+25.0"]
    assert grid(run_command(capsys, "compare", folders[0] / "generate", folders[1])[1])["First"][3] == "0.0"
    assert_mistakes(capsys, "compare", [([*folders], "--mode"), ([*folders, "--mode", "x"], "score")])
    twice = write_run(tmp_path / "a" / "evaluation", predictions_of(RIGHT_A), mode="score", settings__mode="score")
    again = write_run(tmp_path / "twice", predictions_of(RIGHT_A), mode="score", settings__mode="score")
    twice.rename(again / "evaluation")
    assert_mistakes(capsys, "compare", [([again, folders[1], "--mode", "score"], str(again / "evaluation"))])


def test_a_results_file_says_which_settings_must_agree(tmp_path):
    of_images = {"needed": ["resolution"], "noted": ["base_fingerprint"], "free": ["workers"]}
    facts = {"comparability": of_images, "settings": {"base_fingerprint": "base", "resolution": 224, "workers": 2}}
    a, other = (
        Results.load(write_run(tmp_path / name, predictions_of(RIGHT_A), **changed(facts, **places)))
        for name, places in (("a", {}), ("b", {"settings__resolution": 448, "settings__workers": 8}))
    )
    assert numbers(a, a).average.n == 6
    with pytest.raises(UserError, match=r"differ in resolution \(224 and 448\)$"):
        compare(a, other)
    unknown = write_run(tmp_path / "c", predictions_of(RIGHT_A), **changed(facts, settings__resolution=...))
    with pytest.raises(UserError, match=r"c/results\.json: settings\.resolution is missing"):
        compare(a, Results.load(unknown))


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"answer": "maybe"}, "different right answers"),
        ({"prompt_sha256": "other"}, "different prompts"),
        ({"index": 7}, "limit 0 and 0"),
    ],
)
def test_other_questions_are_not_comparable(compared, tmp_path, change, fact):
    records = predictions_of(RIGHT_B)
    records["first"][1] |= change
    with pytest.raises(UserError) as caught:
        compared(predictions_of(RIGHT_A), records)
    assert "question 1 of first" in str(caught.value) and fact in str(caught.value)
    assert f"{tmp_path / 'a' / 'predictions' / 'first.jsonl'}, line 2" in str(caught.value)


def test_question_of_the_second_run_alone_names_its_line_and_the_limits(compared, tmp_path):
    limited = {task: lines[:2] for task, lines in predictions_of(RIGHT_A).items()}
    with pytest.raises(UserError) as caught:
        compared(limited, predictions_of(RIGHT_B), settings__limit=4)
    place = f"{tmp_path / 'b' / 'predictions' / 'first.jsonl'}, line 3"
    assert all(fact in str(caught.value) for fact in ("question 2 of first", place, "limit 0 and 4"))


@pytest.mark.parametrize("limit", [1, 2])
def test_answers_beyond_the_limit_that_the_results_count_are_left_out(tmp_path, limit):
    # A folder evaluated with limit 4, then again with a smaller one, keeps all four lines.
    fewer = {"tasks__first": {"metric": "accuracy", "value": 1.0, "stderr": 0.0, "n": limit}, "settings__limit": limit}
    two = [
        write_run(tmp_path / name, predictions_of({"first": outcomes(flags)}), **fewer)
        for name, flags in (("a", "1100"), ("b", "1111"))
    ]
    row = numbers(*map(Results.load, two), resamples=100).tasks["first"]
    assert (row.n, row.only_a, row.only_b) == (limit, 0, 0)


def test_adapter_base_model_dtype_and_limit_may_differ_and_are_noted(compared):
    other_tasks = {"tasks": [{"name": name, "id": id} for id, name in enumerate(["new", "second", "first"])]}
    records = predictions_of(RIGHT_B)
    records["first"][0]["prompt_sha256"] = "other tokenizer"
    free = {"base_fingerprint": "other", "adapter_sha256": "x", "dtype": "torch.float32", "batch_size": 1, "limit": 4}
    places = {f"settings__{key}": value for key, value in free.items()}
    comparison = compared(predictions_of(RIGHT_A), records, base_model="other", task_set=other_tasks, **places)
    assert comparison.tasks["first"].only_b == 2
    base, dtype = comparison.notes[-2:]
    assert "A smollm2-135m, B other" in base and "A torch.bfloat16, B torch.float32" in dtype


def test_tasks_without_training_examples_are_named(compared):
    comparison = compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B), tasks__second__untrained=True)
    assert sum("had no training examples of second." in note for note in comparison.notes) == 1


# ---- broken files ----


@pytest.mark.parametrize(
    ("places", "fact"),
    [
        ({"settings": ...}, "settings.mode"),
        ({"settings": 3}, "settings is 3"),
        ({"settings__template": None}, "settings.template"),
        ({"data__first": ...}, "data.first"),
        ({"tasks__first__n": 5}, "3 of 4"),
        ({"tasks__first__n": 5, "tasks__first__value": 0.6}, "3 of 5"),
        ({"tasks__first__value": 0.5}, "2 of 4"),
        ({"tasks__first__metric": "f1"}, "f1"),
    ],
)
def test_results_without_what_a_comparison_needs_are_named(compared, tmp_path, places, fact):
    with pytest.raises(UserError) as caught:
        compared(predictions_of(RIGHT_A), predictions_of(RIGHT_B), **places)
    assert str(tmp_path / "b" / "results.json") in str(caught.value) and fact in str(caught.value)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ('{"task": "first", "index"', "JSON object"),
        ("", "JSON object"),
        ("[]", "JSON object"),
        ({"index": 0}, "question 0 a second time"),
        ({"task": "second"}, "'second'"),
        ({"correct": ...}, "correct is missing"),
        ({"correct": 1}, "correct is 1"),
        ({"index": True}, "index is True"),
        ({"index": -1}, "index is -1"),
        ({"answer": None}, "answer is None"),
        ({"prompt_sha256": ...}, "prompt_sha256 is missing"),
        ({"f1": 1.5}, "f1 is 1.5"),
        ({"f1": math.nan}, "f1 is nan"),
    ],
)
def test_a_broken_line_is_named(tmp_path, change, fact):
    a, b = (write_run(tmp_path / run, predictions_of(right)) for run, right in (("a", RIGHT_A), ("b", RIGHT_B)))
    path = b / "predictions" / "first.jsonl"
    lines = predictions_of(RIGHT_B)["first"]
    lines[2] = change if isinstance(change, str) else changed(lines[2], **change)
    write_lines(path, lines)
    with pytest.raises(UserError) as caught:
        compare(Results.load(a), Results.load(b))
    assert str(caught.value).startswith(f"{path}, line 3") and fact in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\n", b""])
def test_a_missing_or_unreadable_file_is_named(tmp_path, content):
    a, b = (write_run(tmp_path / run, predictions_of(RIGHT_A)) for run in "ab")
    path = b / "predictions" / "second.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        compare(Results.load(a), Results.load(b))


def test_other_line_separators_of_unicode_end_no_line(compared):
    records = predictions_of(RIGHT_A)
    records["first"][0]["text"] = "one\u2028two\x85three"
    assert compared(records, predictions_of(RIGHT_B)).tasks["first"].n == 4


# ---- the command ----

# All of one task changes and nothing of the other: then no interval is known.
NONE = {"first": outcomes("000000"), "second": outcomes("10")}
ALL = {"first": outcomes("111111"), "second": outcomes("10")}
F1 = {"first": [0.0] * 6, "second": [0.5, 1]}, {"first": [0.75] * 6, "second": [0.5, 1]}
EXPECTED = """\
| Task    | Questions |    A |     B |  B - A | 95 % interval | Only A right | Only B right |      p |
| ------- | --------: | ---: | ----: | -----: | ------------: | -----------: | -----------: | -----: |
| First   |         6 |  0.0 | 100.0 | +100.0 |             – |            0 |            6 | 0.0312 |
| second  |         2 | 50.0 |  50.0 |    0.0 |             – |            0 |            0 | 1.0000 |
| Average |         8 | 25.0 |  75.0 |  +50.0 |             – |            0 |            6 | 0.0312 |
"""


@pytest.fixture
def runs(tmp_path):
    """The folders of two runs that can be compared."""
    return [write_run(tmp_path / name, predictions_of(right)) for name, right in (("a", NONE), ("b", ALL))]


def test_command_prints_the_expected_table(runs, capsys):
    code, out, err = run_command(capsys, "compare", runs[0], runs[1] / "results.json")
    assert (code, err, out[: len(EXPECTED)]) == (0, "", EXPECTED)
    assert all(fact in out for fact in (f"a ({runs[0]})", f"b ({runs[1]})", "10,000 resamples", "seed 0"))


def test_f1_stands_in_columns_of_its_own(tmp_path, capsys):
    a, b = (
        write_run(tmp_path / name, predictions_of(r, f1)) for name, r, f1 in zip("ab", (NONE, ALL), F1, strict=True)
    )
    rows = grid(run_command(capsys, "compare", a, b)[1])
    assert rows["Task"][8:] == ["F1 A", "F1 B", "F1 B - A", "F1 95 % interval"]
    assert rows["First"][8:] == ["0.0", "75.0", "+75.0", "–"]
    assert rows["Average"][8:] == ["37.5", "75.0", "+37.5", "–"]


def test_csv_has_fractions_and_keeps_its_notes_off_the_output(runs, capsys):
    code, out, err = run_command(capsys, "compare", *runs, "--format", "csv")
    first, second, average = csv.DictReader(io.StringIO(out))
    assert code == 0 and err.count("\n") == 5 and "bootstrap" in err
    assert (first["task"], second["task"], average["task"]) == ("first", "second", "")
    assert (float(first["p"]), first["only_b"], first["f1 a"]) == (pytest.approx(0.03125), "6", "")
    keys = ("a", "b", "difference", "low", "high")
    assert [average[f"value {key}"] for key in keys] == ["0.25", "0.75", "0.5", "", ""]


def test_json_says_who_what_and_how(tmp_path, capsys):
    a = write_run(tmp_path / "a", predictions_of(NONE, F1[0]))
    b = write_run(tmp_path / "b", predictions_of(ALL, F1[1]), settings__dtype="torch.float32")
    code, out, err = run_command(capsys, "compare", a, b, "--format", "json", "--seed", "5", "--resamples", "100")
    value = json.loads(out)
    assert (code, err, value["seed"], value["resamples"], value["confidence"]) == (0, "", 5, 100, 0.95)
    assert (value["a"]["name"], value["b"]["results"]) == ("a", str(b / "results.json"))
    assert value["b"]["settings"]["dtype"] == "torch.float32" and "torch.float32" in value["notes"][-2]
    everything = {"a": 0.0, "b": 1.0, "difference": 1.0, "low": None, "high": None}
    f1 = {"a": 0.0, "b": 0.75, "difference": 0.75, "low": None, "high": None}
    first = value["tasks"]["first"]
    assert first.pop("p") == pytest.approx(0.03125)
    assert first == {"n": 6, "metric": "accuracy", "value": everything, "only_a": 0, "only_b": 6, "f1": f1}
    assert list(value["tasks"]) == ["first", "second"] and value["average"]["n"] == 8


@pytest.mark.parametrize(("p", "text"), [(1, "1.0000"), (0.00012, "0.0001"), (0.0001, "0.0001"), (9e-5, "<0.0001")])
def test_p_has_four_decimals(p, text):
    assert p_text(p) == text


def test_every_mistake_ends_in_one_sentence_and_exit_code_2(runs, tmp_path, capsys):
    a, b = runs
    mistakes = [
        ([a], "runs"),
        ([a, b, a], "runs"),
        ([a, tmp_path / "none"], str(tmp_path / "none")),
        ([a, b, "--seed", "-1"], "seed"),
        ([a, b, "--seed", "x"], "seed"),
        ([a, b, "--resamples", "99"], "100 to 1000000"),
        ([a, b, "--resamples", "1000001"], "1000001"),
        ([a, b, "--format", "docx"], "docx"),
        ([a, b, "--output", tmp_path], "is a folder"),
        ([a, b, "--output", b / "results.json"], "would be lost"),
        ([a, b, "--output", a / "predictions" / "first.jsonl"], "would be lost"),
    ]
    assert_mistakes(capsys, "compare", mistakes)
