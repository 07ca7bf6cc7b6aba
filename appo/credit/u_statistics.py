"""Directions of gradients compared, from those of groups of responses: U-statistics and bootstrap intervals.

With g a group's gradient under some weights and r its gradient under the reference ones, the gradient of a batch of B
groups has, in expectation over its noise, the cosine

    <E g, E r> / (|E r| sqrt(|E g|^2 + (E |g|^2 - |E g|^2) / B))

with the exact reference. Every inner product of means is taken over pairs of *different* groups, so that no gradient
is compared with itself and no noise passes for signal (docs/credit.md).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Products(NamedTuple):
    """Inner products of the groups' gradients of one warm start, (n, n) each: of a method g and the reference r.

    Or of the sums over n blocks of groups. sizes: (n,) groups of each block. self_products: (n,) for each of the three,
    the sum over a block's groups of the product of a group with itself. None: every block is a group.
    """

    gg: Array
    gr: Array
    rr: Array
    sizes: Array | None = None
    self_products: tuple[Array, ...] | None = None


class Estimate(NamedTuple):
    """A value with its 95 % bootstrap interval. p: two-sided, of the value being 0. undefined: share of draws without
    a value, because the reference had no positive squared length in them."""

    value: float
    low: float
    high: float
    p: float
    undefined: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out 0, and hardly a draw was without a value."""
        return (self.low > 0 or self.high < 0) and self.undefined <= 0.05


def pair_means(products: Array, counts: Array, sizes: Array | None = None, self_products: Array | None = None) -> Array:
    """(D,) means of ``products`` (n, n) over pairs of different groups, groups counting as in ``counts`` (D, n).

    A group that counts twice makes no pair with itself either. sizes, self_products: of blocks, see `Products`. NaN
    where a draw has fewer than two groups.
    """
    sizes = np.ones(len(products)) if sizes is None else sizes
    squares = counts**2
    own = np.diag(products) if self_products is None else self_products
    total = ((counts @ products) * counts).sum(1) - squares @ own
    pairs = (counts @ sizes) ** 2 - squares @ sizes
    return np.divide(total, pairs, out=np.full(len(total), np.nan), where=pairs > 0)


def resamples(sizes: Sequence[int], draws: int, seed: int = 0) -> list[Array]:
    """Counts (1 + draws, n) for each stratum of n groups, or blocks: all ones, then bootstrap draws of n of them."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=draws)]) for n in sizes]


def moments(strata: Sequence[Products], counts: Sequence[Array]) -> tuple[Array, Array, Array, Array]:
    """<E g, E r>, |E r|^2, |E g|^2 and E |g|^2, (draws,) each, averaged over strata that count alike."""
    found = []
    for (gg, gr, rr, sizes, self_products), w in zip(strata, counts, strict=True):
        sizes = np.ones(len(gg)) if sizes is None else sizes
        gg_self, gr_self, rr_self = self_products or (np.diag(gg), np.diag(gr), np.diag(rr))
        square = (w @ gg_self) / (w @ sizes)
        means = [pair_means(p, w, sizes, s) for p, s in ((gr, gr_self), (rr, rr_self), (gg, gg_self))]
        found.append((*means, square))
    signal, reference, mean, square = np.mean(found, axis=0)
    return signal, reference, mean, square


def batch_cosine(strata: Sequence[Products], counts: Sequence[Array], batch: float) -> Array:
    """(draws,) cosine of the gradient of ``batch`` groups with the reference; batch = inf: of the mean, its bias alone.

    NaN where the reference's squared length, or the batch gradient's, is estimated as not positive.
    """
    signal, reference, mean, square = moments(strata, counts)
    length = mean + (square - mean) / batch
    good = (reference > 0) & (length > 0)
    return np.where(good, signal / np.sqrt(np.where(good, reference * length, 1.0)), np.nan)


def estimate(values: Array) -> Estimate:
    """The first value with the percentile interval of the others, which are bootstrap draws of it."""
    draws = values[1:][np.isfinite(values[1:])]
    undefined = 1 - len(draws) / max(len(values) - 1, 1)
    if not len(draws):
        return Estimate(float(values[0]), np.nan, np.nan, 1.0, undefined)
    low, high = np.percentile(draws, [2.5, 97.5])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return Estimate(float(values[0]), float(low), float(high), min(1.0, 2 * (1 + tail) / (1 + len(draws))), undefined)


def samples_ratio(cosine: Array, base: Array) -> Array:
    """Times the samples that ``base`` needs for the same cosine: the ratio of squared signal-to-noise ratios."""

    def snr2(values: Array) -> Array:
        squares = np.clip(values, 1e-6, 1 - 1e-6) ** 2
        ratio: Array = squares / (1 - squares)
        return ratio

    return snr2(cosine) / snr2(base)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's step-down procedure: reject those of at most 0.05."""
    adjusted, least = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, (len(p) - place) * p[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p}
