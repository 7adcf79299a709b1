"""The t interval, and the paired interval over seeds, against tables and slow references."""

import math
import statistics

import pytest
from study_cases import write_results

from mtl_lora.errors import UserError
from mtl_lora.report.compare import compare
from mtl_lora.report.paired import bootstrap_means, percentile_interval
from mtl_lora.report.results import read_results
from mtl_lora.study.paired_seeds import RESAMPLES, SEED, against, question_differences, seed_pairs
from mtl_lora.study.statistics import summarise, t_cdf, t_quantile

# Quantiles as printed tables have them: 95 % and 99 % two-sided.
TABLE = [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032)]
TABLE += [(6, 2.447, 3.707), (9, 2.262, 3.250), (10, 2.228, 3.169), (29, 2.045, 2.756), (120, 1.980, 2.617)]


@pytest.mark.parametrize(("df", "at_95", "at_99"), TABLE)
def test_t_quantiles_are_those_of_printed_tables(df, at_95, at_99):
    assert t_quantile(df) == pytest.approx(at_95, abs=5.1e-4)
    assert t_quantile(df, 0.99) == pytest.approx(at_99, abs=5.1e-4)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 8, 31])
@pytest.mark.parametrize("t", [0.1, 1.0, 2.5, 9.0])
def test_t_distribution_is_the_integral_of_its_density(df, t):
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    steps = 20_000
    points = [(k + 0.5) * t / steps for k in range(steps)]
    integral = 2 * t / steps * math.fsum(constant * (1 + x**2 / df) ** (-(df + 1) / 2) for x in points)
    assert t_cdf(t, df) == pytest.approx(integral, abs=1e-7)


def test_summary_of_three_seeds_is_the_textbooks():
    values = [0.70, 0.72, 0.77]
    found = summarise(values)
    half = 4.302652729911275 * statistics.stdev(values) / math.sqrt(3)
    assert found["mean"] == pytest.approx(0.73) and found["sd"] == pytest.approx(statistics.stdev(values))
    assert (found["low"], found["high"]) == (pytest.approx(0.73 - half), pytest.approx(0.73 + half))


def test_summary_of_one_seed_has_no_spread():
    assert summarise([0.5]) == {"mean": 0.5, "sd": None, "low": None, "high": None}


# ---- paired over seeds ----

RIGHT = {
    # by run: correct or not, task by task
    "a0": {"boolq": "1100", "piqa": "10"},
    "a1": {"boolq": "1000", "piqa": "11"},
    "b0": {"boolq": "1011", "piqa": "11"},
    "b1": {"boolq": "1111", "piqa": "01"},
}


@pytest.fixture
def runs(tmp_path):
    """Results of two runs of A and two of B on six questions."""
    return {name: read_results(write_results(tmp_path / name, right)) for name, right in RIGHT.items()}


def test_difference_of_a_question_is_averaged_over_the_seeds(runs):
    found = question_differences([(runs["a0"], runs["b0"]), (runs["a1"], runs["b1"])])
    slow = {
        task: [
            sum(int(RIGHT[f"b{seed}"][task][index]) - int(RIGHT[f"a{seed}"][task][index]) for seed in (0, 1)) / 2
            for index in range(len(RIGHT["a0"][task]))
        ]
        for task in ("boolq", "piqa")
    }
    assert found == slow == {"boolq": [0.0, 0.0, 1.0, 1.0], "piqa": [-0.5, 0.5]}


def test_intervals_are_of_the_questions_within_each_task(runs):
    found = against({0: runs["a0"], 1: runs["a1"]}, {0: runs["b0"], 1: runs["b1"]}, ["boolq", "piqa"])
    means = {
        "boolq": bootstrap_means([0.0, 0.0, 1.0, 1.0], [SEED, *b"boolq"], RESAMPLES),
        "piqa": bootstrap_means([-0.5, 0.5], [SEED, *b"piqa"], RESAMPLES),
    }
    assert found["tasks"]["boolq"]["difference"] == 0.5 and found["tasks"]["piqa"]["difference"] == 0.0
    for task, drawn in means.items():
        assert (found["tasks"][task]["low"], found["tasks"][task]["high"]) == percentile_interval(drawn)
    low, high = percentile_interval((means["boolq"] + means["piqa"]) / 2)
    assert found["average"] == {"difference": 0.25, "low": low, "high": high}


def test_one_pair_of_runs_has_the_interval_of_report_compare(runs):
    found = against({0: runs["a0"]}, {0: runs["b0"]}, ["boolq", "piqa"])
    compared = compare(runs["a0"], runs["b0"], seed=SEED, resamples=RESAMPLES)
    for row in (*compared.rows, compared.average):
        entry = found["tasks"][row.task.name] if row.task else found["average"]
        assert entry == {
            "difference": pytest.approx(row.accuracy.difference),
            "low": pytest.approx(row.accuracy.low),
            "high": pytest.approx(row.accuracy.high),
        }


def test_seeds_go_together_and_a_run_without_one_goes_with_every_seed():
    assert seed_pairs({0: "a0", 1: "a1", 2: "a2"}, {1: "b1", 0: "b0", 5: "b5"}) == [("a0", "b0"), ("a1", "b1")]
    assert seed_pairs({0: "a0", 1: "a1"}, {None: "b"}) == [("a0", "b"), ("a1", "b")]
    assert seed_pairs({None: "a"}, {0: "b0"}) == [("a", "b0")]


def test_only_tasks_of_both_are_compared_and_then_there_is_no_average(tmp_path, runs):
    one = read_results(write_results(tmp_path / "one", {"boolq": "1111"}))
    found = against({0: runs["a0"]}, {0: one}, ["boolq", "piqa"])
    assert list(found["tasks"]) == ["boolq"] and found["average"] is None
    assert against({0: runs["a0"]}, {1: one}, ["boolq"]) is None


def test_runs_on_other_questions_are_refused(tmp_path, runs):
    other = {"boolq": "11001", "piqa": "10"}
    with pytest.raises(UserError, match="not comparable: question 4 of boolq"):
        against({0: runs["a0"]}, {0: read_results(write_results(tmp_path / "other", other))}, ["boolq"])
