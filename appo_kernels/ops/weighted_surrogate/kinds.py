"""The kinds of the surrogate: loss and closed-form derivative of each token.

With rho = exp(log pi - log pi_old), at level "sequence" exp of its mean over the response, f = -W c A (token weight,
rollout importance, advantage) and sg[] a constant:

    clip        the larger of f min(rho, delta) and f clamp(rho, 1 - eps_low, 1 + eps_high)
    cispo       f sg[min(rho, 1 + eps_high)] log pi                                             arXiv 2506.13585
    sapo        f (4 / tau) sigmoid(tau (rho - 1)), tau = 1 where A > 0, else 1.05              arXiv 2511.20347
    dppo_tv     f sg[min(rho, cap)] log pi, or 0 for a token whose probability has moved beyond
                eps_high upwards (A > 0) or eps_low downwards (A <= 0); cap = delta, or 20      arXiv 2602.04879
    gpg         f log pi                                                                        arXiv 2504.02546
    gspo_token  as clip with rho = sg[exp(mean log ratio of the response)] pi / sg[pi]          arXiv 2507.18071
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASK, OLD, ADVANTAGE, WEIGHT, IMPORTANCE, REF, SHARE = range(7)

KINDS = ("clip", "cispo", "sapo", "dppo_tv", "gpg", "gspo_token")
LEVELS = ("token", "sequence")
SAPO_TAU_GAIN, SAPO_TAU_LOSS = 1.0, 1.05  # for A > 0 and for the others
DPPO_CAP = 20.0


class Options(NamedTuple):
    """The plain numbers of a call, in the order in which the custom operators take them."""

    eps_low: float
    eps_high: float
    delta: float | None
    beta: float
    level: str
    temperature: float = 1.0
    softcap: float | None = None
    entropy_coef: float = 0.0
    kind: str = "clip"
    kl_ratio: bool = False

    @property
    def sequence_ratio(self) -> bool:
        """Whether a token's gradient depends on the log-probabilities of its whole response."""
        return self.level == "sequence" or self.kind == "gspo_token"

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's log-probability moves the losses of all tokens of its response."""
        return self.level == "sequence" and self.kind in ("clip", "sapo")


class Terms(NamedTuple):
    """Of each token; any shape."""

    loss: Tensor
    slope: Tensor  # d loss / d log pi, with ``couples_tokens`` d loss / d log rho
    low: Tensor  # bool: held at the lower limit of what the policy may change (counted where A < 0)
    high: Tensor  # bool: held at the upper one (counted where A > 0)


def policy_terms(logprobs: Tensor, ratio: Tensor, table: Tensor, o: Options) -> Terms:
    """``logprobs`` and ``ratio`` of any shape, ``table`` (7, that shape)."""
    advantage = table[ADVANTAGE]
    factor = table[WEIGHT] * table[IMPORTANCE] * -advantage
    low, high = (ratio < 1 - o.eps_low) & (advantage < 0), (ratio > 1 + o.eps_high) & (advantage > 0)
    never = torch.zeros_like(low)
    if o.kind in ("clip", "gspo_token"):
        return Terms(*_clip(ratio, factor, o), low, high)
    if o.kind == "cispo":
        return Terms(*_linear(logprobs, factor * ratio.clamp(max=1 + o.eps_high)), never, high)
    if o.kind == "sapo":
        return Terms(*_sapo(ratio, factor, advantage), never, never)
    if o.kind == "dppo_tv":
        moved = logprobs.exp() - table[OLD].exp()
        low, high = (moved < -o.eps_low) & ~(advantage > 0), (moved > o.eps_high) & (advantage > 0)
        capped = factor * ratio.clamp(max=DPPO_CAP if o.delta is None else o.delta)
        return Terms(*_linear(logprobs, torch.where(low | high, 0.0, capped)), low, high)
    return Terms(*_linear(logprobs, factor), never, never)


def _clip(ratio: Tensor, factor: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """With two-sided clipping the unclipped branch is min(ratio, delta) A. The derivative is that of the branch that
    min() took: zero exactly where a clamp holds the ratio."""
    clipped = ratio.clamp(1 - o.eps_low, 1 + o.eps_high)
    free = ratio if o.delta is None else ratio.clamp(max=o.delta)
    branch = torch.where(factor * free >= factor * clipped, free, clipped)
    loss = factor * branch
    return loss, torch.where(branch == ratio, loss, 0.0)


def _sapo(ratio: Tensor, factor: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    tau = torch.where(advantage > 0, SAPO_TAU_GAIN, SAPO_TAU_LOSS).to(ratio.dtype)
    gate = torch.sigmoid(tau * (ratio - 1))
    moves = 4 * gate * (1 - gate)
    return factor * gate * 4 / tau, torch.where(moves == 0, 0.0, factor * moves * ratio)  # not 0 * inf


def _linear(logprobs: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(slope == 0, 0.0, slope * logprobs), slope
