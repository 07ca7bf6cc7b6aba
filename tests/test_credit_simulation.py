"""The simulated policy of benchmarks.credit against the closed forms of docs/credit.md."""

import numpy as np
import pytest

from benchmarks.credit.simulate import (
    ONLY_TOLD,
    PARAMETERS,
    Policy,
    combined,
    group_gradients,
    noise_rows,
    predicted_cosine,
    train,
    wiener,
)


def test_the_score_is_the_gradient_of_the_log_probability():
    """And its mean under the reward is the exact gradient, by finite differences."""
    policy = Policy(3, np.random.default_rng(0))
    policy.theta = np.random.default_rng(1).normal(size=PARAMETERS) * 0.3
    exact = policy.gradient()
    for place in (0, 7, 40):
        step = np.zeros(PARAMETERS)
        step[place] = 1e-5
        ends = []
        for sign in (1, -1):
            moved = Policy(3, np.random.default_rng(0))
            moved.theta = policy.theta + sign * step
            ends.append(moved.probabilities()[0, 0])
        assert exact[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_only_the_token_that_earns_the_reward_has_a_mean_gradient():
    policy, rng = Policy(5, np.random.default_rng(2)), np.random.default_rng(3)
    each = np.concatenate([group_gradients(policy, 500, rng) for _ in range(8)])
    error = each.std(0) / np.sqrt(len(each))
    assert (np.abs(each.mean(0)[1:]) < 5 * error[1:]).all()
    cosine = each.mean(0)[0] @ policy.gradient()
    assert cosine / np.linalg.norm(each.mean(0)[0]) / np.linalg.norm(policy.gradient()) > 0.98


def test_cosines_are_as_predicted():
    """Drawn batches against the closed form: few tokens, many, certain ones; two seeds keep it short."""
    for row in noise_rows(seeds=2):
        if row["irrelevant"] > 100:
            continue
        for weight in (1.0, 2.7, ONLY_TOLD):
            assert row[f"drawn {weight}"] == pytest.approx(row[f"predicted {weight}"], abs=0.05), row


def test_certain_tokens_add_no_noise_and_leave_nothing_to_gain():
    rng = np.random.default_rng(4)
    certain = group_gradients(Policy(48, np.random.default_rng(5), entropy=0.0), 400, rng)
    uncertain = group_gradients(Policy(48, np.random.default_rng(5), entropy=1.0), 400, rng)
    assert certain[:, 1:].sum(1).var(0).sum() < 0.1 * uncertain[:, 1:].sum(1).var(0).sum()


def test_the_gain_is_at_most_the_square_of_the_weight():
    for other in (0.0, 1.0, 1e3, 1e9):
        one, high = (predicted_cosine(1.0, 1.0, other, weight, 16) for weight in (1.0, 2.7))
        gain = (high**2 / (1 - high**2)) / (one**2 / (1 - one**2))
        assert 1 - 1e-9 <= gain <= 2.7**2 + 1e-6


def test_wiener_weights_are_the_best_of_all():
    """No change of a weight brings the mean squared distance to the exact gradient down."""
    rng = np.random.default_rng(6)
    means, noise = rng.normal(size=(4, 6)), np.diag(rng.uniform(0.5, 3.0, 4))
    best = wiener(means, noise, 16.0)

    def distance(weights):
        return ((weights @ means - means.sum(0)) ** 2).sum() + weights @ noise @ weights / 16.0

    assert all(distance(best) < distance(best + 0.05 * rng.normal(size=4)) for _ in range(50))
    # Orthogonal tokens: signal over signal plus noise. Without a signal of its own: 0.
    means = np.diag([2.0, 1.0, 0.0])
    noise = np.diag([4.0, 2.0, 3.0])
    np.testing.assert_allclose(wiener(means, noise, 2.0), [4 / (4 + 2), 1 / (1 + 1), 0.0], atol=1e-12)
    np.testing.assert_allclose(wiener(means[:2], noise[:2, :2], 1e9), [1.0, 1.0], atol=1e-6)


def test_adam_cares_for_ratios_of_weights_only():
    """All weights 2.7 times as large: another step for SGD, hardly another for Adam."""
    settings = {"weight": 1.0, "seed": 0, "steps": 15, "groups": 4}
    adam = [train(8, "adam", factor=factor, **settings) for factor in (1.0, 2.7)]
    sgd = [train(8, "sgd", factor=factor, **settings) for factor in (1.0, 2.7)]
    assert adam[0] == pytest.approx(adam[1], abs=1e-4)
    assert sgd[1] > sgd[0] + 0.05


def test_weights_are_on_the_first_token():
    each = np.arange(12.0).reshape(1, 3, 4)
    np.testing.assert_array_equal(combined(each, ONLY_TOLD), each[:, 0])
    np.testing.assert_array_equal(combined(each, 2.0), 2 * each[:, 0] + each[:, 1] + each[:, 2])
