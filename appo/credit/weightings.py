"""The ways of weighting tokens that are compared: settings of the same functions that training calls, and controls."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.credit.evidence import Evidence
from appo.method.selection import position_slots
from appo.method.token_filters import top_entropy_tokens
from appo.method.token_weights import token_weights
from appo.presets import PAPER_AND_BASELINES
from appo.train.groups import Group, known
from appo.train.rules import Divergence, choose_frames, weigh_tokens

# (settings) -> (slots -> divergence): a run's divergence, of the kind that its settings name.
Divergences = Callable[[APPOConfig], Divergence]


@dataclass(frozen=True)
class ScoredGroup:
    """A scored group with its divergences and, where they are known, its evidence tokens: weights are made of it."""

    group: Group
    divergences: Divergences
    config: APPOConfig
    evidence: Evidence | None = None

    @property
    def labelled_frames(self) -> list[int]:
        return self.group.prompt.labelled_frames()

    def weights(self, **changes: Any) -> Tensor:
        """APPO's weights (G, N) under the run's settings with ``changes``."""
        config = replace(self.config, **changes)
        return self.weights_on(choose_frames(self.group, config), config)

    def weights_on(self, frames: Tensor, config: APPOConfig) -> Tensor:
        """APPO's weights (G, N) with the target frames given."""
        group = replace(self.group, target_frames=frames)
        return weigh_tokens(group, self.divergences(config), config)


@dataclass(frozen=True)
class Weighting:
    """A row of the comparison.

    make: the weights (G, N). about: what it is, in a few words. looks: whether it needs a video. labels: whether it
    needs a record that labels the frames which decide. evidence: whether it needs responses whose evidence tokens are
    known. sum_of: instead of weights, factors of other rows: gradients are linear in weights.
    """

    about: str
    make: Callable[[ScoredGroup], Tensor] | None = None
    looks: bool = False
    labels: bool = False
    evidence: bool = False
    sum_of: dict[str, float] = field(default_factory=dict)


def ones(scored: ScoredGroup) -> Tensor:
    return torch.ones_like(scored.group.rollout_logprobs)


def response_mean(scored: ScoredGroup) -> Tensor:
    """One over a response's length, times the group's mean length: GRPO's mean over tokens, then over responses."""
    lengths = scored.group.mask.sum(1, keepdim=True).clamp(min=1).float()
    return (lengths.mean() / lengths).expand(scored.group.mask.shape)


def evidence_only(scored: ScoredGroup) -> Tensor:
    assert scored.evidence is not None
    return scored.evidence.tokens.float()


def sentence_only(scored: ScoredGroup) -> Tensor:
    assert scored.evidence is not None
    return scored.evidence.sentence.float()


def on_labelled_frames(scored: ScoredGroup, **changes: Any) -> Tensor:
    return scored.weights_on(torch.tensor(scored.labelled_frames), replace(scored.config, **changes))


def shuffled_within_responses(weights: Tensor, group: Group) -> Tensor:
    """``weights`` (G, N), changed in place: each response's at random places. Only their sizes are left."""
    generator = torch.Generator().manual_seed(int(group.completion_ids.sum()))
    for row, valid in zip(weights, group.mask, strict=True):
        places = valid.nonzero().flatten()
        row[places] = row[places[torch.randperm(len(places), generator=generator)]]
    return weights


def sorted_by_entropy(weights: Tensor, group: Group) -> Tensor:
    """``weights`` (G, N), changed in place: each response's largest at its most uncertain tokens."""
    for row, entropy, valid in zip(weights, known(group.entropy), group.mask, strict=True):
        places = valid.nonzero().flatten()
        row[places[entropy[places].argsort(stable=True)]] = row[places].sort().values
    return weights


def top_fifth(scored: ScoredGroup) -> Tensor:
    return top_entropy_tokens(known(scored.group.entropy), scored.group.mask, share=0.2)


def middle_entropy(scored: ScoredGroup) -> Tensor:
    """H (2.5 - H), 0 above 2.5 nats, over its largest in the response: neither certain nor any word."""
    entropy, mask = known(scored.group.entropy), scored.group.mask
    value = (entropy * (2.5 - entropy).clamp(min=0)).masked_fill(~mask, 0)
    return value / value.amax(1, keepdim=True).clamp(min=1e-9)


def entropy_alone(scored: ScoredGroup) -> Tensor:
    """``TOGETHER`` without attention: every token weighed by its entropy, 1 to 1 + alpha, of mean 1."""
    mask = scored.group.mask
    entropy = known(scored.group.entropy)[None]
    return token_weights(entropy, position_slots(mask), mask, alpha=scored.config.alpha, normalise="mean")


def by_position(scored: ScoredGroup) -> Tensor:
    """TW-GRPO (arXiv 2505.24718): the k3 divergence of the group at each position, brought to 1 .. 1.7."""
    mask = scored.group.mask
    slots = position_slots(mask)
    divergence = scored.divergences(replace(scored.config, divergence="k3"))
    return token_weights(divergence(slots), slots, mask, alpha=0.7, average="member")


def under_settings(**changes: Any) -> Callable[[ScoredGroup], Tensor]:
    """APPO's weights under the run's settings with ``changes``, as the ``make`` of a row."""
    return lambda scored: scored.weights(**changes)


BASE = "grpo"
# Rules of our own, each change to "all" alone and together (docs/method.md 4, 5).
TOGETHER = {"strategy": "common", "token_score": "share", "disagreement": "entropy", "normalise": "mean"}
# The frame of the highest peak, and slots of the few tokens that make it: chosen on a warm start of its own
# (benchmarks/credit/PREREGISTRATION.md, the second registration).
PEAK = {"strategy": "peak", "top_tokens": 1, "top_frames": 1}
COMMON_ONE = TOGETHER | {"top_tokens": 1, "top_frames": 1, "slot_tokens": 4}
PEAK_TOGETHER = COMMON_ONE | PEAK
# Of the preset, what makes weights; slots are as many as the run's, as in every row.
RELEASED = {
    name: value for name, value in PAPER_AND_BASELINES["released"].items() if name not in ("rewards", "slot_tokens")
}
WEIGHTINGS: dict[str, Weighting] = {
    BASE: Weighting("W = 1, summed over tokens: GRPO with DAPO's token loss", ones),
    "grpo-response-mean": Weighting("W = 1, the mean over tokens, then responses: GRPO's own", response_mean),
    "only-told": Weighting("1 on evidence tokens, 0 elsewhere", evidence_only, evidence=True),
    "sentence": Weighting(
        "1 on the sentence of the evidence and the answer, 0 elsewhere", sentence_only, evidence=True
    ),
    "oracle": Weighting("2.7 on evidence tokens, 1 elsewhere", evidence=True, sum_of={BASE: 1.0, "only-told": 1.7}),
    "hard": Weighting("APPO, the paper's", under_settings(strategy="hard"), looks=True),
    "soft": Weighting("APPO, frames of right responses", under_settings(strategy="soft"), looks=True),
    "contrast": Weighting(
        "APPO, frames that right responses look at more", under_settings(strategy="contrast"), looks=True
    ),
    "all": Weighting("APPO, frames of all responses", under_settings(strategy="all"), looks=True),
    "released": Weighting("APPO as its authors released it", under_settings(**RELEASED), looks=True),
    "true-frames": Weighting("APPO, the labelled frames given", on_labelled_frames, looks=True, labels=True),
    "shuffled": Weighting(
        "those of `all` at random places",
        lambda scored: shuffled_within_responses(scored.weights(strategy="all"), scored.group),
        looks=True,
    ),
    "entropy-sorted": Weighting(
        "those of `all`, the largest at the most uncertain tokens",
        lambda scored: sorted_by_entropy(scored.weights(strategy="all"), scored.group),
        looks=True,
    ),
    "80/20": Weighting("1 on the fifth of the group's tokens with most entropy, 0 elsewhere", top_fifth),
    "middle-entropy": Weighting("in proportion to H (2.5 - H)", middle_entropy),
    "entropy-alone": Weighting("1 to 2.7 by entropy, of mean 1; no look at the video", entropy_alone),
    "tw-grpo": Weighting("TW-GRPO: divergence by position", by_position, looks=True),
    # Its term is the divergence from the attention that sampled, which is at its least, 0, in the first update.
    "ral": Weighting("RAL: at ratio 1 its gradient is that of W = 1", sum_of={BASE: 1.0}),
    "common": Weighting(
        "ours: frames that responses look at most, right and wrong", under_settings(strategy="common"), looks=True
    ),
    "share": Weighting("ours: `all`, tokens by share", under_settings(strategy="all", token_score="share"), looks=True),
    "entropy": Weighting(
        "ours: `all`, entropy of a token", under_settings(strategy="all", disagreement="entropy"), looks=True
    ),
    "mixture": Weighting(
        "ours: `all`, entropy of a slot", under_settings(strategy="all", disagreement="mixture"), looks=True
    ),
    "mean-one": Weighting(
        "ours: `all`, weights of mean 1", under_settings(strategy="all", normalise="mean"), looks=True
    ),
    "together": Weighting("ours: common frames, share, entropy, mean 1", under_settings(**TOGETHER), looks=True),
    "together-true-frames": Weighting(
        "`together`, the labelled frames given",
        lambda scored: on_labelled_frames(scored, **TOGETHER),
        looks=True,
        labels=True,
    ),
    "peak": Weighting("ours: `all`, the frame of the highest peak", under_settings(**PEAK), looks=True),
    "common-one": Weighting(
        "`together`, one frame, few tokens: a control of `peak-together`", under_settings(**COMMON_ONE), looks=True
    ),
    "peak-together": Weighting(
        "ours: the frame of the highest peak, few tokens by share, entropy, mean 1",
        under_settings(**PEAK_TOGETHER),
        looks=True,
    ),
}
