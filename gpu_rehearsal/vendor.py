"""GPU-only operators of torch, computed on the host: fp32 results of half-precision products, flash attention.

Shapes: T rows one behind the other, cut into sequences by cumulative lengths, H heads, d head size.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def product(*operands: Any, out: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
    """``mm`` and ``addmm`` with a dtype of the result: (a, b, dtype) and (total, a, b, dtype)."""
    *total, a, b, dtype = operands
    found = a.to(dtype) @ b.to(dtype)
    if total:
        found = beta * total[0] + alpha * found
    return found if out is None else out.copy_(found)


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, keys: Tensor, longest_rows: int, longest_keys: int,
    dropout: float, causal: bool, debug: bool, *, scale: float, **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(T, H, d), cumulative lengths -> out (T, H, d), lse (H, T), and what only dropout needs."""
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for r, k in _sequences(rows, keys):
        scores, values = _scores(query[r], key[k], causal, scale), _of_heads(value[k], query.shape[1])
        lse[:, r] = torch.logsumexp(scores, -1)
        out[r] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
    state = torch.zeros(2, dtype=torch.int64)
    return out, lse, state, state.new_empty(0), query.new_empty(0)


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rows: Tensor, keys: Tensor,
    longest_rows: int, longest_keys: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, *, scale: float,
    **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    heads, key_heads = query.shape[1], key.shape[1]
    found = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    for r, k in _sequences(rows, keys):
        p = (_scores(query[r], key[k], causal, scale) - lse[:, r, None]).exp()  # (H, rows, keys)
        upstream = grad[r].float().transpose(0, 1)
        delta = (upstream * out[r].float().transpose(0, 1)).sum(-1, keepdim=True)
        d_scores = p * (upstream @ _of_heads(value[k], heads).transpose(1, 2) - delta) * scale
        found[0][r] = (d_scores @ _of_heads(key[k], heads)).transpose(0, 1)
        d_key = d_scores.transpose(1, 2) @ query[r].float().transpose(0, 1)
        for total, of_heads in ((found[1], d_key), (found[2], p.transpose(1, 2) @ upstream)):
            total[k] = of_heads.unflatten(0, (key_heads, -1)).sum(1).transpose(0, 1)
    return tuple(x.to(query.dtype) for x in found)


def _sequences(rows: Tensor, keys: Tensor) -> list[tuple[slice, slice]]:
    cuts = [[slice(*pair) for pair in itertools.pairwise(places.tolist())] for places in (rows, keys)]
    return list(zip(*cuts, strict=True))


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """(T, Hkv, d) -> (H, T, d) fp32, key heads repeated."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = query.float().transpose(0, 1) @ _of_heads(key, query.shape[1]).transpose(1, 2) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def sdpa_flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *arguments: Any,
    is_causal: bool = False, scale: float | None = None, **others: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """(B, H, S, d) -> out and lse (B, H, S); what is behind them is for dropout and a backward."""
    causal, scale = causal or is_causal, query.shape[-1] ** -0.5 if scale is None else scale
    pairs = [
        (_scores(q.transpose(0, 1), k.transpose(0, 1), causal, scale), v.float())
        for q, k, v in zip(query, key, value, strict=True)
    ]
    out = torch.stack([scores.softmax(-1) @ v for scores, v in pairs]).to(query.dtype)
    lse = torch.stack([torch.logsumexp(scores, -1) for scores, _ in pairs])
    none = torch.zeros(0, dtype=torch.int64)
    return out, lse, none, none, query.shape[2], key.shape[2], none, none, none


def sdpa_efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, wants_lse: bool, *arguments: Any, **options: Any
) -> tuple[Tensor, ...]:
    out, lse, none, *_ = sdpa_flash(query, key, value, *arguments, **options)
    return out, lse, none, none


HOST: dict[str, Callable[..., Any]] = {
    "mm.dtype": product,
    "bmm.dtype": product,
    "mm.dtype_out": product,
    "addmm.dtype": product,
    "addmm.dtype_out": product,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_scaled_dot_product_flash_attention": sdpa_flash,
    "_scaled_dot_product_efficient_attention": sdpa_efficient,
}
