"""torch's flash attention for CPU, as `vendor` asks for it. See there for the functions and their shapes.

Its backward shares work among threads by batch and head only, and each of these has a gradient of its keys of its own
before they are added up. So key heads lie along the batch, and beside them, as many at a time as keep the threads busy,
query heads or, of long keys, parts of one query head's rows. Long keys are cut into as many blocks as there are parts:
what the parts have of their own is then no more than a single thread would have. Keys are expanded without a copy.

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
# Blocks of keys have at least this many; shorter calls of the backward take smaller tiles, and longer for a pair.
LEAST_BLOCK = 1024


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
    rows, keys = [_by_key_head(x, key) for x in (grad, query, out, lse)], (key[0], value[0])
    dquery, dkeys = _by_key_head(totals[0], key), [total[0] for total in totals[1:]]
    for block in _blocks(slice(0, key.shape[2]), key.shape[1]):
        _rectangle_backward(rows, [x[:, block] for x in keys], scale, dquery, [x[:, block] for x in dkeys])


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
    rows = [_by_key_head(x, key) for x in (grad, query, out, lse)]
    keys = key[0], value[0]
    dquery, dkeys = _by_key_head(totals[0], key), [total[0] for total in totals[1:]]
    for stack in _stacks(pieces):
        blocks = _blocks(stack[0], len(keys[0]))
        if len(stack) == 1 and len(blocks) > 1:
            _long_causal_backward(rows, keys, blocks, scale, dquery, dkeys)
        else:
            _short_causal_backward(rows, keys, stack, scale, dquery, dkeys)


def _long_causal_backward(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    blocks: Sequence[slice],
    scale: float,
    dquery: Tensor,
    dkeys: Sequence[Tensor],
) -> None:
    """Writes the gradients of a piece that is cut into blocks: each on itself, then all later rows on each.

    rows: grad, query, out (Hkv, ratio, T, d) and lse (Hkv, ratio, T); keys: key and value (Hkv, T, d).
    """
    even = len(blocks) - (_length(blocks[-1]) < _length(blocks[0]))
    for some in (blocks[:even], blocks[even:]):
        if some:
            piece = slice(some[0].start, some[-1].stop)
            own_keys, own_dkeys = (_in_parts([x[:, piece] for x in xs], len(some)) for xs in (keys, dkeys))
            for head in range(dquery.shape[1]):
                own_rows = _in_parts([x[:, head, piece] for x in (*rows, dquery)], len(some))
                _causal_parts_backward(own_rows[:-1], own_keys, scale, own_rows[-1], own_dkeys, add=head > 0)
    for block in blocks[:-1]:
        later = slice(block.stop, blocks[-1].stop)
        own_keys, own_dkeys = ([x[:, block] for x in xs] for xs in (keys, dkeys))
        _rectangle_backward([x[:, :, later] for x in rows], own_keys, scale, dquery[:, :, later], own_dkeys)


def _causal_parts_backward(
    rows: Sequence[Tensor], keys: Sequence[Tensor], scale: float, dquery: Tensor, dkeys: Sequence[Tensor], add: bool
) -> None:
    """Writes the gradients of parts on themselves, those of keys added to what is there where ``add``. All are
    (Hkv, parts, rows, d), lse without d."""
    of_rows, *shares = _flash_backward(True, scale, *keys, *rows)
    dquery.copy_(of_rows)
    for total, share in zip(dkeys, shares, strict=True):
        total.add_(share) if add else total.copy_(share)


def _rectangle_backward(
    rows: Sequence[Tensor], keys: Sequence[Tensor], scale: float, dquery: Tensor, dkeys: Sequence[Tensor]
) -> None:
    """Adds the gradients of all rows on all keys: one query head of each key head at a time, its rows in as many equal
    parts as keep the threads busy. rows, keys: as of ``_long_causal_backward``."""
    count = dquery.shape[2]
    parts = min(count, _at_a_time(len(keys[0])))
    even = count // parts * parts
    for head in range(dquery.shape[1]):
        for some, number in ((slice(0, even), parts), (slice(even, count), 1)):  # fewer rows than parts are left
            if _length(some):
                own_rows = _in_parts([x[:, head, some] for x in (*rows, dquery)], number)
                _full_parts_backward(own_rows[:-1], keys, scale, own_rows[-1], dkeys)


def _full_parts_backward(
    rows: Sequence[Tensor], keys: Sequence[Tensor], scale: float, dquery: Tensor, dkeys: Sequence[Tensor]
) -> None:
    """Adds the gradients of parts (Hkv, parts, rows, d) on the same keys (Hkv, S, d)."""
    expanded = (x[:, None].expand(-1, rows[0].shape[1], -1, -1) for x in keys)
    of_rows, *shares = _flash_backward(False, scale, *expanded, *rows)
    dquery += of_rows
    for total, share in zip(dkeys, shares, strict=True):
        for part in share.unbind(1):
            total += part


def _short_causal_backward(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    stack: list[slice],
    scale: float,
    dquery: Tensor,
    dkeys: Sequence[Tensor],
) -> None:
    """Writes the gradients of pieces of one stack on themselves. rows, keys: as of ``_long_causal_backward``."""
    *others, lses = rows
    ratio = lses.shape[1]
    own_keys = [_take(x, stack) for x in keys]
    # A probability of padding is exp(score - largest number): 0
    own_lses = _take(lses[..., None], stack, torch.finfo(lses.dtype).max)[..., 0]
    own_rows = [*(_take(x, stack) for x in others), own_lses]
    few = ratio * own_keys[0].numel() <= FEW_NUMBERS
    count = ratio if few else min(ratio, _at_a_time(len(own_keys[0])))
    for start in range(0, ratio, count):
        heads = slice(start, start + count)
        of_rows, *shares = _flash_backward(
            True,
            scale,
            *(x[:, None].expand(-1, min(count, ratio - start), -1, -1) for x in own_keys),
            *(x[:, heads] for x in own_rows),
        )
        _put(dquery[:, heads], stack, of_rows)
        for total, share in zip(dkeys, shares, strict=True):
            _put(total, stack, share.sum(1), add=start > 0)
        del of_rows, shares, share  # before the next call has its own


def _blocks(keys: slice, key_heads: int) -> list[slice]:
    """Equal blocks of keys and perhaps a shorter one: as many as parts are computed at a time, or the whole."""
    parts = _at_a_time(key_heads)
    size = max(1, _length(keys) // parts)
    if parts == 1 or size < LEAST_BLOCK:
        return [keys]
    return [slice(start, min(start + size, keys.stop)) for start in range(keys.start, keys.stop, size)]


def _length(piece: slice) -> int:
    return int(piece.stop) - int(piece.start)


def _in_parts(tensors: Sequence[Tensor], parts: int) -> list[Tensor]:
    """(Hkv, rows, ...) -> (Hkv, parts, rows / parts, ...), views."""
    return [x.unflatten(1, (parts, -1)) for x in tensors]


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
        x[..., piece, :].add_(found) if add else x[..., piece, :].copy_(found)


def _flash(causal: bool, scale: float, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query (B, ratio, R, d), key and value (B, S, d) -> out, lse (B, ratio, R)."""
    key, value = (x[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return found[0], found[1]


def _flash_backward(
    causal: bool, scale: float, key: Tensor, value: Tensor, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, query, out (B, H, R, d), lse (B, H, R), key, value (B, H, S, d) -> gradients of query, key and value."""
    dquery, dkey, dvalue = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, scale=scale
    )
    return dquery, dkey, dvalue


def _at_a_time(key_heads: int) -> int:
    """The number of pieces of work, each with a gradient of the keys of its own, that keep the threads busy."""
    return max(1, -(-torch.get_num_threads() // key_heads))
