"""Means with 95 % intervals where questions of one video are not independent, and paired differences.

An estimate is a weighted sum of scores. Its standard error is that of sums over clusters, the videos (cluster-robust,
with the factor C / (C - 1)); the interval is Wilson's (J. Am. Stat. Assoc. 22, 1927) at the number of independent
answers that would have this standard error, so that it stays within 0 and 1 and has a width where all answers are
right. Differences of two models on the same questions have the normal interval of the paired scores.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # the normal distribution has 95 % within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """``value`` and its 95 % interval; the ends are NaN with fewer than two videos. ``count`` questions."""

    value: float
    low: float
    high: float
    count: int


Group = tuple[str, str]  # a group, and a part of it


def estimate(scores: Sequence[float], clusters: Sequence[Hashable], groups: Sequence[Group] | None = None) -> Estimate:
    """The mean of ``scores`` (n,) within 0 and 1.

    With ``groups`` (n,) the mean over groups of the mean over their parts of the part's mean. clusters: (n,) the video
    of each question. Raises ValueError without scores.
    """
    values = np.asarray(scores, float)
    value, error, videos = _weighted(values, clusters, groups)
    if videos < 2:
        return Estimate(value, math.nan, math.nan, len(values))
    spread = value * (1 - value)
    independent = spread / error**2 if error > 0 and spread > 0 else videos
    middle = (value + Z**2 / (2 * independent)) / (1 + Z**2 / independent)
    half = Z * math.sqrt(spread / independent + Z**2 / (4 * independent**2)) / (1 + Z**2 / independent)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(value, min(low, value), max(high, value), len(values))  # the value is within, but for rounding


def difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    groups: Sequence[Group] | None = None,
) -> Estimate:
    """The mean of ``second`` (n,) less that of ``first`` (n,), scores of the same questions."""
    values = np.asarray(second, float) - np.asarray(first, float)
    value, error, videos = _weighted(values, clusters, groups)
    half = Z * error if videos > 1 else math.nan
    return Estimate(value, value - half, value + half, len(values))


def _weighted(
    values: np.ndarray, clusters: Sequence[Hashable], groups: Sequence[Group] | None
) -> tuple[float, float, int]:
    """(mean, standard error, clusters) of ``values`` (n,), each group with the same weight."""
    if not len(values):
        raise ValueError("estimate: `scores`: expected at least one, got none.")
    labels = groups if groups is not None else [("", "")] * len(values)
    part = _numbered(labels)
    of_part = dict(zip(part.tolist(), labels, strict=True))  # part -> its group and itself, in the order of numbers
    sizes = Counter(name for name, _ in of_part.values())
    weights = np.asarray([1 / (len(sizes) * sizes[name]) for name, _ in of_part.values()])
    counts = np.bincount(part)
    means = np.bincount(part, values) / counts
    influence = (values - means[part]) * (weights / counts)[part]
    cluster = _numbered(clusters)
    sums = np.bincount(cluster, influence)
    videos = len(sums)
    variance = (sums**2).sum() * videos / (videos - 1) if videos > 1 else math.nan
    return float(means @ weights), math.sqrt(variance) if videos > 1 else math.nan, videos


def _numbered(labels: Sequence[Hashable]) -> np.ndarray:
    places: dict[Hashable, int] = {}
    return np.asarray([places.setdefault(label, len(places)) for label in labels], np.int64)
