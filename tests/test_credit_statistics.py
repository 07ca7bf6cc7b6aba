"""The statistics of credit: U-statistics against loops over pairs, cosines and intervals against known truths."""

import itertools
import math

import numpy as np
import pytest
import torch

from appo.credit.sketch import CHUNK, CountSketch
from appo.credit.u_statistics import (
    Products,
    batch_cosine,
    estimate,
    holm,
    pair_means,
    resamples,
    samples_ratio,
)


def gradients(rng, groups, size=30, signal=1.0, noise=3.0):
    mean = np.zeros(size)
    mean[0] = signal
    return mean + noise * rng.normal(size=(groups, size)) / math.sqrt(size)


def test_pair_means_are_those_of_a_loop_over_pairs_of_different_groups():
    rng = np.random.default_rng(0)
    g, r = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    counts = np.array([[1, 1, 1, 1, 1, 1], [3, 0, 1, 0, 2, 0], [0, 0, 6, 0, 0, 0], [1, 0, 0, 1, 0, 0]], float)
    found = pair_means(g @ r.T, counts)
    for row, value in zip(counts, found, strict=True):
        drawn = [group for group, count in enumerate(row) for _ in range(int(count))]
        pairs = [g[a] @ r[b] for a, b in itertools.permutations(drawn, 2) if a != b]
        if pairs:
            assert value == pytest.approx(np.mean(pairs), rel=1e-12)
        else:
            assert math.isnan(value)


def test_pair_means_are_unbiased_where_the_mean_of_all_products_is_not():
    rng = np.random.default_rng(1)
    u, naive = [], []
    for _ in range(4000):
        g = gradients(rng, 5)
        u.append(pair_means(g @ g.T, np.ones((1, 5)))[0])
        naive.append(float(g.mean(0) @ g.mean(0)))
    assert np.mean(u) == pytest.approx(1.0, abs=4 * np.std(u) / math.sqrt(len(u)))
    assert np.mean(naive) > 2.5  # 1 + 9 / 5


def test_the_batch_cosine_is_that_of_simulated_batches():
    """The formula against batches drawn and measured, one method off the reference's direction and noisier."""
    rng = np.random.default_rng(2)
    size, batch, groups = 40, 16, 4000
    r = gradients(rng, groups, size, 1.0, 2.0)
    bias = np.zeros(size)
    bias[1] = 0.5
    g = r + bias + rng.normal(size=(groups, size)) * 0.6
    exact = np.eye(size)[0]
    batches = g.reshape(-1, batch, size).mean(1)
    measured = (batches @ exact / np.linalg.norm(batches, axis=1)).mean()
    products = Products(g @ g.T, g @ r.T, r @ r.T)
    assert batch_cosine([products], [np.ones((1, groups))], batch)[0] == pytest.approx(measured, abs=0.02)
    limit = batch_cosine([products], [np.ones((1, groups))], math.inf)[0]
    assert limit == pytest.approx(1 / math.sqrt(1.25), abs=0.02)


def test_strata_count_alike_and_are_resampled_apart():
    rng = np.random.default_rng(3)
    parts = [gradients(rng, 12), gradients(rng, 40, signal=2.0)]
    strata = [Products(g @ g.T, g @ g.T, g @ g.T) for g in parts]
    counts = resamples([12, 40], 5)
    assert [c.shape for c in counts] == [(6, 12), (6, 40)]
    assert all((c.sum(1) == c.shape[1]).all() and (c[0] == 1).all() for c in counts)
    own = [pair_means(s.gg, c[:1])[0] for s, c in zip(strata, counts, strict=True)]
    square = np.mean([np.diag(s.gg).mean() for s in strata])
    mean = np.mean(own)
    expected = math.sqrt(mean) / math.sqrt(mean + (square - mean) / 8)
    assert batch_cosine(strata, counts, 8)[0] == pytest.approx(expected)


def test_bootstrap_intervals_cover_the_truth():
    rng = np.random.default_rng(4)
    truth = 1 / math.sqrt(1 + 9 / 16)  # |E g|^2 = 1, noise 9, batches of 16; the method is the reference
    covered = []
    for number in range(120):
        g = gradients(rng, 60)
        gram = g @ g.T
        found = estimate(batch_cosine([Products(gram, gram, gram)], resamples([60], 200, number), 16))
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) > 0.85


def test_a_reference_without_length_leaves_no_value():
    gram = -np.ones((3, 3))
    found = estimate(batch_cosine([Products(gram, gram, gram)], resamples([3], 10), 16))
    assert math.isnan(found.value) and found.undefined == 1.0 and not found.resolved


def test_p_values_and_what_is_resolved():
    sure = estimate(np.concatenate([[1.0], np.linspace(0.5, 1.5, 999)]))
    assert sure.p == pytest.approx(2 / 1000) and sure.resolved
    open_ = estimate(np.concatenate([[0.1], np.linspace(-0.9, 1.1, 999)]))
    assert 0.8 < open_.p <= 1.0 and not open_.resolved


def test_holm_steps_down():
    """Worked by hand: 0.01 x 4, 0.02 x 3 = 0.06, then 0.03 x 2 = 0.06, and 0.04 may not be smaller than that."""
    adjusted = holm({"c": 0.03, "a": 0.01, "d": 0.04, "b": 0.02})
    assert adjusted == pytest.approx({"c": 0.06, "a": 0.04, "d": 0.06, "b": 0.06})
    assert list(adjusted) == ["c", "a", "d", "b"]
    assert holm({"x": 0.7, "y": 0.9}) == {"x": 1.0, "y": 1.0}


def test_samples_ratio_is_that_of_batch_sizes():
    """The cosine of a batch four times as large: c^2 / (1 - c^2) grows with the number of groups."""

    def cosine(groups):
        return np.array([1 / math.sqrt(1 + 9 / groups)])

    assert samples_ratio(cosine(64), cosine(16)) == pytest.approx([4.0])


def test_a_sketch_keeps_inner_products():
    torch.manual_seed(0)
    parameters = [torch.zeros(30, 40), torch.zeros(17), torch.zeros(5, 5)]
    sketch = CountSketch(parameters, size=4096)
    a = [torch.randn_like(p) for p in parameters]
    b = [x + torch.randn_like(x) for x in a]
    exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
    scale = math.sqrt(sum(float(x.square().sum()) for x in a) * sum(float(x.square().sum()) for x in b))
    assert abs(float(sketch(a) @ sketch(b)) - exact) < 4 * math.sqrt(2 / 4096) * scale
    # Linear, and the same in another process.
    both = [x + 2 * y for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(sketch(both), sketch(a) + 2 * sketch(b), atol=1e-4, rtol=1e-4)
    assert torch.equal(CountSketch(parameters, size=4096)(a), sketch(a))
    assert not torch.equal(CountSketch(parameters, size=4096, seed=1)(a), sketch(a))
    assert torch.equal(sketch([None, a[1], None]), sketch([torch.zeros(30, 40), a[1], torch.zeros(5, 5)]))


def test_sketches_are_unbiased_over_seeds():
    torch.manual_seed(1)
    a, b = torch.randn(50), torch.randn(50)
    found = [float(CountSketch([a], size=8, seed=s)([a]) @ CountSketch([a], size=8, seed=s)([b])) for s in range(3000)]
    assert np.mean(found) == pytest.approx(float(a @ b), abs=4 * np.std(found) / math.sqrt(len(found)))


def test_parameters_larger_than_a_chunk(monkeypatch):
    """Hashes in pieces, cached or not, give the same sketch as whole ones would of each piece."""
    a = torch.randn(1000)
    whole = CountSketch([a], size=64)([a])
    monkeypatch.setattr("appo.credit.sketch.CACHED", 0)
    assert torch.equal(CountSketch([a], size=64)([a]), whole)
    monkeypatch.setattr("appo.credit.sketch.CHUNK", 300)
    pieces = CountSketch([a], size=64)
    assert CHUNK == 1 << 24 and len(list(pieces._hash(0))) == 4
    assert float(pieces([a]).sum()) != 0 and torch.equal(pieces([a]), CountSketch([a], size=64)([a]))
