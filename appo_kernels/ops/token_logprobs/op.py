"""token_logprobs: log-probability, entropy and log-sum-exp of tokens from the hidden states that predict them.

Streams over tiles of tokens x vocabulary: no (M, V) tensor exists, in the backward neither. A backend has

    forward(projection, targets, results)
        writes the three results, (M,) each, fp32 (fp64 for fp64 inputs)
    backward(projection, targets, results, upstream, gradients)
        writes the gradients that are not None, each in the dtype of its input, whatever was in the buffers before

(``arguments.py``) and is expected to leave the matrix products of a tile to the vendor's library and to make one pass
over the tile: the functions ``fold_tile`` and ``tile_gradient`` of ``streaming.py`` are those passes.
"""

from typing import Any

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.autograd import differentiable_once
from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.token_logprobs.arguments import Gradients, Projection, TokenLogprobs
from appo_kernels.vocabulary.arguments import check_projection

OP = "token_logprobs"


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probabilities of ``targets`` under softmax(softcap(hidden weight^T + bias) / temperature).

    This is the p of docs/method.md sections 5 and 6, and the ``lse`` is the one that ``group_divergence`` asks for.
    softcap(x) = cap tanh(x / cap); None leaves the logits as they are.

    Args:
        hidden: (M, D) fp32, fp16, bf16 or fp64; row m predicts targets[m].
        weight: (V, D), dtype of ``hidden``. One that needs no gradient costs no weight gradient.
        targets: (M,) int32 or int64, each in [0, V).
        bias: (V,) in any float dtype; -inf takes a word out of the distribution.
        temperature: the sampling temperature, positive.
        softcap: positive cap of the logits, or None.
        backend: "auto", "torch", "triton" or "cuda".

    Returns:
        ``TokenLogprobs(logprobs, entropy, lse)``, each (M,) fp32 (fp64 for fp64 inputs), each differentiable once with
        respect to hidden, weight and bias. A row whose logits are all -inf gives an lse of -inf and NaN elsewhere, as
        log_softmax does. Beside results and gradients the peak memory does not depend on M, except for an fp32 copy of
        hidden's gradient when ``hidden`` is half precision.

    Raises:
        ValueError: a wrong shape, dtype or device, a target outside [0, V), a temperature or cap that is not positive.
    """
    checks.rank(OP, "hidden", hidden, 2, "(M, D)")
    temperature, softcap = check_projection(OP, hidden, weight, bias, temperature, softcap)
    checks.dtype(OP, "targets", targets, checks.INTS)
    checks.shape(OP, "targets", targets, hidden.shape[:1], "(M,)", "Pass one token id per row of `hidden`.")
    checks.same_device(OP, "hidden", hidden, targets=targets)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    backend = dispatch.resolve(OP, backend, hidden.device, hidden.dtype, 0, needs_grad)
    return TokenLogprobs(*_TokenLogprobs.apply(hidden, weight, bias, targets, temperature, softcap, backend))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs, entropy, lse), (M,) each: hidden (M, D), weight (V, D), bias (V,), targets (M,)."""
        logprobs, entropy, lse = (
            hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype)) for _ in range(3)
        )
        forward_op(hidden, weight, targets, bias, temperature, softcap, logprobs, entropy, lse, backend)
        ctx.save_for_backward(hidden, weight, bias, targets, logprobs, entropy, lse)
        ctx.settings = temperature, softcap, backend
        return logprobs, entropy, lse

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, where they are wanted."""
        hidden, weight, bias, targets, logprobs, entropy, lse = ctx.saved_tensors
        temperature, softcap, backend = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        backward_op(
            hidden, weight, targets, bias, temperature, softcap, logprobs, entropy, lse,
            grad_logprobs, grad_entropy, grad_lse, grad_hidden, grad_weight, grad_bias, backend,
        )  # fmt: skip
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


@dispatch.out_variant("token_logprobs_forward", mutates=("logprobs", "entropy", "lse"))
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    backend: str,
) -> None:
    """Writes logprobs, entropy and lse, (M,) each: hidden (M, D), weight (V, D), targets (M,), bias (V,)."""
    if checks.values_enabled() and targets.numel():
        low, high = checks.on_host(*targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            expected = f"token ids in [0, {weight.shape[0]}), the rows of `weight`"
            remedy = "Leave out the rows that have no target; padding ids such as -100 are not skipped here."
            checks.fail(OP, "targets", expected, f"ids from {low} to {high}", remedy)
    projection, results = Projection(hidden, weight, bias, temperature, softcap), TokenLogprobs(logprobs, entropy, lse)
    dispatch.backend_module(OP, backend).forward(projection, targets, results)


@dispatch.out_variant("token_logprobs_backward", mutates=("grad_hidden", "grad_weight", "grad_bias"))
def backward_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    backend: str,
) -> None:
    """Writes the gradients that are not None, (M, D), (V, D), (V,), from those of the results, (M,) each."""
    dispatch.backend_module(OP, backend).backward(
        Projection(hidden, weight, bias, temperature, softcap), targets, TokenLogprobs(logprobs, entropy, lse),
        TokenLogprobs(grad_logprobs, grad_entropy, grad_lse), Gradients(grad_hidden, grad_weight, grad_bias),
    )  # fmt: skip
