"""torch's flash attention for CPU, as `vendor` asks for it. See there for the functions and their shapes.

Its backward shares work among threads by batch and head only, and each of these has a gradient of its keys of its own
before they are added up. So key heads lie along the batch, and beside them some query heads, or parts of one query
head's rows: as many at a time as keep the threads busy. Keys are expanded to them without a copy.

fp16 and bf16 are computed in fp32: the backward in fp16 takes ten times as long, bf16 gains little without AMX, and
what is merged here would be rounded twice.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.dtypes import compute_dtype

COLUMNS = 1
# Pieces shorter than this are stacked, so that a call has more to do; at most an eighth of a stack is padding.
SHORT, WASTE = 64, 8
# Of a gradient of keys and all their query heads: below this all query heads go at a time.
FEW_NUMBERS = 1 << 18


def unsupported(problem: dispatch.Problem) -> str | None:
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"):
        return f"torch {torch.__version__} has no flash attention for CPU"
    return None


def prepared(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(compute_dtype(tensor.dtype)) for tensor in tensors)


def full(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _flash(False, scale, _by_key_head(query, key), key[0], value[0])
    return _by_query_head(out), _by_query_head(lse)


def full_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    totals: Sequence[Tensor],
) -> None:
    """One query head of each key head at a time, its rows in as many equal parts as keep the threads busy."""
    rows = [_by_key_head(x, key) for x in (grad, query, out, lse)]
    dquery, dkey, dvalue = _by_key_head(totals[0], key), totals[1][0], totals[2][0]
    parts = _at_a_time(key.shape[1], dquery.shape[2])
    even = dquery.shape[2] // parts * parts
    for head in range(dquery.shape[1]):
        for some in (slice(0, even), slice(even, None)):  # fewer rows than threads are left
            cut = [x[:, head, some].unflatten(1, (parts if some.start == 0 else 1, -1)) for x in rows]
            if cut[0].shape[2]:
                of_rows, of_keys, of_values = _flash_backward(False, scale, key[0], value[0], *cut)
                dquery[:, head, some] += of_rows.flatten(1, 2)
                del of_rows
                dkey += of_keys.sum(1)
                dvalue += of_values.sum(1)


def causal(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[slice], scale: float) -> tuple[Tensor, Tensor]:
    queries = _by_key_head(query, key)
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:3])
    for stack in _stacks(pieces):
        outs, lses = _flash(True, scale, *(_take(x, stack) for x in (queries, key[0], value[0])))
        _put(out, stack, outs)
        _put(lse[..., None], stack, lses[..., None])
    return _by_query_head(out), _by_query_head(lse)


def causal_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Sequence[slice],
    scale: float,
    totals: Sequence[Tensor],
) -> None:
    grads, queries, outs, lses = (_by_key_head(x, key) for x in (grad, query, out, lse))
    dquery, dkey, dvalue = _by_key_head(totals[0], key), totals[1][0], totals[2][0]
    ratio = queries.shape[1]
    for stack in _stacks(pieces):
        keys = [_take(x[0], stack) for x in (key, value)]
        # A probability of padding is exp(score - largest number): 0
        row_lses = _take(lses[..., None], stack, torch.finfo(lses.dtype).max)[..., 0]
        rows = [*(_take(x, stack) for x in (grads, queries, outs)), row_lses]
        few = ratio * keys[0].numel() <= FEW_NUMBERS
        count = ratio if few else _at_a_time(len(keys[0]), ratio)
        for start in range(0, ratio, count):
            heads = slice(start, start + count)
            of_rows, *shares = _flash_backward(True, scale, *keys, *(x[:, heads] for x in rows))
            _put(dquery[:, heads], stack, of_rows)
            del of_rows
            for total, share in zip((dkey, dvalue), shares, strict=True):
                _put(total, stack, share.sum(1), add=start > 0)


def _by_key_head(rows: Tensor, key: Tensor) -> Tensor:
    """(1, Hq, ...) -> (Hkv, Hq / Hkv, ...), a view."""
    return rows[0].unflatten(0, (key.shape[1], -1))


def _by_query_head(rows: Tensor) -> Tensor:
    """(Hkv, Hq / Hkv, ...) -> (1, Hq, ...), the other way round."""
    return rows.flatten(0, 1)[None]


def _stacks(pieces: Sequence[slice]) -> Iterator[list[slice]]:
    """Pieces that one call computes: long ones alone, short ones with others of about their length."""
    stack: list[slice] = []
    for piece in sorted(pieces, key=lambda piece: piece.start - piece.stop):  # longest first
        longest = stack[0].stop - stack[0].start if stack else 0
        if stack and (longest >= SHORT or WASTE * (piece.stop - piece.start) < (WASTE - 1) * longest):
            yield stack
            stack = []
        stack.append(piece)
    if stack:
        yield stack


def _take(x: Tensor, stack: list[slice], padding: float = 0.0) -> Tensor:
    """Pieces of (Hkv, ..., T, d) one behind the other along the first dimension, padded to the longest."""
    if len(stack) == 1:
        return x[..., stack[0], :]
    longest = stack[0].stop - stack[0].start
    taken = x.new_full((len(stack), *x.shape[:-2], longest, x.shape[-1]), padding)
    for row, piece in zip(taken, stack, strict=True):
        row[..., : piece.stop - piece.start, :] = x[..., piece, :]
    return taken.flatten(0, 1)


def _put(x: Tensor, stack: list[slice], values: Tensor, add: bool = False) -> None:
    """The other way round, into (Hkv, ..., T, d) or added to it."""
    for piece, value in zip(stack, values.unflatten(0, (len(stack), -1)), strict=True):
        found = value[..., : piece.stop - piece.start, :]
        x[..., piece, :] = x[..., piece, :] + found if add else found


def _flash(causal: bool, scale: float, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query (B, ratio, R, d), key and value (B, S, d) -> out, lse (B, ratio, R)."""
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1]


def _flash_backward(
    causal: bool,
    scale: float,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, query, out (B, ratio, R, d), lse (B, ratio, R), key, value (B, S, d) -> gradients of query, and of key and
    value for each query head, (B, ratio, S, d)."""
    keys = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    dquery, dkey, dvalue = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, *keys, out, lse, 0.0, causal, scale=scale
    )
    return dquery, dkey, dvalue


def _at_a_time(key_heads: int, most: int) -> int:
    """The number of pieces of work, each with a gradient of the keys of its own, that keep the threads busy."""
    return max(1, min(most, -(-torch.get_num_threads() // key_heads)))
