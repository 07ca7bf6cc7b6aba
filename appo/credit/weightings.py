"""The ways of weighting tokens that are compared: settings of the same functions that training calls, and controls."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.credit.told import Told
from appo.method.token_filters import top_entropy_tokens
from appo.method.token_weights import token_weights
from appo.method.visual_dependence import position_slots
from appo.train.groups import Group, known
from appo.train.rules import Divergence, choose_frames, weigh_tokens

# (settings) -> (slots -> divergence): a run's divergence, of the kind that its settings name.
Divergences = Callable[[APPOConfig], Divergence]


@dataclass(frozen=True)
class Scored:
    """What weights are made of: a scored group, its divergences, and the tokens that tell, where they are known."""

    group: Group
    divergences: Divergences
    config: APPOConfig
    told: Told | None = None

    @property
    def key_frames(self) -> list[int]:
        return self.group.prompt.crucial_frames()

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

    make: the weights (G, N). about: what it is, in a few words. looks: whether it needs a video. frames: whether it
    needs a record whose key frames are known. told: whether it needs responses whose telling tokens are known. sum_of:
    instead of weights, factors of other rows: gradients are linear in weights.
    """

    about: str
    make: Callable[[Scored], Tensor] | None = None
    looks: bool = False
    frames: bool = False
    told: bool = False
    sum_of: dict[str, float] = field(default_factory=dict)


def ones(scored: Scored) -> Tensor:
    return torch.ones_like(scored.group.rollout_logprobs)


def response_mean(scored: Scored) -> Tensor:
    """One over a response's length, times the group's mean length: GRPO's mean over tokens, then over responses."""
    lengths = scored.group.mask.sum(1, keepdim=True).clamp(min=1).float()
    return (lengths.mean() / lengths).expand(scored.group.mask.shape)


def told_only(scored: Scored) -> Tensor:
    assert scored.told is not None
    return scored.told.told.float()


def sentence_only(scored: Scored) -> Tensor:
    assert scored.told is not None
    return scored.told.sentence.float()


def on_key_frames(scored: Scored, **changes: Any) -> Tensor:
    return scored.weights_on(torch.tensor(scored.key_frames), replace(scored.config, **changes))


def shuffled(scored: Scored) -> Tensor:
    """The weights of "all", each response's at random places."""
    weights, group = scored.weights(strategy="all"), scored.group
    generator = torch.Generator().manual_seed(int(group.completion_ids.sum()))
    for row, valid in zip(weights, group.mask, strict=True):
        places = valid.nonzero().flatten()
        row[places] = row[places[torch.randperm(len(places), generator=generator)]]
    return weights


def entropy_sorted(scored: Scored) -> Tensor:
    """The weights of "all", each response's largest at its most uncertain tokens."""
    weights, group = scored.weights(strategy="all"), scored.group
    for row, entropy, valid in zip(weights, known(group.entropy), group.mask, strict=True):
        places = valid.nonzero().flatten()
        row[places[entropy[places].argsort(stable=True)]] = row[places].sort().values
    return weights


def top_fifth(scored: Scored) -> Tensor:
    return top_entropy_tokens(known(scored.group.entropy), scored.group.mask, share=0.2)


def middle_entropy(scored: Scored) -> Tensor:
    """H (2.5 - H), 0 above 2.5 nats, over its largest in the response: neither certain nor any word."""
    entropy, mask = known(scored.group.entropy), scored.group.mask
    value = (entropy * (2.5 - entropy).clamp(min=0)).masked_fill(~mask, 0)
    return value / value.amax(1, keepdim=True).clamp(min=1e-9)


def entropy_alone(scored: Scored) -> Tensor:
    """Those of "together" without a look: each token's entropy, brought to 1 .. 1 + alpha, of mean 1."""
    mask = scored.group.mask
    entropy = known(scored.group.entropy)[None]
    return token_weights(entropy, position_slots(mask), mask, alpha=scored.config.alpha, normalise="mean")


def by_position(scored: Scored) -> Tensor:
    """TW-GRPO (arXiv 2505.24718): the k3 divergence of the group at each position, brought to 1 .. 1.7."""
    mask = scored.group.mask
    slots = position_slots(mask)
    divergence = scored.divergences(replace(scored.config, divergence="k3"))
    return token_weights(divergence(slots), slots, mask, alpha=0.7, average="member")


def setting(**changes: Any) -> Callable[[Scored], Tensor]:
    return lambda scored: scored.weights(**changes)


BASE = "grpo"
# Rules of our own, each change to "all" alone and together (docs/method.md 4, 5).
TOGETHER = {"strategy": "common", "token_score": "share", "disagreement": "entropy", "normalise": "mean"}
RELEASED = {"strategy": "all", "divergence": "k3", "alpha": 0.7, "average": "member"}
WEIGHTINGS: dict[str, Weighting] = {
    BASE: Weighting("W = 1, summed over tokens: GRPO with DAPO's token loss", ones),
    "grpo-response-mean": Weighting("W = 1, the mean over tokens, then responses: GRPO's own", response_mean),
    "only-told": Weighting("1 on the words that tell, 0 elsewhere", told_only, told=True),
    "sentence": Weighting("1 on the sentence that tells and the answer, 0 elsewhere", sentence_only, told=True),
    "oracle": Weighting("2.7 on the words that tell, 1 elsewhere", told=True, sum_of={BASE: 1.0, "only-told": 1.7}),
    "hard": Weighting("APPO, the paper's", setting(strategy="hard"), looks=True),
    "soft": Weighting("APPO, frames of right responses", setting(strategy="soft"), looks=True),
    "contrast": Weighting("APPO, frames that right responses look at more", setting(strategy="contrast"), looks=True),
    "all": Weighting("APPO, frames of all responses", setting(strategy="all"), looks=True),
    "released": Weighting("APPO as its authors released it", setting(**RELEASED), looks=True),
    "true-frames": Weighting("APPO, the key frames given", on_key_frames, looks=True, frames=True),
    "shuffled": Weighting("those of `all` at random places", shuffled, looks=True),
    "entropy-sorted": Weighting("those of `all`, the largest at the most uncertain tokens", entropy_sorted, looks=True),
    "80/20": Weighting("1 on the fifth of the group's tokens with most entropy, 0 elsewhere", top_fifth),
    "middle-entropy": Weighting("in proportion to H (2.5 - H)", middle_entropy),
    "entropy-alone": Weighting("1 to 2.7 by entropy, of mean 1; no look at the video", entropy_alone),
    "tw-grpo": Weighting("TW-GRPO: divergence by position", by_position, looks=True),
    # Its term is the divergence from the attention that sampled, which is at its least, 0, in the first update.
    "ral": Weighting("RAL: at ratio 1 its gradient is that of W = 1", sum_of={BASE: 1.0}),
    "common": Weighting(
        "ours: frames that responses look at most, right and wrong", setting(strategy="common"), looks=True
    ),
    "share": Weighting("ours: `all`, tokens by share", setting(strategy="all", token_score="share"), looks=True),
    "entropy": Weighting(
        "ours: `all`, entropy of a token", setting(strategy="all", disagreement="entropy"), looks=True
    ),
    "mixture": Weighting("ours: `all`, entropy of a slot", setting(strategy="all", disagreement="mixture"), looks=True),
    "mean-one": Weighting("ours: `all`, weights of mean 1", setting(strategy="all", normalise="mean"), looks=True),
    "together": Weighting("ours: common frames, share, entropy, mean 1", setting(**TOGETHER), looks=True),
    "together-true-frames": Weighting(
        "`together`, the key frames given", lambda scored: on_key_frames(scored, **TOGETHER), looks=True, frames=True
    ),
}
