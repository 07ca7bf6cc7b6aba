"""Custom operators and autograd functions of the three surrogates.

The forward operator writes the loss, the metrics and, where they are wanted, the gradients of the loss. The backward
multiplies them with the gradient of the loss, which is 1 when the loss is what ``backward`` is called on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.autograd import differentiable_once
from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.weighted_surrogate.arguments import check_values
from appo_kernels.ops.weighted_surrogate.kinds import Options
from appo_kernels.ops.weighted_surrogate.loss import METRICS
from appo_kernels.ops.weighted_surrogate.tokens import Tokens, mark

OP = "weighted_surrogate"


@dispatch.out_variant("weighted_surrogate_forward", mutates=("loss", "metrics", "grad_logprobs"))
def weighted_surrogate_forward(
    logprobs: Tensor,
    table: Tensor,
    loss: Tensor,
    metrics: Tensor,
    grad_logprobs: Tensor | None,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    beta: float,
    level: str,
    backend: str,
    kind: str = "clip",
    kl_ratio: bool = False,
) -> None:
    """Writes loss () and metrics (10,), and d loss / d logprobs (B, T) where it is wanted."""
    check_values(OP, table, logprobs=logprobs, beta=beta)
    options = Options(eps_low, eps_high, delta, beta, level, kind=kind, kl_ratio=kl_ratio)
    dispatch.backend_module(OP, backend).forward(logprobs, table, options, loss, metrics, grad_logprobs)


@dispatch.out_variant("logits_weighted_surrogate_forward", mutates=("loss", "metrics", "grad_logits"))
def logits_weighted_surrogate_forward(
    logits: Tensor | None,
    targets: Tensor,
    table: Tensor,
    loss: Tensor,
    metrics: Tensor,
    grad_logits: Tensor | None,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    beta: float,
    level: str,
    temperature: float,
    entropy_coef: float,
    backend: str,
    kind: str = "clip",
    kl_ratio: bool = False,
) -> None:
    """``logits`` None: they are in ``grad_logits``, and their gradient takes their place."""
    source = grad_logits if logits is None else logits
    assert source is not None
    check_values(f"logits_{OP}", table, beta=beta, targets=targets, vocabulary=source.shape[2])
    options = Options(eps_low, eps_high, delta, beta, level, temperature, None, entropy_coef, kind, kl_ratio)
    dispatch.backend_module(OP, backend).logits_forward(source, targets, table, options, loss, metrics, grad_logits)


@dispatch.out_variant(
    "linear_weighted_surrogate_forward", mutates=("loss", "metrics", "grad_hidden", "grad_weight", "grad_bias")
)
def linear_weighted_surrogate_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    table: Tensor,
    loss: Tensor,
    metrics: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    beta: float,
    level: str,
    temperature: float,
    softcap: float | None,
    entropy_coef: float,
    backend: str,
    kind: str = "clip",
    kl_ratio: bool = False,
) -> None:
    """Writes loss () and metrics (10,), and those gradients (B, T, D), (V, D), (V,) that are wanted."""
    options = Options(eps_low, eps_high, delta, beta, level, temperature, softcap, entropy_coef, kind, kl_ratio)
    order, *numbers = mark(table, options)
    valid, learning = check_values(
        f"linear_{OP}", table, beta=beta, targets=targets, vocabulary=weight.shape[0], numbers=numbers
    )
    tokens = Tokens(order, valid, learning)
    dispatch.backend_module(OP, backend).linear_forward(
        hidden, weight, bias, targets, table, tokens, options, loss, metrics, grad_hidden, grad_weight, grad_bias
    )


def _results(like: Tensor) -> tuple[Tensor, Tensor]:
    """Buffers for the loss () and the metrics (10,)."""
    loss = torch.empty((), dtype=compute_dtype(like.dtype), device=like.device)
    return loss, torch.empty(len(METRICS), dtype=torch.float32, device=like.device)


def _empty(like: Tensor, wanted: bool) -> Tensor | None:
    """A buffer for a gradient, where it is wanted."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if wanted else None


def _scaled(ctx: Any, gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """``gradients`` times ``factor``, where they are: a copy would double the memory. So there is a second backward
    through the same graph only where the first had a factor of 1."""
    if torch.compiler.is_compiling():
        return [None if g is None else g * factor.to(g.dtype) for g in gradients]
    if ctx.factor is not None and ctx.factor.item() != 1.0:
        raise RuntimeError(
            "a gradient needed for this backward has been modified by an inplace operation: the first backward scaled "
            "it. Compute the loss again."
        )
    ctx.factor = factor
    there = [gradient for gradient in gradients if gradient is not None]
    dispatch.backend_module(OP, ctx.backend).scale_(there, factor)
    return list(gradients)


class WeightedSurrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, table: Tensor, options: Options, wanted: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        """(loss (), metrics (10,)) of logprobs (B, T) and the table (rows, B, T)."""
        loss, metrics = _results(logprobs)
        gradient = _empty(logprobs, wanted)
        weighted_surrogate_forward(
            logprobs, table, loss, metrics, gradient, *options[:5], backend, options.kind, options.kl_ratio
        )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of logprobs (B, T)."""
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(gradient.dtype), None, None, None, None


class LogitsWeightedSurrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        table: Tensor,
        options: Options,
        wanted: bool,
        inplace: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """(loss (), metrics (10,)) of logits (B, T, V), targets (B, T) and the table (rows, B, T)."""
        loss, metrics = _results(logits)
        overwrite = wanted and inplace
        # detach() shares the version counter: an operator that saved these logits for its own backward will notice.
        gradient = logits.detach() if overwrite else _empty(logits, wanted)
        source = None if overwrite else logits
        logits_weighted_surrogate_forward(
            source, targets, table, loss, metrics, gradient, *options[:6], options.entropy_coef, backend, *options[8:]
        )
        ctx.save_for_backward(gradient)
        ctx.backend, ctx.factor = backend, None
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once(f"logits_{OP}")
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits (B, T, V)."""
        return *_scaled(ctx, ctx.saved_tensors, grad_loss), None, None, None, None, None, None


class LinearWeightedSurrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        table: Tensor,
        options: Options,
        wants_hidden: bool,
        wants_weight: bool,
        wants_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """(loss (), metrics (10,)) of hidden (B, T, D), weight (V, D), bias (V,), targets (B, T), the table."""
        loss, metrics = _results(hidden)
        gradients = (
            _empty(hidden, wants_hidden),
            _empty(weight, wants_weight),
            None if bias is None else _empty(bias, wants_bias),
        )
        linear_weighted_surrogate_forward(
            hidden, weight, bias, targets, table, loss, metrics, *gradients, *options[:8], backend, *options[8:]
        )
        ctx.save_for_backward(*gradients)
        ctx.backend, ctx.factor = backend, None
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once(f"linear_{OP}")
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight and bias that are wanted."""
        return *_scaled(ctx, ctx.saved_tensors, grad_loss), None, None, None, None, None, None, None
