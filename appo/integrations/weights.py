"""From what a scoring forward knows to token weights: the one function that all adapters call."""

from typing import NamedTuple

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.method.selection import perception_slots, select_frames
from appo.method.token_weights import token_weights
from appo_kernels import TokenLogprobs, checks, group_divergence, token_logprobs


class GroupWeights(NamedTuple):
    """Of B = groups x G responses of N tokens."""

    weights: Tensor  # (B, N) fp32: W, 1 where nothing is to be weighed
    logprobs: Tensor  # (B, N) fp32: of the response tokens, 0 at masked ones
    frames: list[Tensor]  # (K,) int64 for each group: its key frames


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
    """Token weights of whole groups, which lie one after another (docs/method.md eqs. 6, 10, 14).

    Args:
        mass: (B, N, F) frame mass of each response token, from ``record_frame_mass``; F may be 0, and then W = 1.
        mask: (B, N) bool, True at tokens that are trained on: not at padding, nor at what a tool wrote.
        rewards: (B,) accuracy of each response, which divides right from wrong at ``config.threshold``.
        hidden: (B, N, D) final hidden states of the rows that predict the response tokens.
        weight, bias: (V, D) and (V,) of the language-model head.
        targets: (B, N) int64, the response tokens.
        config: ``strategy``, ``top_tokens``, ``top_frames``, ``threshold``, ``slot_tokens``, ``token_score``,
            ``divergence``, ``alpha``, ``average`` and ``normalise`` are read.
        group_size: G; B is a multiple of it.
        scored: what ``token_logprobs`` found for the response tokens, each field (B, N); None: it is computed.
        temperature, softcap: of the logits, as sampled.

    Raises:
        ValueError: B is no multiple of ``group_size``, or the arguments do not fit each other.
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
    if mass.shape[2] == 0:
        mass = mass.new_zeros(B, N, 1)  # a frame that nobody looks at is never chosen
    logits = {"temperature": temperature, "softcap": softcap}
    if scored is None:
        found = token_logprobs(hidden[mask], weight, targets[mask], bias=bias, **logits)  # type: ignore[arg-type]
        scored = TokenLogprobs(*(mass.new_zeros(B, N).masked_scatter(mask, x.float()) for x in found))
    checks.shape(op, "scored", scored.lse, (B, N), "(B, N)", "Pass the values of the response tokens.")
    logprobs, lse = scored.logprobs.masked_fill(~mask, 0), scored.lse.float()
    weights, frames = [], []
    for start in range(0, B, group_size):
        own = slice(start, start + group_size)
        chosen = select_frames(
            mass[own], mask[own], rewards[own], strategy=config.strategy,
            top_tokens=config.top_tokens, top_frames=config.top_frames, threshold=config.threshold,
        )  # fmt: skip
        slots = perception_slots(mass[own], mask[own], chosen, **config.slot_arguments())
        divergence = group_divergence(
            hidden[own], weight, lse[own], slots, kind=config.divergence, bias=bias, **logits  # type: ignore[arg-type]
        )  # fmt: skip
        weights.append(token_weights(divergence, slots, mask[own], **config.weight_arguments()))
        frames.append(chosen)
    return GroupWeights(torch.cat(weights), logprobs, frames)


def check_served(config: APPOConfig) -> None:
    """Raise ValueError for a method that other trainers cannot be given through token weights."""
    if config.method not in ("appo", "grpo") or config.attention_coef > 0:
        got = config.method if config.attention_coef == 0 else "attention_coef > 0"
        remedy = "Other methods are weighed and trained by appo's own trainer."
        checks.fail("group_weights", "config", "method = appo or grpo", got, remedy)
