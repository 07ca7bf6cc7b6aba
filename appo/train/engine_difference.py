"""The difference between the engine that sampled and the trainer that rescores, measured on every step's responses."""

import logging
from collections.abc import Mapping, Sequence

import torch

from appo.config import APPOConfig
from appo.train.groups import Group
from appo.train.logs import Meter

logger = logging.getLogger(__name__)

NOTICEABLE = 0.01  # difference of log-probabilities that other rounding does not make in fp32
# Above either, the two see different distributions: other positions, other pixels or other weights, not other rounding.
DRIFT_MEAN, DRIFT_SHARE = 0.1, 0.5
DRIFT_UNKNOWN = 0.1  # share of tokens without a log-probability


def measure_engine(meter: Meter, groups: Sequence[Group], config: APPOConfig, *, corrects: bool, version: int) -> None:
    """Differences of log-probabilities over the tokens of scored groups, trainer less engine.

    engine/logprob_diff: mean of the absolute differences; engine/logprob_diff_max; engine/noticeable: share of tokens
    beyond 0.01; engine/effective_sample_size: (sum r)^2 / (n sum r^2) of the ratios r, 1 where both agree;
    engine/unknown: share of tokens whose log-probability the engine did not give; engine/corrected: share whose ratio
    the correction capped, raised or masked; engine/age: steps between the weights that sampled and ``version``.
    """
    for group in groups:
        meter.add("engine/age", version - group.weight_version)
        if group.old_logprobs is None:
            continue
        unknown = group.mask & ~group.rollout_logprobs.isfinite()
        meter.add("engine/unknown", float(unknown.sum()) / max(group.tokens, 1), group.tokens)
        known = group.mask & ~unknown
        if not bool(known.any()):
            continue
        differences = (group.old_logprobs - group.rollout_logprobs).double().masked_fill(~known, 0.0)  # (G, N)
        difference, count = differences[known], int(known.sum())
        ratio = difference.exp()
        meter.add("engine/logprob_diff", difference.abs().mean(), count)
        meter.maximum("engine/logprob_diff_max", difference.abs().max())
        meter.add("engine/noticeable", (difference.abs() > NOTICEABLE).double().mean(), count)
        meter.add("engine/effective_sample_size", ratio.sum() ** 2 / (count * (ratio**2).sum()), count)
        if corrects:
            if config.rollout_level == "sequence":
                differences = differences.sum(1, keepdim=True).expand_as(differences)
            ratio = differences[known].exp()
            floor = config.rollout_floor if config.rollout_correction in ("clip", "mask") else 0.0
            meter.add("engine/corrected", ((ratio > config.rollout_cap) | (ratio < floor)).double().mean(), count)


def warn_of_drift(step: int, values: Mapping[str, float], engine: str) -> None:
    """Say so, with the reason, when engine and trainer no longer sample and score from one distribution."""
    mean, share = values.get("engine/logprob_diff", 0.0), values.get("engine/effective_sample_size", 1.0)
    reason = _reason(values)
    if reason:
        logger.warning(
            "step %d: %s and the trainer are apart: log-probabilities differ by %.3f on average (largest %.2f), the "
            "effective sample size is %.2f. %s",
            step, engine, mean, values.get("engine/logprob_diff_max", 0.0), share, reason,
        )  # fmt: skip


def _reason(values: Mapping[str, float]) -> str:
    """The likeliest reason of a difference that is more than rounding; empty without one."""
    mean, share = values.get("engine/logprob_diff", 0.0), values.get("engine/effective_sample_size", 1.0)
    if values.get("engine/unknown", 0.0) > DRIFT_UNKNOWN:
        return (
            f"The engine gave no log-probability for {values['engine/unknown']:.0%} of the tokens, which are not "
            "corrected: it has to return that of each sampled token."
        )
    if mean <= DRIFT_MEAN and share >= DRIFT_SHARE:
        return ""
    if values.get("engine/age", 0.0) > 0:
        return (
            f"Responses come from weights {values['engine/age']:.1f} steps old: a smaller learning_rate, "
            "fewer updates_per_step or asynchronous: false bring them together."
        )
    if mean <= DRIFT_MEAN:
        return (
            "Most tokens agree and few differ much: rare tokens in low precision, or a top_p or temperature that the "
            "engine applies otherwise. rollout_correction: mask leaves them out."
        )
    return (
        "Weights and version are the same, so positions, pixels or precision differ: `appo parity` shows where; a "
        "tokenizer or chat template cannot be it, since prompts are compared."
    )


def compare(group: Group) -> dict[str, float]:
    """The numbers of one group, for a table."""
    meter = Meter()
    measure_engine(meter, [group], APPOConfig(), corrects=False, version=group.weight_version)
    return meter.means()


def first_difference(group: Group, at_least: float = NOTICEABLE) -> tuple[int, int] | None:
    """(response, token) of the first token, in the order of tokens, whose log-probabilities differ noticeably."""
    assert group.old_logprobs is not None
    apart = (group.old_logprobs - group.rollout_logprobs).abs().nan_to_num(0.0) > at_least
    places = torch.nonzero((apart & group.mask).T)
    return None if not len(places) else (int(places[0, 1]), int(places[0, 0]))
