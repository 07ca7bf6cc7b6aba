"""The rules by which frames are chosen and tokens weighed, unless a trainer is given other functions for it."""

from collections.abc import Callable

from torch import Tensor

from appo.config import APPOConfig
from appo.method.selection import perception_slots, select_frames
from appo.method.token_weights import token_weights
from appo.train.groups import Group, known

# (K, G, J) slots -> (K, J): how much the tokens of a slot disagree (`appo_kernels.group_divergence`).
Divergence = Callable[[Tensor], Tensor]
ChooseFrames = Callable[[Group, APPOConfig], Tensor]
WeighTokens = Callable[[Group, Divergence, APPOConfig], Tensor]


def choose_frames(group: Group, config: APPOConfig) -> Tensor:
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


def weigh_tokens(group: Group, divergence: Divergence, config: APPOConfig) -> Tensor:
    """The weight (G, N) fp32 of each token of a scored group whose frames were chosen (docs/method.md 5)."""
    frames = known(group.target_frames)
    slots = perception_slots(known(group.mass), group.mask, frames, **config.slot_arguments())
    return token_weights(divergence(slots), slots, group.mask, **config.weight_arguments())
