"""McNemar's exact test and the bootstrap against slow, obvious versions of them."""

import collections
import itertools
import math
import statistics
import sys
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.errors import UserError
from mtl_lora.report.paired import bootstrap_means, mcnemar_p, percentile_interval


def p_by_enumeration(only_a: int, only_b: int) -> Fraction:
    """The share of all ways to hand n discordant questions to A or B that are at least as one-sided."""
    ways = list(itertools.product((-1, 1), repeat=only_a + only_b))
    return Fraction(sum(abs(sum(way)) >= abs(only_a - only_b) for way in ways), len(ways))


@pytest.mark.parametrize("only_a, only_b", [(b, n - b) for n in range(11) for b in range(n + 1)])
def test_mcnemar_is_the_share_of_equally_likely_outcomes(only_a, only_b):
    assert mcnemar_p(only_a, only_b) == float(p_by_enumeration(only_a, only_b))


@pytest.mark.parametrize(
    ("only_a", "only_b", "published"),
    [
        (1, 7, "0.070"),  # Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13:91), airway reactivity
        (86, 150, "3.716e-05"),  # R, exact2x2, mcnemar.exact on Agresti's approval ratings
    ],
)
def test_mcnemar_gives_published_values(only_a, only_b, published):
    half_a_digit = 0.5 * 10.0 ** Decimal(published).as_tuple().exponent
    assert mcnemar_p(only_a, only_b) == pytest.approx(float(published), abs=half_a_digit)


@pytest.mark.parametrize(("only_a", "only_b"), [(900, 1100), (4800, 5200), (1, 900), (5000, 5001)])
def test_mcnemar_of_large_counts_agrees_with_a_sum_of_logarithms(only_a, only_b):
    n = only_a + only_b
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(min(only_a, only_b) + 1)
    ]
    expected = 2 * math.exp(max(logs)) * math.fsum(math.exp(log - max(logs)) for log in logs)
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected, rel=1e-8)


def test_mcnemar_below_the_smallest_float_is_not_zero():
    assert mcnemar_p(0, 100_000) == math.ulp(0.0)


@given(only_a=st.integers(0, 3000), only_b=st.integers(0, 3000))
@settings(deadline=None)
def test_mcnemar_is_symmetric_a_probability_and_smaller_for_a_larger_lead(only_a, only_b):
    p = mcnemar_p(only_a, only_b)
    assert 0 < p <= 1 and p == mcnemar_p(only_b, only_a)
    if only_a >= only_b > 0 and p > math.ulp(0.0):
        assert mcnemar_p(only_a + 1, only_b - 1) < p


@pytest.mark.parametrize("differences", [(1, 0, 0, -1, 1), (0.25, -0.5, 1, 0, -0.5), (0, 0, 0, 0, 1)])
def test_bootstrap_has_the_distribution_of_all_resamples(differences):
    n = len(differences)
    every = collections.Counter(sum(drawn) for drawn in itertools.product(differences, repeat=n))
    means = bootstrap_means(differences, [0], 200_000)
    drawn = collections.Counter(round(mean * n, 9) for mean in means.tolist())
    assert len(means) == 200_000 and set(drawn) <= set(every)
    for total, count in every.items():
        share = count / n**n
        # Five standard errors of a share of 200,000 draws.
        assert drawn[total] / len(means) == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / len(means)))


def test_interval_of_many_questions_is_the_normal_one():
    differences = [1.0] * 300 + [-1.0] * 200 + [0.0] * 1500
    low, high = percentile_interval(bootstrap_means(differences, [7], 20_000))
    half = 1.96 * statistics.pstdev(differences) / math.sqrt(len(differences))
    assert (low, high) == (pytest.approx(0.05 - half, abs=0.001), pytest.approx(0.05 + half, abs=0.001))


def test_interval_leaves_out_the_same_share_at_both_ends():
    import numpy

    low, high = percentile_interval(numpy.arange(1001) / 1000)
    assert (low, high) == (pytest.approx(0.025), pytest.approx(0.975))


def test_drawing_in_parts_gives_what_drawing_at_once_gives(monkeypatch):
    differences = [0.1 * step for step in range(-5, 6)]
    whole = bootstrap_means(differences, [3], 1000)
    monkeypatch.setattr("mtl_lora.report.paired._DRAWN_AT_ONCE", 11 * 300)
    assert (bootstrap_means(differences, [3], 1000) == whole).all()


@given(differences=st.lists(st.floats(-1, 1), min_size=1, max_size=30), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=50)
def test_negated_differences_give_negated_means_within_their_range(differences, seed):
    means = bootstrap_means(differences, [seed], 100)
    assert (bootstrap_means([-value for value in differences], [seed], 100) == -means).all()
    assert min(differences) - 1e-12 <= means.min() and means.max() <= max(differences) + 1e-12


def test_bootstrap_without_numpy_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(UserError, match="needs numpy"):
        bootstrap_means([1.0], [0], 100)
