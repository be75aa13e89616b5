"""Intervals, paired tests and their correction, against scipy and values worked out by hand."""
from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats

from medkd.stats import bootstrap_ci, holm, paired_test


@pytest.mark.parametrize("n, level", [(6, .9), (20, .95), (150, .99)])
def test_interval_equals_scipys_bca(n, level):
    values = np.random.default_rng(n).beta(12, 2, n)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=40000, confidence_level=level,
                                   method="BCa", rng=1).confidence_interval
    mean, low, high = bootstrap_ci(values, level, n=40000)
    assert mean == pytest.approx(values.mean())
    tolerance = .08 * (theirs.high - theirs.low)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_interval_moves_and_scales_with_the_values():
    values = np.random.default_rng(0).beta(5, 2, 15)
    interval = np.array(bootstrap_ci(values))
    assert np.array(bootstrap_ci(3 * values + 2)) == pytest.approx(3 * interval + 2)
    mean, low, high = bootstrap_ci(-values)
    assert mean == pytest.approx(-interval[0])
    assert (low, high) == pytest.approx((-interval[2], -interval[1]), abs=.01)


def test_interval_covers_the_mean_of_normal_values():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        _, low, high = bootstrap_ci(rng.normal(size=40), n=1000)
        inside += low <= 0 <= high
    assert .90 <= inside / 300 <= .98


def test_groups_are_resampled_whole():
    rng = np.random.default_rng(0)
    child = rng.normal(.8, .05, 14)
    eyes, groups = np.repeat(child, 2), np.repeat([f"child {i}" for i in range(14)], 2)
    assert bootstrap_ci(eyes, groups=groups) == pytest.approx(bootstrap_ci(child))
    order = rng.permutation(28)
    mixed = bootstrap_ci(eyes[order], groups=groups[order])
    assert mixed == pytest.approx(bootstrap_ci(child), abs=.004)
    uneven = bootstrap_ci([1., 1., 0., .5], groups=["a", "a", "b", "c"])
    assert uneven[0] == pytest.approx(.625), "the mean is over the cases"


@pytest.mark.parametrize("values, mean", [
    ([], np.nan), ([np.nan], np.nan), ([.7], .7), ([.7, .9, np.nan], .8),
    ([1., np.inf, 2., 3.], np.inf)])
def test_too_little_for_an_interval_gives_nan_bounds(values, mean):
    assert bootstrap_ci(values) == pytest.approx((mean, np.nan, np.nan), nan_ok=True)


def test_too_few_groups_give_nan_bounds():
    assert np.isnan(bootstrap_ci([.1, .2, .3, .4], groups=[1, 1, 2, 2])[1:]).all()


def test_nan_is_left_out():
    values = [.9, np.nan, .8, .7, .85]
    assert bootstrap_ci(values) == bootstrap_ci([.9, .8, .7, .85])
    assert bootstrap_ci(values, groups=list("aabcd")) == bootstrap_ci([.9, .8, .7, .85])


@pytest.mark.parametrize("arguments, message", [
    (dict(groups=[1, 2]), "per case"), (dict(level=1.), "level 1.0"), (dict(level=95), "level 95")])
def test_wrong_arguments_of_the_interval(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci([.1, .2, .3], **arguments)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_p_equals_the_enumeration_of_all_flips(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    d = a - b
    flipped = [abs(sum(s * x for s, x in zip(signs, d))) for signs in product((1, -1), repeat=n)]
    expected = np.mean([f >= abs(d.sum()) - 1e-12 for f in flipped])
    assert paired_test(a, b).p == pytest.approx(expected)


@pytest.mark.parametrize("n", [12, 60])
def test_p_equals_scipys_permutation_test(n):
    rng = np.random.default_rng(n)
    b = rng.normal(size=n)
    a = b + rng.normal(.3, 1, n)
    theirs = scipy_stats.permutation_test((a, b), lambda x, y, axis: (x - y).mean(axis=axis),
                                          permutation_type="samples", n_resamples=20000, rng=0)
    assert paired_test(a, b).p == pytest.approx(theirs.pvalue, abs=.012)


def test_ties_and_zeros_need_no_rule():
    assert paired_test([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]).p == 2 / 64
    assert paired_test([1, 1, 1, 1], [1, 1, 1, 0]).p == 1.
    assert paired_test([.1 + .2, .3], [.3, .1 + .2]).p == 1.


def test_groups_flip_together():
    d, groups = np.array([.1, .1, .2, .2, .3, .3, .4, .4]), [1, 1, 2, 2, 3, 3, 4, 4]
    assert paired_test(d, 0 * d).p == 2 / 256
    assert paired_test(d, 0 * d, groups=groups).p == 2 / 16


def test_swapping_the_methods_changes_only_the_sign():
    a, b = np.random.default_rng(3).normal(size=(2, 30))
    forward, back = paired_test(a, b), paired_test(b, a)
    assert (back.difference, back.effect) == (-forward.difference, -forward.effect)
    assert back.p == forward.p and back.n == forward.n == 30
    assert (back.low, back.high) == pytest.approx((-forward.high, -forward.low), abs=.05)
    assert forward.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1))


def test_nan_pairs_are_dropped_and_counted():
    result = paired_test([.9, .8, np.nan, .7, .95], [.8, np.nan, .5, .6, .9], groups=list("abcde"))
    assert (result.n, result.dropped) == (3, 2)
    moved = paired_test([.9, .7, .95, np.nan, np.nan], [.8, .6, .9, 1, 1], groups=list("adebc"))
    assert moved == result


@pytest.mark.parametrize("a, b, difference", [
    ([], [], np.nan), ([np.nan], [1], np.nan), ([np.inf, 1], [2, 1], np.inf),
    ([np.inf, 1], [np.inf, 0], np.nan)])
def test_nothing_to_compare_is_nan_not_an_error(a, b, difference):
    result = paired_test(a, b)
    assert result.difference == pytest.approx(difference, nan_ok=True)
    assert np.isnan([result.low, result.high, result.p, result.effect]).all()


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="per case"):
        paired_test([1, 2, 3], [1, 2])


@pytest.mark.parametrize("p, expected", [
    ([.01, .04, .03, .005], [.03, .06, .06, .02]),  # .005 x 4, .01 x 3, .03 x 2, .04 < .06
    ([.2, .2, .2], [.6, .6, .6]),
    ([.9, .6, .001], [1., 1., .003]),
    ([.02, np.nan, .03], [.04, np.nan, .04]),
    ([np.nan], [np.nan]), ([], []), ([.05], [.05])])
def test_holm_by_hand(p, expected):
    assert holm(p).tolist() == pytest.approx(expected, nan_ok=True)


def test_holm_keeps_the_order_and_never_exceeds_bonferroni():
    p = np.random.default_rng(0).random(12)**3
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(1, 12 * p)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
