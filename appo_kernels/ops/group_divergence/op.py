"""group_divergence: how much the members of a group disagree at each slot of intra-group perception tokens.

The rows of ``hidden`` that some slot refers to are multiplied with the weight once each, tile by tile of the
vocabulary; the lse is given, so one pass over the vocabulary does. A backend has

    forward(hidden, weight, lse, selection, kind, bias, temperature, softcap, divergence)
    forward_from_logits(logits, lse, slots, kind, temperature, divergence)

which write ``divergence`` (K, J), fp32 (fp64 for fp64 inputs), whatever was in it before. ``selection.select`` finds
the unique rows, of which there is at least one. ``streaming.accumulate`` walks over the tiles; ``streaming.fold_kl``
and ``streaming.fold_k3`` are the pass over one tile of logits that follows the vendor library's matrix product, for
another backend to replace.
"""

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.group_divergence.selection import mark, select
from appo_kernels.vocabulary.arguments import check_projection, check_temperature

OP, OP_LOGITS = "group_divergence", "group_divergence_from_logits"
KINDS = ("kl", "k3")


def group_divergence(
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    slots: Tensor,
    *,
    kind: str = "kl",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the members of every slot (docs/method.md eqs. 11, 12).

    p_i = softmax(softcap(hidden weight^T + bias) / temperature) at member i, softcap(x) = cap tanh(x / cap).

    kind "kl" (the paper): mean over the members present of KL(p_i || pbar), pbar their mean: 0 <= D <= log G,
    0 with fewer than two members. Words of probability 0 add nothing.

    kind "k3" (the released trainer): mean over all G rows of sum_v (exp(d_i) - d_i - 1) with
    d_i = clamp(mean_i log p_i - log p_i, -11, 11); a missing member counts as the uniform distribution. log p = -inf
    is the limit of log p = -x, the same large x for all members: d is 0 where no row can say the word, else 11 for the
    rows that cannot and -11 for those that can.

    Args:
        hidden: (G, N, D) fp32, fp16, bf16 or fp64.
        weight: (V, D), dtype of ``hidden``.
        lse: (G, N) fp32 (or fp64), natural log, of the same temperature-scaled logits, as ``token_logprobs`` returns
            it. Read at the positions that ``slots`` names, and finite there.
        slots: (K, G, J) int32 or int64: position in [0, N) of each response's token in slot (k, j), -1 for none.
        kind: "kl" or "k3".
        bias: (V,) in any float dtype; -inf takes a word out of the distribution.
        temperature: the sampling temperature, positive.
        softcap: positive cap of the logits, or None.
        backend: "auto", "torch", "triton" or "cuda".

    Returns:
        (K, J) fp32 (fp64 for fp64 inputs). Not differentiable: the token weights made of it are detached. Bitwise
        equal on a second run. Memory beside inputs and result does not grow with N V.

    Raises:
        ValueError: a wrong shape, dtype or device, an unknown kind, a slot outside [-1, N), an lse that is not finite,
            a group without a response, a temperature or cap that is not positive.
    """
    checks.rank(OP, "hidden", hidden, 3, "(G, N, D)")
    temperature, softcap = check_projection(OP, hidden, weight, bias, temperature, softcap)
    _check_group(OP, "hidden", hidden, lse, slots, kind)
    backend = dispatch.resolve(OP, backend, hidden.device, hidden.dtype)
    divergence = hidden.new_empty(slots.shape[0], slots.shape[2], dtype=compute_dtype(hidden.dtype))
    forward_op(
        hidden.detach(), weight.detach(), lse.detach(), slots, kind, None if bias is None else bias.detach(),
        temperature, softcap, divergence, backend,
    )  # fmt: skip
    return divergence


def group_divergence_from_logits(
    logits: Tensor,
    lse: Tensor,
    slots: Tensor,
    *,
    kind: str = "kl",
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """``group_divergence`` for callers that hold the logits (G, N, V), before temperature, in any float dtype.

    The lse (G, N) is that of logits / temperature. Other arguments, result and errors as of ``group_divergence``.
    """
    checks.rank(OP_LOGITS, "logits", logits, 3, "(G, N, V)")
    checks.dtype(OP_LOGITS, "logits", logits, checks.FLOATS)
    temperature = check_temperature(OP_LOGITS, temperature)
    _check_group(OP_LOGITS, "logits", logits, lse, slots, kind)
    backend = dispatch.resolve(OP, backend, logits.device, logits.dtype, function=OP_LOGITS)
    divergence = logits.new_empty(slots.shape[0], slots.shape[2], dtype=compute_dtype(logits.dtype))
    from_logits_op(logits.detach(), lse.detach(), slots, kind, temperature, divergence, backend)
    return divergence


def _check_group(op: str, name: str, group: Tensor, lse: Tensor, slots: Tensor, kind: str) -> None:
    checks.choice(op, "kind", kind, KINDS, 'Pass "kl" for the paper\'s divergence.')
    if group.shape[0] < 1 or group.shape[2] < 1:
        remedy = "Skip groups without a response."
        checks.fail(op, name, "at least one response", f"shape {tuple(group.shape)}", remedy)
    checks.dtype(op, "lse", lse, (torch.float32, torch.float64))
    remedy = f"Pass the lse of every position of `{name}`, as token_logprobs returns it, reshaped to (G, N)."
    checks.shape(op, "lse", lse, group.shape[:2], "(G, N)", remedy)
    checks.dtype(op, "slots", slots, checks.INTS)
    checks.rank(op, "slots", slots, 3, "(K, G, J)")
    if slots.shape[1] != group.shape[0]:
        expected = f"shape (K, G, J) with G = {group.shape[0]}, the first of `{name}`"
        checks.fail(op, "slots", expected, f"shape {tuple(slots.shape)}", "Pass slots of the same group of responses.")
    checks.same_device(op, name, group, lse=lse, slots=slots)


def _check_slots(op: str, lse: Tensor, slots: Tensor, *others: Tensor) -> list[int]:
    """The check of values, and whole numbers () that are wanted on the host: one synchronisation for all."""
    if not checks.values_enabled() or not slots.numel():
        return checks.on_host(*others)
    positions = lse.shape[1]
    if positions:
        used = lse.expand(slots.shape[0], -1, -1).gather(2, slots.clamp(0, positions - 1).long())
    else:  # responses without a token
        used = lse.new_zeros(slots.shape)
    low, high, bad, *numbers = checks.on_host(*slots.aminmax(), ((slots >= 0) & ~used.isfinite()).sum(), *others)
    if low < -1 or high >= positions:
        expected = f"positions in [0, {positions}), or -1 for a missing member"
        remedy = "Positions count response tokens from 0, without the prompt."
        checks.fail(op, "slots", expected, f"values from {low} to {high}", remedy)
    if bad:
        remedy = "Compute the lse of the same hidden states or logits; select only valid tokens."
        checks.fail(op, "lse", "finite values at the positions in `slots`", f"{bad} that are not finite", remedy)
    return numbers


@dispatch.out_variant("group_divergence_forward", mutates=("divergence",))
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    slots: Tensor,
    kind: str,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    divergence: Tensor,
    backend: str,
) -> None:
    """Writes ``divergence`` (K, J): hidden (G, N, D), weight (V, D), lse (G, N), slots (K, G, J), bias (V,)."""
    marked = mark(slots, lse.shape[1])
    (count,) = _check_slots(OP, lse, slots, marked.unique)
    if not count:
        divergence.zero_()  # no slot has a member: nothing to disagree (kl), all uniform (k3)
        return
    selection = select(marked, lse.shape[1], count)
    dispatch.backend_module(OP, backend).forward(
        hidden, weight, lse, selection, kind, bias, temperature, softcap, divergence
    )


@dispatch.out_variant("group_divergence_from_logits_forward", mutates=("divergence",))
def from_logits_op(
    logits: Tensor, lse: Tensor, slots: Tensor, kind: str, temperature: float, divergence: Tensor, backend: str
) -> None:
    """Writes ``divergence`` (K, J): logits (G, N, V), lse (G, N), slots (K, G, J)."""
    _check_slots(OP_LOGITS, lse, slots)
    if not lse.numel():
        divergence.zero_()
        return
    dispatch.backend_module(OP, backend).forward_from_logits(logits, lse, slots, kind, temperature, divergence)
