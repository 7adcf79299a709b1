"""Metrics against scikit-learn, scipy and slow loops, without a model."""

import math
import statistics
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.errors import UserError
from mtl_lora.estimates import proportion_error
from mtl_lora.metrics import ERROR_RESAMPLES, METRICS, metrics_for, same_text, text_f1, value_text

few = settings(max_examples=30, deadline=None)
LABELS = ("no", "yes")


# ---- free text ----


@pytest.mark.parametrize(
    ("text", "right", "f1", "exact"),
    [
        ("The red kite.", "red kite", 1.0, True),
        ("a red kite", "red kite flies", 0.8, False),
        ("red red", "red", 2 / 3, False),
        ("blue", "red", 0.0, False),
        ("don't!", "dont", 1.0, True),
        ("U.S.", "US", 1.0, True),
        ("1,000", "1000", 1.0, True),
        ("1,234,567", "1234567", 1.0, True),
        ("1,5", "15", 0.0, False),
        ("1,0000", "10000", 0.0, False),
        ("(5).", "5", 1.0, True),
        ("B)", "b", 1.0, True),
        # an empty answer is never right
        ("", "red", 0.0, False),
        ("", "A", 0.0, False),
        ("", "", 0.0, False),
        # signs that belong to a number or to a single letter count, and so do articles that are none
        ("15", "-1.5", 0.0, False),
        ("5", "-5", 0.0, False),
        ("\N{MINUS SIGN}5", "-5", 1.0, True),
        ("12", "1/2", 0.0, False),
        ("5", ".5", 0.0, False),
        ("C", "C++", 0.0, False),
        ("A", "A-", 0.0, False),
        ("1e5", "1e-5", 0.0, False),
        ("$5", "-$5", 0.0, False),
        ("x-1", "x+1", 0.0, False),
        ("x<5", "x>5", 0.0, False),
        ("<5", ">5", 0.0, False),
        ("<= .5", "< .5", 2 / 4, False),
        ("The <5%", "<5", 1.0, True),
        ("x<10", "x>10", 0.0, False),
        ("x<=1", "x>=1", 0.0, False),
        ("a<=b", "a>=b", 0.0, False),
        ("-inf", "inf", 0.0, False),
        ("-sqrt(2)", "sqrt(2)", 0.0, False),
        ("- pi", "pi", 1.0, True),
        ("-yes", "yes", 1.0, True),
        ("Ca2+", "Ca2-", 0.0, False),
        ("Na+", "Na", 0.0, False),
        ("x2", "x^2", 0.0, False),
        ("y = x", "y = -x", 0.5, False),
        ("e-mail, x-ray - and", "email xray and", 1.0, True),
        ("vitamin B-6 in 3-D", "vitamin B6 in 3D", 1.0, True),
        ("vitamin", "vitamin A", 2 / 3, False),
        ("the", "A", 0.0, False),
        ("?", "!", 0.0, False),
    ],
)
def test_free_text_is_compared_word_by_word(text, right, f1, exact):
    assert text_f1(text, right) == pytest.approx(f1)
    assert same_text(text, right) == exact


words = st.lists(st.sampled_from(["red", "kite", "the", "sky", "a", "blue"]), max_size=6).map(" ".join)


@few
@given(words, words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(text, right):
    text, right = f"{text} end", f"{right} end"  # an article counts at the end alone
    given_words = [word for word in text.split() if word not in ("a", "the")]
    wanted = [word for word in right.split() if word not in ("a", "the")]
    shared, left = 0, list(wanted)
    for word in given_words:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = shared / len(given_words), shared / len(wanted)
    assert text_f1(text, right) == pytest.approx(2 * precision * recall / (precision + recall))
    assert text_f1(text, right) == pytest.approx(text_f1(right, text))


@few
@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_the_standard_error_is_that_of_the_mean_of_zeros_and_ones_and_never_zero(outcomes):
    wald, agresti_coull = (
        statistics.pstdev(map(float, values)) / math.sqrt(len(values)) for values in (outcomes, [*outcomes, 0, 0, 1, 1])
    )
    share, error = METRICS["f1"].estimate(outcomes)
    assert share == sum(outcomes) / len(outcomes)
    assert error == pytest.approx(max(wald, agresti_coull)) == pytest.approx(proportion_error(share, len(outcomes)))
    assert error > 0
    if len(set(outcomes)) == 1:
        assert error == pytest.approx(math.sqrt(2 * (len(outcomes) + 2) / (len(outcomes) + 4) ** 3))


def of(metric, predictions, targets, labels=()):
    """The value and the standard error of a metric."""
    return metric.estimate(metric.rows(predictions, targets, labels))


def test_means_of_a_score_give_a_value_and_its_standard_error():
    predictions, targets = ["red", "a kite", "blue sky"], ["red", "kite.", "sky"]
    by_name = {name: of(METRICS[name], predictions, targets) for name in metrics_for()}
    f1 = (1 + 1 + 2 / 3) / 3
    # So few values spread less than with two zeros and two ones among them.
    error = statistics.pstdev([1, 1, 2 / 3, 0, 0, 1, 1]) / math.sqrt(7)
    assert by_name == {
        "accuracy": (1 / 3, pytest.approx(math.sqrt(2 / 27))),
        "exact_match": (2 / 3, pytest.approx(math.sqrt(2 / 27))),
        "f1": (pytest.approx(f1), pytest.approx(error)),
    }


# ---- statistics of all questions ----


def sklearn_or_0(function, *arguments, **settings) -> float:
    """What an independent implementation gives; 0 where it says that the value is not defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = function(*arguments, **settings)
    value = getattr(value, "statistic", value)
    return 0.0 if math.isnan(value) else float(value)


def reference(name: str, predictions, targets) -> float:
    """The metric as scikit-learn and scipy have it; of numbers, of fewer than two distinct ones 0."""
    if name == "pearson_and_spearman":
        return (reference("pearson", predictions, targets) + reference("spearman", predictions, targets)) / 2
    if name in ("pearson", "spearman"):
        if min(len(set(predictions)), len(set(targets))) < 2:
            return 0.0
        function = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}[name]
        return sklearn_or_0(function, predictions, targets)
    f1 = sklearn_or_0(sklearn.metrics.f1_score, [t == "yes" for t in targets], [p == "yes" for p in predictions])
    if name == "binary_f1":
        return f1
    if name == "accuracy_and_f1":
        return (sklearn.metrics.accuracy_score(targets, predictions) + f1) / 2
    return sklearn_or_0(sklearn.metrics.matthews_corrcoef, targets, predictions)


STATISTICS = [name for name, metric in METRICS.items() if metric.key == "parsed"]
answers = st.lists(st.tuples(st.sampled_from(["yes", "no", ""]), st.sampled_from(LABELS)), min_size=1, max_size=30)
numbers = st.lists(st.tuples(st.integers(-3, 3).map(lambda n: n / 2), st.integers(0, 5)), min_size=1, max_size=30)


def is_of_numbers(name: str) -> bool:
    return METRICS[name].needs == "numbers"


@few
@given(st.sampled_from(STATISTICS), st.data())
def test_values_are_those_of_scikit_learn_and_scipy_and_0_where_these_have_none(name, data):
    predictions, targets = zip(*data.draw(numbers if is_of_numbers(name) else answers), strict=True)
    value = METRICS[name].value(predictions, targets, LABELS)
    assert value == pytest.approx(reference(name, predictions, targets), abs=1e-12)
    assert METRICS[name].lowest <= value <= 1


@few
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abc")), min_size=1, max_size=40))
def test_matthews_is_of_any_number_of_classes(pairs):
    predictions, targets = zip(*pairs, strict=True)
    assert METRICS["matthews"].value(predictions, targets) == pytest.approx(
        sklearn_or_0(sklearn.metrics.matthews_corrcoef, targets, predictions), abs=1e-12
    )


def test_the_last_of_two_labels_is_the_positive_class():
    predictions, targets = ["a", "b", "b", "b"], ["a", "b", "a", "b"]
    assert METRICS["binary_f1"].value(predictions, targets, ("a", "b")) == pytest.approx(0.8)
    assert METRICS["binary_f1"].value(predictions, targets, ("b", "a")) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="two labels"):
        METRICS["binary_f1"].value(predictions, targets)


def questions(name: str, n: int, seed: int = 1, noise: float = 1.0):
    """Predictions that follow their targets, more or less."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=n)
    given = hidden + noise * generator.normal(size=n)
    if is_of_numbers(name):
        return (given.tolist(), np.round(np.clip(hidden + 2, 0, 5), 1).tolist())
    return tuple([LABELS[int(value > 0.5)] for value in side] for side in (given, hidden))


@pytest.mark.parametrize("name", STATISTICS)
def test_the_standard_error_is_that_of_a_slow_bootstrap(name):
    predictions, targets = questions(name, 60)
    value, error = of(METRICS[name], predictions, targets, LABELS)
    generator, drawn = np.random.default_rng(7), []
    for _ in range(400):
        places = generator.integers(60, size=60)
        drawn.append(METRICS[name].value([predictions[i] for i in places], [targets[i] for i in places], LABELS))
    # The relative standard errors of both standard deviations, four of them.
    tolerance = 4 * math.sqrt((1 / 400 + 1 / ERROR_RESAMPLES) / 2)
    assert value == pytest.approx(reference(name, predictions, targets))
    assert error == pytest.approx(statistics.stdev(drawn), rel=tolerance)
    assert of(METRICS[name], predictions, targets, LABELS) == (value, error)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.slow
def test_a_difference_of_two_runs_is_resampled_with_the_same_questions_for_both(name):
    metric = METRICS[name]
    a, b, targets = questions(name, 60)[0], questions(name, 60, noise=0.5)[0], questions(name, 60)[1]
    rows = [metric.rows(side, targets, LABELS) for side in (a, b)]
    difference, resampled = metric.difference([rows], [0], 2000)
    assert difference == pytest.approx(reference(name, b, targets) - reference(name, a, targets))
    generator, drawn = np.random.default_rng(3), []
    for _ in range(300):
        places = generator.integers(60, size=60)
        sides = [metric.value([side[i] for i in places], [targets[i] for i in places], LABELS) for side in (a, b)]
        drawn.append(sides[1] - sides[0])
    assert resampled.mean() == pytest.approx(statistics.fmean(drawn), abs=5 * statistics.stdev(drawn) / math.sqrt(300))
    assert resampled.std() == pytest.approx(statistics.stdev(drawn), rel=4 * math.sqrt((1 / 300 + 1 / 2000) / 2))
    # The other way round the numbers are negated, and a second pair of the same runs changes nothing.
    back, negated = metric.difference([rows[::-1]], [0], 2000)
    assert back == -difference and np.allclose(negated, -resampled)
    assert np.allclose(metric.difference([rows, rows], [0], 2000)[1], resampled)


@pytest.mark.parametrize("name", STATISTICS)
def test_without_spread_there_is_no_standard_error(name):
    labels = (3.0, 1.0) if is_of_numbers(name) else LABELS
    for predictions, targets in ((labels[:1], labels[:1]), (labels[:1] * 8, labels * 4)):
        value, error = of(METRICS[name], predictions, targets, LABELS)
        assert value == reference(name, predictions, targets)
        # Of a constant predictor the F1 is 0 in every resample, but the accuracy varies.
        assert (error is None) == (name != "accuracy_and_f1" or len(targets) == 1)
    value, error = of(METRICS[name], labels, labels, LABELS)
    assert value == pytest.approx(1) and error > 0.2  # two questions: half of all resamples are of one alone


@pytest.mark.parametrize("name", ["pearson", "spearman", "pearson_and_spearman"])
def test_spread_of_rounding_alone_is_no_standard_error(name):
    targets = [number / 7 for number in range(50)]
    value, error = of(METRICS[name], [0.1 * target + 0.7 for target in targets], targets)
    assert value == pytest.approx(1) and error is None


def test_a_predictor_that_is_constant_but_for_rounding_has_no_correlation():
    pearson, targets = METRICS["pearson"], [1e6, 2e6] * 25
    for predictions in ([0.1 + 0.2, 0.3] * 25, [1 / 3] * 50):
        assert of(pearson, predictions, targets) == (0.0, None)
    assert pearson.value([0.3 + 1e-9, 0.3] * 25, targets) == pytest.approx(-1)
    assert pearson.value([1e308, -1e308] * 25, targets) == pytest.approx(-1)


def test_a_correlation_that_rounding_takes_beyond_one_is_one():
    predictions = [0.1, 0.7, 3 * 0.3]  # whose correlation with their doubles comes to 1.0000000000000002
    assert METRICS["pearson"].value(predictions, [2 * number for number in predictions]) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_has_no_rank(value):
    with pytest.raises(UserError, match=f"answer 1 has {value}"):
        of(METRICS["spearman"], [0.5, value, 1.0], [1.0, 2.0, 3.0])


def test_a_task_can_have_the_metrics_that_fit_its_labels():
    assert metrics_for() == ["accuracy", "exact_match", "f1"]
    assert metrics_for(("a", "b", "c")) == ["accuracy", "exact_match", "matthews"]
    assert metrics_for(LABELS) == ["accuracy", "exact_match", "matthews", "binary_f1", "accuracy_and_f1"]
    assert metrics_for(numbers=True) == ["pearson", "spearman", "pearson_and_spearman"]


def test_a_difference_over_several_pairs_is_the_mean_of_theirs_in_every_resample():
    metric, targets = METRICS["pearson"], questions("pearson", 40)[1]
    runs = [metric.rows(questions("pearson", 40, noise=noise)[0], targets) for noise in (2.0, 1.5, 0.5, 0.2)]
    pairs = [(runs[0], runs[2]), (runs[1], runs[3])]
    difference, resampled = metric.difference(pairs, [0], 100)
    values, drawn = zip(*(metric.difference([pair], [0], 100) for pair in pairs), strict=True)
    assert difference == pytest.approx(statistics.fmean(values))
    assert np.allclose(resampled, np.mean(drawn, axis=0)) and not np.allclose(drawn[0], drawn[1])


def test_the_error_of_scores_that_are_mostly_none_or_all_is_no_smaller_than_their_own():
    scores = [0.0, 1.0] * 20 + [0.5]  # which two zeros and two ones among them spread no more, but make more
    assert METRICS["f1"].estimate(scores)[1] == pytest.approx(statistics.pstdev(scores) / math.sqrt(41))


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("edge_loss", "0.01235 ± 0.00200"),
        ("mean_angle", "0.012 ± 0.002"),
        ("f1", "1.2 ± 0.2"),
        ("own", "0.012 ± 0.002"),
    ],
)
def test_values_are_shown_with_the_digits_of_their_metric(metric, text):
    assert value_text(0.0123456, 0.002, metric) == text


def test_an_exact_match_of_labels_is_that_label_and_no_other():
    labels = ["<5", "5", "5%", "The 5"]
    rows = METRICS["exact_match"].rows(labels, ["<5", "5%", "5%", "5"], labels)
    assert rows == [1, 0, 1, 0]


@pytest.mark.parametrize("metric", ["accuracy", "mean_angle"])
def test_a_zero_has_no_sign_and_what_rounds_to_zero_has_that_of_a_difference_alone(metric):
    shown = [value_text(value, None, metric, signed) for value in (-1e-5, 0.0, 1e-5) for signed in (False, True)]
    zero = "0.0" if metric == "accuracy" else "0.000"
    assert shown == [zero, f"-{zero}", zero, zero, zero, f"+{zero}"]
