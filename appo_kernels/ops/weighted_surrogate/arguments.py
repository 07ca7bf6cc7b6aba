"""Checks of the arguments that the three surrogates share, and what the backends take instead of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks
from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.weighted_surrogate.kinds import (
    ADVANTAGE,
    IMPORTANCE,
    KINDS,
    LEVELS,
    MASK,
    OLD,
    REF,
    SHARE,
    WEIGHT,
    Options,
)
from appo_kernels.ops.weighted_surrogate.loss import CORRECTIONS, pack, shares

AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")


class Prepared(NamedTuple):
    options: Options
    table: Tensor  # (7, B, T): see loss.py
    extra_metrics: dict[str, Tensor]  # that backends do not compute, () fp32


def prepare(
    op: str,
    first: str,
    like: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    ref_logprobs: Tensor | None,
    beta: float,
    rollout_logprobs: Tensor | None,
    rollout_cap: float,
    level: str,
    aggregation: str,
    num_items: int | float | Tensor | None,
    max_length: int | None,
    kind: str,
    kl_ratio: bool,
    rollout_correction: str,
    rollout_level: str,
    rollout_floor: float,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_coef: float = 0.0,
) -> Prepared:
    """The arguments of a surrogate, checked. ``like``, the argument named ``first``, gives B, T, device and dtype.

    Raises:
        ValueError: a wrong type, shape, dtype or device, a number out of its range. Values of tensors are left to
            ``check_values``, in the custom operators.
    """
    per_token = {
        "old_logprobs": old_logprobs,
        "mask": mask,
        "token_weights": token_weights,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    _check_tensors(op, first, like, advantages, per_token)
    options = _options(
        op, eps_low, eps_high, delta, beta, level, temperature, softcap, entropy_coef, kind, kl_ratio,
        has_ref=ref_logprobs is not None,
    )  # fmt: skip
    checks.choice(op, "rollout_correction", rollout_correction, CORRECTIONS)
    checks.choice(op, "rollout_level", rollout_level, LEVELS)
    remedy = "It caps exp(old_logprobs - rollout_logprobs); the usual value is 2.0."
    cap = checks.number(op, "rollout_cap", rollout_cap, "a number > 0", remedy, above=0.0, most=float("inf"))
    floor = checks.number(
        op, "rollout_floor", rollout_floor, "a number in [0, rollout_cap]",
        'It is the least ratio of rollout_correction "clip" and "mask"; 0 is none.', least=0.0, most=cap,
    )  # fmt: skip
    if floor != 0.0 and rollout_correction == "truncate":
        remedy = 'Pass rollout_correction="clip" or "mask": "truncate" has a cap only.'
        checks.fail(op, "rollout_floor", 'a floor of 0 for rollout_correction "truncate"', rollout_floor, remedy)
    items, longest = _check_aggregation(op, like, aggregation, num_items, max_length)
    share = shares((mask != 0).to(compute_dtype(like.dtype)), aggregation, items, longest)
    table = pack(
        old_logprobs, advantages, mask, token_weights, ref_logprobs, rollout_logprobs, share,
        correction=rollout_correction, level=rollout_level, floor=floor, cap=cap,
    )  # fmt: skip
    extra = {}
    if rollout_logprobs is not None:
        extra["rollout_missing"] = ((mask != 0) & rollout_logprobs.isnan()).sum().float()
    return Prepared(options, table, extra)


def _check_tensors(op: str, first: str, like: Tensor, advantages: Tensor, per_token: dict[str, Tensor | None]) -> None:
    B, T = like.shape[:2]
    remedy = f"Pass one value for each token of `{first}`."
    for name in ("old_logprobs", "mask"):
        checks.tensor(op, name, per_token[name])
    for name, tensor in per_token.items():
        if tensor is not None:
            checks.shape(op, name, tensor, (B, T), "(B, T)", remedy)
            if name != "mask":
                checks.dtype(op, name, tensor, checks.FLOATS)
            elif tensor.is_complex():
                expected = "bool, or integers or floats that are 0 or 1"
                checks.fail(op, "mask", expected, tensor.dtype, "Convert it to bool.")
    checks.dtype(op, "advantages", advantages, checks.FLOATS)
    if tuple(advantages.shape) not in ((B,), (B, T)):
        expected = f"shape (B,) = {(B,)} or (B, T) = {(B, T)}"
        remedy = "Pass one advantage for each response, or one for each token."
        checks.fail(op, "advantages", expected, f"shape {tuple(advantages.shape)}", remedy)
    checks.same_device(op, first, like, advantages=advantages, **per_token)


def _options(
    op: str,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    beta: float,
    level: str,
    temperature: float,
    softcap: float | None,
    entropy_coef: float,
    kind: str,
    kl_ratio: bool,
    *,
    has_ref: bool,
) -> Options:
    infinity = float("inf")
    checks.choice(op, "kind", kind, KINDS)
    checks.choice(
        op, "level", level, LEVELS, '"token" has a ratio for each token, "sequence" one for each response (GSPO).'
    )
    if kind == "dppo_tv" and level != "token":
        remedy = "DPPO limits how far the probability of each token moves."
        checks.fail(op, "level", '"token" for kind "dppo_tv"', repr(level), remedy)
    checks.flag(op, "kl_ratio", kl_ratio)
    remedy = "The ratio is clipped below at 1 - eps_low."
    eps_low = checks.number(op, "eps_low", eps_low, "a number in [0, 1]", remedy, least=0.0, most=1.0)
    remedy = "The ratio is clipped above at 1 + eps_high."
    eps_high = checks.number(op, "eps_high", eps_high, "a number >= 0", remedy, least=0.0, most=infinity)
    if delta is not None:
        remedy = "It caps the ratio in the unclipped branch and should exceed 1 + eps_high; None leaves it out."
        delta = checks.number(op, "delta", delta, "None or a number > 0", remedy, above=0.0, most=infinity)
    remedy = "It multiplies the KL to the reference; 0 is off."
    beta = checks.number(op, "beta", beta, "a finite number >= 0", remedy, least=0.0)
    if beta != 0 and not has_ref:
        remedy = "Pass the reference policy's log-probabilities, or beta=0."
        checks.fail(op, "ref_logprobs", f"a tensor (B, T) where beta is not 0 (it is {beta})", None, remedy)
    remedy = "Pass the sampling temperature."
    temperature = checks.number(op, "temperature", temperature, "a finite number > 0", remedy, above=0.0)
    if softcap is not None:
        remedy = "Pass the model's final logit soft cap."
        softcap = checks.number(op, "softcap", softcap, "None or a finite number > 0", remedy, above=0.0)
    remedy = "It multiplies the entropy bonus; 0 is off."
    entropy_coef = checks.number(op, "entropy_coef", entropy_coef, "a finite number", remedy)
    return Options(eps_low, eps_high, delta, beta, level, temperature, softcap, entropy_coef, kind, kl_ratio)


def _check_aggregation(
    op: str, like: Tensor, aggregation: str, num_items: int | float | Tensor | None, max_length: float | None
) -> tuple[int | float | Tensor | None, float | None]:
    """``num_items`` and ``max_length`` as numbers."""
    checks.choice(
        op,
        "aggregation",
        aggregation,
        AGGREGATIONS,
        'Pass one of these; the default is "dapo" (docs/method.md section 6).',
    )
    if max_length is not None or aggregation == "dr_grpo":
        remedy = "Pass the longest response that may be sampled, in tokens."
        expected = 'a number > 0 for aggregation "dr_grpo"'
        max_length = checks.number(op, "max_length", max_length, expected, remedy, above=0.0)
    if isinstance(num_items, Tensor):
        checks.rank(op, "num_items", num_items, 0, "()")
        if num_items.is_complex():
            checks.fail(op, "num_items", "a real number", num_items.dtype, "Pass a count.")
        checks.same_device(op, "the first argument", like, num_items=num_items)
    elif num_items is not None:
        remedy = "Pass the number of valid tokens in the whole global batch."
        expected = f"a finite number >= 0, at most {checks.LARGEST_COUNT}"
        num_items = checks.number(op, "num_items", num_items, expected, remedy, least=0.0, most=checks.LARGEST_COUNT)
    return num_items, max_length


def check_values(
    op: str,
    table: Tensor,
    *,
    logprobs: Tensor | None = None,
    beta: float = 0.0,
    targets: Tensor | None = None,
    vocabulary: int = 0,
    numbers: Sequence[Tensor] = (),
) -> list[int]:
    """Value checks on valid tokens; one device synchronisation if all pass, which brings ``numbers`` () along.

    logprobs, targets: (B, T), of the surrogates that have them; vocabulary: V, of these targets.
    """
    if not checks.values_enabled() or not table.numel():
        return checks.on_host(*numbers)
    valid = table[MASK] != 0
    weight, advantage, ref = table[WEIGHT], table[ADVANTAGE], table[REF]
    score = "Score these tokens again, or mask them."
    # (argument, where it is wrong, its values, expected, remedy); a reference that was not given is NaN throughout.
    tests = [
        ("mask", valid & (table[MASK] != 1), table[MASK], "0 or 1", "Weigh tokens with `token_weights`."),
        ("old_logprobs", ~table[OLD].isfinite(), table[OLD], "finite numbers", score),
        (
            "token_weights", ~(weight >= 0) | weight.isinf(), weight, "finite numbers >= 0",
            "Clamp the weights, or mask these tokens.",
        ),
        (
            "advantages", ~advantage.isfinite(), advantage, "finite numbers",
            "A reward or a group's scale is not finite: fix it, or mask these tokens.",
        ),
        (
            "ref_logprobs", ~ref.isfinite() & (~(valid & ref.isnan()).sum().eq(valid.sum()) | (beta != 0)), ref,
            "finite numbers", score,
        ),
        (
            "rollout_logprobs", ~table[IMPORTANCE].isfinite(), None, "numbers below infinity, or NaN where unknown",
            "Pass the log-probabilities that the engine returned.",
        ),
        (
            "num_items", valid & ~table[SHARE].isfinite(), None,
            f"a finite number >= 0, at most {checks.LARGEST_COUNT}",
            "Pass the number of valid tokens in the whole global batch.",
        ),
    ]  # fmt: skip
    if logprobs is not None:
        wrong = valid & (logprobs.isnan() | torch.isposinf(logprobs))
        tests.insert(0, ("logprobs", wrong, logprobs, "numbers below infinity", "Look for NaN in the logits."))
    if targets is not None:
        wrong = valid & ((targets < 0) | (targets >= vocabulary))
        remedy = "Mask tokens without a target, or pass the weight that has them."
        tests.append(("targets", wrong, targets, f"token ids in [0, {vocabulary})", remedy))
    any_wrong, *found = checks.on_host(torch.stack([wrong.any() for _, wrong, *_ in tests]).any(), *numbers)
    if not any_wrong:
        return found
    for argument, wrong, values, expected, remedy in tests:
        if bool(wrong.any()):
            b, t = wrong.nonzero()[0].tolist()
            got = "another" if values is None else values[b, t].item()
            checks.fail(op, argument, expected, f"{got} at [{b}, {t}]", remedy)
    raise AssertionError("one of the tests has failed")
