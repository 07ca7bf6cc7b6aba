"""How far the engine that sampled and the trainer that rescores are apart, measured on every step's responses."""

import logging
from collections.abc import Sequence

import torch

from appo.train.groups import Group
from appo.train.logs import Meter

logger = logging.getLogger(__name__)

NOTICEABLE = 0.01  # difference of log-probabilities that other rounding does not make in fp32
# Above either, the two see different distributions: other positions, other pixels or other weights, not other rounding.
DRIFT_MEAN, DRIFT_SHARE = 0.1, 0.5


def measure_engine(meter: Meter, groups: Sequence[Group]) -> None:
    """Differences of log-probabilities over the tokens of scored groups, trainer less engine.

    engine/logprob_diff: mean of the absolute differences; engine/logprob_diff_max; engine/noticeable: share of tokens
    beyond 0.01; engine/effective_sample_size: (sum r)^2 / (n sum r^2) of the ratios r, 1 where both agree;
    engine/unknown: share of tokens whose log-probability the engine did not give.
    """
    for group in groups:
        if group.old_logprobs is None:
            continue
        rollout = group.rollout_logprobs[group.mask]
        known = rollout.isfinite()
        meter.add("engine/unknown", 1 - known.float().mean(), group.tokens)
        if not bool(known.any()):
            continue
        difference = (group.old_logprobs[group.mask] - rollout)[known].double()
        count = len(difference)
        ratio = difference.exp()
        meter.add("engine/logprob_diff", difference.abs().mean(), count)
        meter.maximum("engine/logprob_diff_max", difference.abs().max())
        meter.add("engine/noticeable", (difference.abs() > NOTICEABLE).double().mean(), count)
        meter.add("engine/effective_sample_size", ratio.sum() ** 2 / (count * (ratio**2).sum()), count)


def warn_of_drift(step: int, values: dict[str, float], engine: str) -> None:
    """Say so when engine and trainer no longer sample and score from one distribution."""
    mean, share = values.get("engine/logprob_diff", 0.0), values.get("engine/effective_sample_size", 1.0)
    if mean > DRIFT_MEAN or share < DRIFT_SHARE:
        logger.warning(
            "step %d: %s and the trainer are apart: log-probabilities differ by %.3f on average (largest %.2f), the "
            "effective sample size is %.2f. Their weights have the same checksum, so positions, pixels or precision "
            "differ: `appo parity` shows where.",
            step,
            engine,
            mean,
            values.get("engine/logprob_diff_max", 0.0),
            share,
        )


def compare(group: Group) -> dict[str, float]:
    """The numbers of one group, for a table."""
    meter = Meter()
    measure_engine(meter, [group])
    return meter.means()


def first_difference(group: Group, at_least: float = NOTICEABLE) -> tuple[int, int] | None:
    """(response, token) of the first token, in the order of tokens, whose log-probabilities differ noticeably."""
    assert group.old_logprobs is not None
    apart = (group.old_logprobs - group.rollout_logprobs).abs().nan_to_num(0.0) > at_least
    places = torch.nonzero((apart & group.mask).T)
    return None if not len(places) else (int(places[0, 1]), int(places[0, 0]))
