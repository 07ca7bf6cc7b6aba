"""Public functions: the weighted surrogate from log-probabilities, from logits, and from hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.ops.weighted_surrogate.arguments import Prepared, prepare
from appo_kernels.ops.weighted_surrogate.autograd import (
    LinearWeightedSurrogate,
    LogitsWeightedSurrogate,
    WeightedSurrogate,
)
from appo_kernels.ops.weighted_surrogate.loss import METRICS
from appo_kernels.vocabulary.arguments import check_projection, check_targets

OP = "weighted_surrogate"


class SurrogateOutput(NamedTuple):
    """Result of the three surrogates."""

    loss: Tensor  # () fp32 (fp64 for fp64 inputs), differentiable
    metrics: dict[str, Tensor]  # name -> () fp32, detached


def weighted_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    delta: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    level: str = "token",
    aggregation: str = "dapo",
    num_items: int | float | Tensor | None = None,
    max_length: int | None = None,
    kind: str = "clip",
    kl_ratio: bool = False,
    rollout_correction: str = "truncate",
    rollout_level: str = "token",
    rollout_floor: float = 0.0,
    backend: str = "auto",
) -> SurrogateOutput:
    """The APPO loss (docs/method.md section 6); token weights of 1 make it GRPO, DAPO and their relatives.

        ratio = exp(logprobs - old_logprobs),  clipped = clamp(ratio, 1 - eps_low, 1 + eps_high)
        loss of a token = -W c min(min(ratio, delta) A, clipped A) + beta (exp(r) - r - 1)      (kind "clip")
        c = min(exp(old_logprobs - rollout_logprobs), rollout_cap),  r = ref_logprobs - logprobs

    Args:
        logprobs: (B, T) float, of the sampled tokens under the policy being trained. The one differentiable argument.
        old_logprobs: (B, T), under the policy that is the base of the ratio.
        advantages: A, (B,) one for each response or (B, T) one for each token, told apart by shape.
        mask: (B, T) bool, or numbers that are 0 or 1. Other tensors may hold anything, NaN included, at masked tokens.
        token_weights: W >= 0, (B, T); treated as constants. Not applied to the KL term.
        eps_low, eps_high: clip range, eps_low in [0, 1], eps_high >= 0.
        delta: two-sided clip, > 0: also caps the ratio of tokens with A < 0.
        ref_logprobs, beta: KL to a reference policy (k3 estimate) and its factor >= 0. With beta = 0 only the metric.
        rollout_logprobs, rollout_cap: (B, T) as the sampling engine reported them: truncated importance sampling.
        level: "token", or "sequence" (GSPO): one ratio for each response, exp(mean of its log-ratios).
        aggregation: of the valid tokens' losses.
            "dapo": sum / num_items. "bnpo": sum / valid tokens of this batch. "grpo": mean over each response's
            tokens, then over the B responses. "dr_grpo": sum / (B max_length). Counts of 0 divide as 1.
        num_items: valid tokens in the whole global batch, a number or a 0-d tensor; used by "dapo" only. Default:
            those of this batch.
        max_length: longest possible response in tokens, for "dr_grpo".
        kind: the policy term, docs/losses.md: "clip" as above, "cispo", "sapo", "dppo_tv" (limits how far a token's
            probability moves by eps_low and eps_high; level "token" only), "gpg" or "gspo_token".
        kl_ratio: multiply the KL term by the ratio and differentiate through both (bias-corrected KL).
        rollout_correction: "truncate": c as above; "clip": clamp to [rollout_floor, rollout_cap]; "mask": 0 outside.
        rollout_level: "token", or "sequence": c of the sum of the response's log-ratios. A NaN in
            ``rollout_logprobs`` counts as a log-ratio of 0.
        rollout_floor: >= 0, of "clip" and "mask".
        backend: "auto", "torch", "triton" or "cuda".

    Returns:
        SurrogateOutput(loss, metrics). metrics, over valid tokens: ``clip_low``, ``clip_high`` (share of tokens clipped
        with A < 0, A > 0), ``approx_kl`` (mean of ratio - 1 - log ratio per token: KL(old || new)), ``ref_kl`` (k3; NaN
        without ref_logprobs), ``entropy`` (nats; NaN here, where no logits are seen), ``ratio_mean``, ``ratio_max``,
        ``clip_weighted`` (share clipped among tokens with W > 1), ``weight_mean``, ``effective_tokens`` (number of
        tokens whose policy gradient is not zero); with rollout_logprobs also ``rollout_missing`` (number of NaN
        in them). What a kind does not clip is not counted as clipped. For an empty mask each is 0, or NaN as above.

    Raises:
        ValueError: naming argument, expected, got, remedy; for shapes, dtypes, devices, ranges, and (unless
            APPO_CHECK_VALUES=0), at valid tokens, negative or non-finite weights, non-finite advantages, old or
            reference log-probabilities, and log-probabilities that are NaN or +inf.
    """
    checks.rank(OP, "logprobs", logprobs, 2, "(B, T)")
    checks.dtype(OP, "logprobs", logprobs, checks.FLOATS)
    prepared = prepare(
        OP, "logprobs", logprobs,
        old_logprobs=old_logprobs, advantages=advantages, mask=mask, token_weights=token_weights,
        eps_low=eps_low, eps_high=eps_high, delta=delta, ref_logprobs=ref_logprobs, beta=beta,
        rollout_logprobs=rollout_logprobs, rollout_cap=rollout_cap, level=level, aggregation=aggregation,
        num_items=num_items, max_length=max_length, kind=kind, kl_ratio=kl_ratio,
        rollout_correction=rollout_correction, rollout_level=rollout_level, rollout_floor=rollout_floor,
    )  # fmt: skip
    wanted = _wants_grad(logprobs)
    backend = dispatch.resolve(OP, backend, logprobs.device, logprobs.dtype, 0, wanted)
    results = WeightedSurrogate.apply(logprobs, prepared.table, prepared.options, wanted, backend)
    return _output(results, prepared)


def logits_weighted_surrogate(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    delta: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    level: str = "token",
    aggregation: str = "dapo",
    num_items: int | float | Tensor | None = None,
    max_length: int | None = None,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    inplace: bool = False,
    kind: str = "clip",
    kl_ratio: bool = False,
    rollout_correction: str = "truncate",
    rollout_level: str = "token",
    rollout_floor: float = 0.0,
    backend: str = "auto",
) -> SurrogateOutput:
    """``weighted_surrogate`` of the log-probabilities that ``logits`` give, with the gradient formed in the forward.

    loss = surrogate - entropy_coef * (entropy of each token's distribution, aggregated like the loss). -inf logits are
    impossible tokens; masked rows of ``logits`` may hold anything and get a gradient of 0.

    Args:
        logits: (B, T, V) fp32, fp16, bf16 or fp64, before the temperature; computed on in fp32 (fp64) row by row. Any
            strides of the first two dimensions.
        targets: (B, T) int: the sampled tokens. Anything where the mask is 0.
        temperature: > 0: the sampling temperature; log-probabilities and entropy are those of logits / temperature.
        entropy_coef: factor of the entropy bonus.
        inplace: overwrite ``logits`` with their gradient, so that no second (B, T, V) tensor is made. For logits that
            come straight from the output layer and are used nowhere else. They are left alone where no gradient is
            wanted, and by torch.compile, which plans memory itself.
        others: as in ``weighted_surrogate``; metrics too, with ``entropy``.

    Raises:
        ValueError: as ``weighted_surrogate``; targets outside [0, V) at valid tokens; ``inplace`` with logits that are
            a leaf requiring grad (their values are the caller's parameters) or that overlap in memory.
    """
    op = f"logits_{OP}"
    checks.rank(op, "logits", logits, 3, "(B, T, V)")
    checks.dtype(op, "logits", logits, checks.FLOATS)
    if logits.shape[2] < 1:
        checks.fail(op, "logits", "a vocabulary of at least 1", f"shape {tuple(logits.shape)}", "Pass (B, T, V).")
    check_targets(op, "logits", logits, targets)
    wanted = _wants_grad(logits)
    checks.flag(op, "inplace", inplace)
    if inplace and wanted:
        if logits.is_leaf:
            remedy = "Pass inplace=False, or the output of the layer that made the logits."
            checks.fail(op, "inplace", "logits computed by a layer", "a leaf that requires grad", remedy)
        if checks.overlaps_itself(logits):
            remedy = "Pass inplace=False, or logits.contiguous()."
            got = f"an expanded tensor or a view with windows, strides {logits.stride()} of shape {tuple(logits.shape)}"
            checks.fail(op, "inplace", "logits with memory of their own for each element", got, remedy)
    prepared = prepare(
        op, "logits", logits,
        old_logprobs=old_logprobs, advantages=advantages, mask=mask, token_weights=token_weights,
        eps_low=eps_low, eps_high=eps_high, delta=delta, ref_logprobs=ref_logprobs, beta=beta,
        rollout_logprobs=rollout_logprobs, rollout_cap=rollout_cap, level=level, aggregation=aggregation,
        num_items=num_items, max_length=max_length, kind=kind, kl_ratio=kl_ratio,
        rollout_correction=rollout_correction, rollout_level=rollout_level, rollout_floor=rollout_floor,
        temperature=temperature, entropy_coef=entropy_coef,
    )  # fmt: skip
    backend = dispatch.resolve(OP, backend, logits.device, logits.dtype, 0, wanted, function=op)
    overwrite = inplace and not torch.compiler.is_compiling()
    results = LogitsWeightedSurrogate.apply(
        logits, targets, prepared.table, prepared.options, wanted, overwrite, backend
    )
    return _output(results, prepared)


def linear_weighted_surrogate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    delta: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    level: str = "token",
    aggregation: str = "dapo",
    num_items: int | float | Tensor | None = None,
    max_length: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_coef: float = 0.0,
    kind: str = "clip",
    kl_ratio: bool = False,
    rollout_correction: str = "truncate",
    rollout_level: str = "token",
    rollout_floor: float = 0.0,
    backend: str = "auto",
) -> SurrogateOutput:
    """``logits_weighted_surrogate`` of softcap(hidden weight^T + bias) / temperature, without the (B, T, V) tensor.

    Gradients of ``hidden``, ``weight`` and ``bias`` are formed in the forward, for those that require grad: 6 MVD
    operations (M valid tokens, V vocabulary, D hidden size), 8 MVD at level "sequence" and for "gspo_token", whose
    ratios need every token first; less for tokens whose gradient is exactly zero. Memory beside the arguments and
    gradients does not grow with the tokens. Backward scales the gradients in place: a second backward through the same
    graph is possible only if the first got a gradient of 1.

    Args:
        hidden: (B, T, D) fp32, fp16, bf16 or fp64, the states that predict ``targets``; sums are in fp32 (fp64).
        weight: (V, D), same dtype. bias: (V,), same dtype.
        targets: (B, T) int: the sampled tokens. Anything where the mask is 0, and so may ``hidden``.
        temperature: > 0: the sampling temperature.
        softcap: logits become softcap tanh(logits / softcap) before the temperature; > 0.
        entropy_coef: factor of the entropy bonus: loss -= entropy_coef * (aggregated entropy).
        others: as in ``weighted_surrogate``; metrics too, with ``entropy``.

    Raises:
        ValueError: as ``weighted_surrogate``; targets outside [0, V) at valid tokens.
    """
    op = f"linear_{OP}"
    checks.rank(op, "hidden", hidden, 3, "(B, T, D)")
    check_projection(op, hidden, weight, bias, temperature, softcap, bias_dtypes=(hidden.dtype,))
    check_targets(op, "hidden", hidden, targets)
    prepared = prepare(
        op, "hidden", hidden,
        old_logprobs=old_logprobs, advantages=advantages, mask=mask, token_weights=token_weights,
        eps_low=eps_low, eps_high=eps_high, delta=delta, ref_logprobs=ref_logprobs, beta=beta,
        rollout_logprobs=rollout_logprobs, rollout_cap=rollout_cap, level=level, aggregation=aggregation,
        num_items=num_items, max_length=max_length, kind=kind, kl_ratio=kl_ratio,
        rollout_correction=rollout_correction, rollout_level=rollout_level, rollout_floor=rollout_floor,
        temperature=temperature, softcap=softcap, entropy_coef=entropy_coef,
    )  # fmt: skip
    wants = [_wants_grad(tensor) for tensor in (hidden, weight, bias)]
    backend = dispatch.resolve(OP, backend, hidden.device, hidden.dtype, 0, any(wants), function=op)
    results = LinearWeightedSurrogate.apply(
        hidden, weight, bias, targets, prepared.table, prepared.options, *wants, backend
    )
    return _output(results, prepared)


def _wants_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _output(results: tuple[Tensor, Tensor], prepared: Prepared) -> SurrogateOutput:
    loss, metrics = results
    return SurrogateOutput(loss, {**dict(zip(METRICS, metrics.unbind(), strict=True)), **prepared.extra_metrics})
