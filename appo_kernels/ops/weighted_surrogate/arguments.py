"""Checks of the arguments that the three surrogates share, and the table made of them (see loss.py)."""

import math

import torch
from torch import Tensor

from appo_kernels import checks
from appo_kernels.ops.weighted_surrogate.loss import ADVANTAGE, MASK, SHARE, WEIGHT, Settings, pack, shares

LEVELS = ("token", "sequence")
AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")


def loss_table(
    op: str,
    first: str,
    like: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    token_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    rollout_cap: float,
    aggregation: str,
    num_items: int | float | Tensor | None,
    max_length: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The table (7, B, T) in ``dtype``. ``like``, the argument named ``first``, gives B, T and the device."""
    B, T = like.shape[:2]
    per_token = {
        "old_logprobs": old_logprobs,
        "mask": mask,
        "token_weights": token_weights,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    remedy = f"Pass one value for each token of `{first}`."
    for name, tensor in per_token.items():
        if tensor is not None:
            checks.shape(op, name, tensor, (B, T), "(B, T)", remedy)
            if name != "mask":
                checks.dtype(op, name, tensor, checks.FLOATS)
    if mask.is_complex():
        checks.fail(op, "mask", "bool, or integers or floats that are 0 or 1", str(mask.dtype), "Convert it to bool.")
    checks.dtype(op, "advantages", advantages, checks.FLOATS)
    if tuple(advantages.shape) not in ((B,), (B, T)):
        expected = f"shape (B,) = {(B,)} or (B, T) = {(B, T)}"
        remedy = "Pass one advantage for each response, or one for each token."
        checks.fail(op, "advantages", expected, f"shape {tuple(advantages.shape)}", remedy)
    checks.same_device(op, first, like, advantages=advantages, **per_token)
    if not rollout_cap > 0:
        remedy = "It caps exp(old_logprobs - rollout_logprobs); the usual value is 2.0."
        checks.fail(op, "rollout_cap", "a number > 0", rollout_cap, remedy)
    _check_aggregation(op, like, aggregation, num_items, max_length)
    share = shares((mask != 0).to(dtype), aggregation, num_items, max_length)
    return pack(
        old_logprobs, advantages, mask, token_weights, ref_logprobs, rollout_logprobs, share, rollout_cap=rollout_cap
    )


def _check_aggregation(
    op: str, like: Tensor, aggregation: str, num_items: int | float | Tensor | None, max_length: int | None
) -> None:
    if aggregation not in AGGREGATIONS:
        remedy = 'Pass one of these; the default is "dapo" (docs/method.md section 6).'
        checks.fail(op, "aggregation", f"one of {', '.join(AGGREGATIONS)}", repr(aggregation), remedy)
    if aggregation == "dr_grpo" and (max_length is None or not max_length > 0):
        remedy = "Pass the longest response that may be sampled, in tokens."
        checks.fail(op, "max_length", 'a number > 0 for aggregation "dr_grpo"', max_length, remedy)
    if isinstance(num_items, Tensor):
        checks.rank(op, "num_items", num_items, 0, "()")
        checks.same_device(op, "the first argument", like, num_items=num_items)
    elif num_items is not None and not 0 <= num_items < math.inf:
        remedy = "Pass the number of valid tokens in the whole global batch."
        checks.fail(op, "num_items", "a finite number >= 0", num_items, remedy)


def settings(
    op: str,
    *,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    beta: float,
    level: str,
    has_ref: bool,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_coef: float = 0.0,
) -> Settings:
    """The checked plain numbers of a call."""
    if not 0 <= eps_low <= 1:
        checks.fail(op, "eps_low", "a number in [0, 1]", eps_low, "The ratio is clipped below at 1 - eps_low.")
    if not eps_high >= 0:
        checks.fail(op, "eps_high", "a number >= 0", eps_high, "The ratio is clipped above at 1 + eps_high.")
    if delta is not None and not delta > 0:
        remedy = "It caps the ratio in the unclipped branch and should exceed 1 + eps_high; None leaves it out."
        checks.fail(op, "delta", "None or a number > 0", delta, remedy)
    if not 0 <= beta < math.inf:
        checks.fail(op, "beta", "a finite number >= 0", beta, "It multiplies the KL to the reference; 0 is off.")
    if beta != 0 and not has_ref:
        remedy = "Pass the reference policy's log-probabilities, or beta=0."
        checks.fail(op, "ref_logprobs", f"a tensor (B, T) where beta is not 0 (it is {beta})", None, remedy)
    if level not in LEVELS:
        remedy = '"token" has a ratio for each token, "sequence" one for each response (GSPO).'
        checks.fail(op, "level", f"one of {', '.join(LEVELS)}", repr(level), remedy)
    if not 0 < temperature < math.inf:
        checks.fail(op, "temperature", "a finite number > 0", temperature, "Pass the sampling temperature.")
    if softcap is not None and not 0 < softcap < math.inf:
        checks.fail(op, "softcap", "None or a finite number > 0", softcap, "Pass the model's final logit soft cap.")
    if not -math.inf < entropy_coef < math.inf:
        checks.fail(op, "entropy_coef", "a finite number", entropy_coef, "It multiplies the entropy bonus; 0 is off.")
    return Settings(eps_low, eps_high, delta, beta, level, temperature, softcap, entropy_coef)


def check_values(op: str, table: Tensor, targets: Tensor | None = None, vocabulary: int = 0) -> None:
    """What only the values tell, on valid tokens: one synchronisation when all is well."""
    if not checks.values_enabled() or not table.numel():
        return
    valid = table[MASK] != 0
    weight, advantage = table[WEIGHT], table[ADVANTAGE]
    faults = [
        valid & (table[MASK] != 1),
        ~(weight >= 0) | weight.isinf(),
        ~advantage.isfinite(),
        valid & ~table[SHARE].isfinite(),
    ]
    if targets is not None:
        faults.append(valid & ((targets < 0) | (targets >= vocabulary)))
    if not bool(torch.stack([fault.any() for fault in faults]).any()):
        return
    values = (table[MASK], weight, advantage, table[SHARE], targets)
    messages = (
        ("mask", "0 or 1", "Weigh tokens with `token_weights`."),
        ("token_weights", "finite numbers >= 0", "Clamp the weights, or mask these tokens."),
        ("advantages", "finite numbers", "A reward or a group's scale is not finite: fix it, or mask these tokens."),
        ("num_items", "a finite number >= 0", "Pass the number of valid tokens in the whole global batch."),
        (
            "targets",
            f"token ids in [0, {vocabulary})",
            "Mask tokens without a target, or pass the weight that has them.",
        ),
    )
    for fault, value, (argument, expected, remedy) in zip(faults, values, messages, strict=False):
        if value is not None and bool(fault.any()):
            b, t = fault.nonzero()[0].tolist()
            got = "a negative or non-finite one" if argument == "num_items" else f"{value[b, t].item()} at [{b}, {t}]"
            checks.fail(op, argument, expected, got, remedy)
