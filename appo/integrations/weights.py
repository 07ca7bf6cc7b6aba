"""From what a scoring forward knows to token weights: the one function that all adapters call."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.integrations.before_training import check_served
from appo.train.rules import choose_frames, weigh_tokens
from appo_kernels import TokenLogprobs, checks, group_divergence, token_logprobs


class GroupWeights(NamedTuple):
    """Of B = groups x G responses of N tokens."""

    weights: Tensor  # (B, N) fp32: W, 1 where nothing is to be weighed
    logprobs: Tensor  # (B, N) fp32: of the response tokens, 0 at masked ones
    frames: list[Tensor]  # (K,) int64 for each group: its key frames; none but for the method "appo"


@dataclass
class Responses:
    """The G responses to a prompt, as a rule may read them (`appo.train.rules.Scored`)."""

    mask: Tensor
    accuracy: Tensor
    mass: Tensor | None
    entropy: Tensor | None
    old_logprobs: Tensor | None
    target_frames: Tensor | None = None


@torch.no_grad()
def group_weights(
    mass: Tensor,
    mask: Tensor,
    rewards: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    config: APPOConfig,
    group_size: int,
    scored: TokenLogprobs | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> GroupWeights:
    """Token weights of whole groups, which lie one after another, by the rule of ``config.method``.

    Args:
        mass: (B, N, F) frame mass of each response token, from ``record_frame_mass``; 0 at frames that a prompt does
            not have. Groups without frames have W = 1, but with TW-GRPO.
        mask: (B, N) bool, True at tokens that are trained on: not at padding, nor at what a tool wrote.
        rewards: (B,) accuracy of each response, which divides right from wrong at ``config.threshold``.
        hidden: (B, N, D) final hidden states of the rows that predict the response tokens.
        weight, bias: (V, D) and (V,) of the language-model head.
        targets: (B, N) int64, the response tokens.
        config: ``method`` and the settings of its rule are read (docs/own_method.md): of "appo" ``strategy``,
            ``top_tokens``, ``top_frames``, ``threshold``, ``slot_tokens``, ``token_score``, ``disagreement``,
            ``divergence``, ``alpha``, ``average`` and ``normalise``.
        group_size: G; B is a multiple of it.
        scored: what ``token_logprobs`` found for the response tokens, each field (B, N); None: it is computed.
        temperature, softcap: of the logits, as sampled.

    Raises:
        ValueError: B is no multiple of ``group_size``, the arguments do not fit each other, or ``config`` asks for more
            than token weights (see `check_served`).
    """
    op = "group_weights"
    check_served(config)
    checks.rank(op, "mass", mass, 3, "(B, N, F)")
    B, N = mass.shape[:2]
    checks.shape(op, "mask", mask, (B, N), "(B, N)", "Pass one entry per response token.")
    checks.shape(op, "rewards", rewards, (B,), "(B,)", "Pass one accuracy per response.")
    checks.shape(op, "targets", targets, (B, N), "(B, N)", "Pass the response tokens.")
    if group_size < 1 or B % group_size:
        checks.fail(op, "group_size", f"a divisor of the {B} responses", group_size, "Pass whole groups.")
    logits = {"temperature": temperature, "softcap": softcap}
    if scored is None:
        found = token_logprobs(hidden[mask], weight, targets[mask], bias=bias, **logits)  # type: ignore[arg-type]
        scored = TokenLogprobs(*(mass.new_zeros(B, N).masked_scatter(mask, x.float()) for x in found))
    checks.shape(op, "scored", scored.lse, (B, N), "(B, N)", "Pass the values of the response tokens.")
    logprobs, lse = scored.logprobs.masked_fill(~mask, 0), scored.lse.float()
    weights, frames = torch.ones(B, N, device=mass.device), []
    for start in range(0, B, group_size):
        own = slice(start, start + group_size)
        # A prompt with fewer frames than others has no mass in the last columns.
        looked = (mass[own] * mask[own, :, None]).amax((0, 1)).nonzero().flatten()
        num_frames = int(looked[-1]) + 1 if len(looked) else 0
        group = Responses(
            mask[own], rewards[own], mass[own, :, :num_frames], scored.entropy[own], logprobs[own]
        )  # fmt: skip

        def divergence(slots: Tensor, own: slice = own) -> Tensor:
            return group_divergence(
                hidden[own], weight, lse[own], slots, kind=config.divergence, bias=bias, **logits  # type: ignore[arg-type]
            )  # fmt: skip

        if config.weighs(num_frames) and bool(mask[own].any()):
            if config.method == "appo":
                group.target_frames = choose_frames(group, config)
            weights[own] = weigh_tokens(group, divergence, config)
        frames.append(torch.empty(0, dtype=torch.int64) if group.target_frames is None else group.target_frames)
    return GroupWeights(weights, logprobs, frames)
