"""The rules by which frames are chosen and tokens weighed, unless a trainer is given other functions for it."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.method.disagreement import slot_disagreement
from appo.method.selection import perception_slots, position_slots, select_frames
from appo.method.token_weights import token_weights
from appo.method.visual_dependence import filtered_weights, gated_weights
from appo.rollout.user_code import UserCodeError, user_errors, user_function
from appo.train.groups import known
from appo_kernels import checks


class Scored(Protocol):
    """The attributes that a rule may read of the G responses to a prompt, N tokens each, here and in other trainers."""

    mask: Tensor  # (G, N) bool: the response's tokens
    accuracy: Tensor  # (G,) fp32: what divides right from wrong
    mass: Tensor | None  # (G, N, F) fp32: what each token looked at; None without frames, or where nothing is recorded
    entropy: Tensor | None  # (G, N) fp32, nats
    old_logprobs: Tensor | None  # (G, N) fp32, of the sampled tokens
    target_frames: Tensor | None  # (K,) int64: the key frames, of the method "appo"


# (K, G, J) slots -> (K, J): how much the tokens of a slot disagree (`appo_kernels.group_divergence`).
Divergence = Callable[[Tensor], Tensor]
ChooseFrames = Callable[[Any, APPOConfig], Tensor]  # of a `Scored` group
WeighTokens = Callable[[Any, Divergence, APPOConfig], Tensor]


def choose_frames(group: Scored, config: APPOConfig) -> Tensor:
    """The target frames (K,) int64 of a scored group (docs/method.md 4)."""
    return select_frames(
        known(group.mass),
        group.mask,
        group.accuracy,
        strategy=config.strategy,
        top_tokens=config.top_tokens,
        top_frames=config.top_frames,
        threshold=config.threshold,
    )


def weigh_tokens(group: Scored, divergence: Divergence, config: APPOConfig) -> Tensor:
    """The weight (G, N) fp32 of each token of a scored group, by the rule of ``config.method``.

    Raises UserCodeError where a rule of a user's file fails, or returns other things than weights.
    """
    if config.method in RULES:
        return RULES[config.method](group, divergence, config)
    prompt = getattr(group, "prompt", None)  # which groups of other trainers do not have
    place = f"method {config.method}" + (f": {prompt.record.place}" if prompt else "")
    with user_errors(place, config.method):
        weights = user_function(config.method, "method")(group, divergence, config)
    try:
        return _checked(weights, group.mask, place)
    except ValueError as error:
        raise UserCodeError(str(error)) from error


def _checked(weights: Any, mask: Tensor, op: str) -> Tensor:
    """The weights (G, N) fp32 that a user's rule returned, 1 outside of ``mask``. Raises ValueError."""
    checks.tensor(op, "weights", weights)
    checks.shape(op, "weights", weights, tuple(mask.shape), "(G, N)", "Return one weight for each token of the group.")
    weights = torch.where(mask, weights.detach().float(), 1.0)
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero().tolist()
    if wrong:
        (response, token), others = wrong[0], f" ({len(wrong)} such)" if len(wrong) > 1 else ""
        got = f"{float(weights[response, token]):g} at response {response}, token {token}{others}"
        checks.fail(op, "weights", "finite numbers >= 0 at valid tokens", got, "Clamp them, or look for NaN.")
    return weights


def _by_frames(group: Scored, divergence: Divergence, config: APPOConfig) -> Tensor:
    """APPO: disagreement of the tokens that look at the group's key frames (docs/method.md 5)."""
    frames = known(group.target_frames)
    slots = perception_slots(known(group.mass), group.mask, frames, **config.slot_arguments())
    values = slot_disagreement(config.disagreement, slots, divergence, group.entropy)
    return token_weights(values, slots, group.mask, **config.weight_arguments())


def _by_position(group: Scored, divergence: Divergence, config: APPOConfig) -> Tensor:
    """TW-GRPO: disagreement of the tokens at the same position."""
    slots = position_slots(group.mask)
    return token_weights(divergence(slots), slots, group.mask, **config.weight_arguments())


def _filtered(group: Scored, divergence: Divergence, config: APPOConfig) -> Tensor:
    """VPPO, with frame mass as a token's dependence on the video: it takes no second forward."""
    score = known(group.mass).sum(-1)
    return filtered_weights(score, group.mask, share=config.token_share, floor=config.factor_floor)


def _gated(group: Scored, divergence: Divergence, config: APPOConfig) -> Tensor:
    """PGPO's gate and normalisation, with frame mass as a token's dependence on the video."""
    score, share = known(group.mass).sum(-1), config.token_share
    return gated_weights(score, group.mask, share=share, alpha=config.alpha, normalise=config.normalise)


# By ``config.method``; "grpo" weighs nothing.
RULES: dict[str, WeighTokens] = {"appo": _by_frames, "tw-grpo": _by_position, "vppo": _filtered, "pgpo": _gated}
