"""Means with intervals over videos: closed forms, equal weights of groups, coverage, pairs."""

import math

import numpy as np
import pytest

from appo.evaluation.intervals import Z, difference, estimate


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's interval written out: the roots of (p - x)^2 = z^2 x (1 - x) / n in x."""
    a, b, c = 1 + Z**2 / n, -(2 * right / n + Z**2 / n), (right / n) ** 2
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


# In the middle, and one answer away from none and from all.
@pytest.mark.parametrize("right, n", [(40, 100), (1, 30), (299, 300)])
def test_independent_answers_have_wilsons_interval(right, n):
    found = estimate([1.0] * right + [0.0] * (n - right), range(n))
    # The standard error of independent clusters has n - 1 where Wilson's has n.
    assert (found.value, found.count) == (right / n, n)
    assert (found.low, found.high) == pytest.approx(wilson(right / n * (n - 1), n - 1), abs=1e-9)


def test_four_equal_answers_about_each_video_count_once():
    once = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    found, four = estimate(once, range(6)), estimate(once * 4, [*range(6)] * 4)
    assert (four.value, four.low, four.high) == pytest.approx((found.value, found.low, found.high))


# Where a normal interval has no width: all wrong, all right.
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_all_answers_alike_still_have_a_width(score):
    found = estimate([score] * 20, range(20))
    assert found.high - found.low == pytest.approx(Z**2 / (20 + Z**2))


def test_one_video_has_no_interval():
    found = estimate([1.0, 0.0], ["v", "v"])
    assert found.value == 0.5 and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(difference([1.0], [0.0], ["v"]).low)


def test_groups_and_their_parts_weigh_alike():
    scores = [1.0, 0.0, 0.0, 1.0, 1.0]
    groups = [("a", "x"), ("a", "x"), ("a", "y"), ("b", ""), ("b", "")]
    # a: the mean of x (0.5) and y (0), b: 1
    assert estimate(scores, range(5), groups).value == pytest.approx((0.25 + 1) / 2)
    assert difference([0.0] * 5, scores, range(5), groups).value == pytest.approx((0.25 + 1) / 2)


def test_the_standard_error_of_group_means_is_that_of_their_parts():
    chance = np.random.default_rng(0)
    first, second = chance.random(50), chance.random(200)
    found = difference([0.0] * 250, [*first, *second], range(250), [("a", "")] * 50 + [("b", "")] * 200)
    error = math.sqrt(first.var() / 50 + second.var() / 200) / 2
    assert (found.high - found.low) / (2 * Z) == pytest.approx(error, rel=0.01)


def test_intervals_cover_the_truth_where_answers_about_a_video_are_alike():
    # 300 draws of 60 videos with 5 questions each; the answers about a video share a random ability. 95 % of the
    # intervals hold 0.6, of 300 at least 0.91 with all but one chance in a thousand. Without clusters 60 % would.
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        ability = chance.beta(1.2, 0.8, 60).repeat(5)
        found = estimate((chance.random(300) < ability).astype(float).tolist(), [*np.arange(60).repeat(5)])
        covered += found.low <= 0.6 <= found.high
    assert covered / 300 > 0.91


def test_pairs_are_compared_question_by_question():
    first, second = [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    found = difference(first, second, "abcd")
    spread = math.sqrt(4 / 3 * sum((d - 0.25) ** 2 for d in (0, 1, 0, 0)) / 16)
    assert found.value == 0.25
    assert (found.low, found.high) == pytest.approx((0.25 - Z * spread, 0.25 + Z * spread))


def test_no_scores_are_refused():
    with pytest.raises(ValueError, match="`scores`: expected at least one"):
        estimate([], [])
