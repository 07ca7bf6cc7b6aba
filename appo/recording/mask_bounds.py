"""The keys that query rows see, as intervals, from what a transformers attention function is given.

The operators know one rule (docs/method.md eq. 5): row r sees keys first_key <= v <= last_key, and v < prefix_keys.
Causal attention, padding, packing, sliding windows and a shared prompt are such rules. A mask that is none is refused.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo.recording.hooks import OP, AttentionCall
from appo_kernels import checks

# exp(-1e4) is 0 in every dtype, so an additive mask from here down hides the key. Masks use -inf, finfo.min or -1e9.
HIDDEN = -1e4


class Visibility(NamedTuple):
    first_key: Tensor  # (B, R) int32
    last_key: Tensor  # (B, R) int32; first_key > last_key: the row sees no key of the interval
    prefix_keys: Tensor | None  # (B, R) int32: keys 0..prefix-1 are seen as well; None: of no row


def visible_keys(rows: Tensor, call: AttentionCall) -> Visibility:
    """Return the visible key range of ``rows`` in one call of an attention function.

    Args:
        rows: (B, R) int64, positions among the keys; those of the call's queries are the last L of S.
        call: ``call.implementation`` decides what a mask of None means, and whether packing and windows are told by
            ``call.options`` ("flash" in the name) or by the mask.

    Raises:
        ValueError: the mask is no interval, adds a bias, differs between heads, or has an unknown type.
    """
    mask, num_queries, num_keys = call.mask, call.query.shape[2], call.key.shape[2]
    if mask is None:
        return _without_mask(rows, call)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        checks.fail(
            OP,
            "attention_mask",
            "a (B, S) or (B, 1, L, S) tensor in the tapped layers",
            got,
            'Use attn_implementation "sdpa", "eager" or "flash_attention_2".',
        )
    if mask.shape[-1] != num_keys:
        checks.fail(
            OP,
            "attention_mask",
            f"{num_keys} keys, as the layer has",
            f"{mask.shape[-1]}",
            "Record a forward without a static or quantised cache.",
        )
    if mask.dim() == 2:
        return _from_padding(rows, mask.bool(), call)
    return intervals(_dense(rows - (num_keys - num_queries), mask, call.implementation), rows)


def intervals(visible: Tensor, rows: Tensor) -> Visibility:
    """(B, R, S) bool -> intervals: the last run of visible keys, and a first run that begins at key 0 as the prefix."""
    num_keys = visible.shape[-1]
    keys = torch.arange(num_keys, dtype=torch.int32, device=visible.device)
    last = torch.where(visible, keys, -1).amax(-1)
    first = torch.where(visible | (keys > last[..., None]), -1, keys).amax(-1) + 1
    prefix = torch.where(visible, num_keys, keys).amin(-1)
    prefix = torch.where(first == 0, 0, prefix).int()  # one run from key 0: the interval holds it already
    wrong = visible.sum(-1) != last - first + 1 + prefix
    if wrong.any():
        sequence, row = (int(i) for i in wrong.nonzero()[0])
        checks.fail(
            OP,
            "attention_mask",
            "each row to see one run of keys, and perhaps one that begins at key 0",
            f"more runs in the row of position {int(rows[sequence, row])} of sequence {sequence}",
            "Record a forward with causal attention, padding, packing, a sliding window or a shared prefix only.",
        )
    return Visibility(first, last, prefix if bool(prefix.any()) else None)


def _dense(query_rows: Tensor, mask: Tensor, implementation: str | None) -> Tensor:
    """The rows of a (1 or B, 1 or Hq, L, S) mask as (B, R, S) bool."""
    batch = torch.arange(len(query_rows), device=mask.device)[:, None]
    chosen = mask.expand(len(query_rows), -1, -1, -1)[batch, :, query_rows.to(mask.device)]  # (B, R, heads, S)
    if chosen.dtype == torch.bool:
        if implementation == "eager":
            checks.fail(
                OP, "attention_mask", "an additive mask with eager attention", "bool", "Eager attention adds it."
            )
        visible = chosen
    else:
        visible = chosen == 0
        if not bool((visible | (chosen <= HIDDEN)).all()):
            checks.fail(
                OP,
                "attention_mask",
                f"an additive mask of zeros and values below {HIDDEN:g}",
                "other values",
                "A bias on the scores has no interval form; record without it.",
            )
    if visible.shape[2] > 1 and not bool((visible == visible[:, :, :1]).all()):
        checks.fail(OP, "attention_mask", "the same mask for all heads", "masks that differ", "Tap other layers.")
    return visible[:, :, 0]


def _from_padding(rows: Tensor, valid: Tensor, call: AttentionCall) -> Visibility:
    """Flash attention's (B, S) mask: padding tokens are taken out, as keys and as rows."""
    batch, num_keys = valid.shape
    token = intervals(valid[:, None, :], rows[:, :1].new_zeros(batch, 1))
    if token.prefix_keys is not None:
        checks.fail(OP, "attention_mask", "padding at the ends only", "padding within a sequence", "Pad at one side.")
    last = torch.minimum(rows, token.last_key.long()) if call.is_causal else token.last_key.expand_as(rows)
    first = _within_window(rows, token.first_key.expand_as(rows).long(), call)
    first = torch.where(valid.gather(1, rows), first, num_keys)
    return Visibility(first.int(), last.int(), None)


def _without_mask(rows: Tensor, call: AttentionCall) -> Visibility:
    """The range of rows where the implementation is told of visibility by arguments, or sees everything."""
    first, num_keys = torch.zeros_like(rows), call.key.shape[2]
    if call.implementation in (None, "eager") or not call.is_causal:  # eager attention without a mask sees everything
        return Visibility(first.int(), torch.full_like(rows, num_keys - 1).int(), None)
    if "flash" in str(call.implementation):
        first = torch.maximum(first, _packed_starts(rows, num_keys, call.options))
        first = _within_window(rows, first, call)
    return Visibility(first.int(), rows.int(), None)


def _within_window(rows: Tensor, first: Tensor, call: AttentionCall) -> Tensor:
    """(B, R) first keys, none before the sliding window of the call."""
    window = call.options.get("sliding_window")
    return first if window is None else torch.maximum(first, rows - window + 1)


def _packed_starts(rows: Tensor, num_keys: int, options: dict[str, Any]) -> Tensor:
    """(B, R): where each row's packed sequence starts, by the arguments that tell flash attention of packing."""
    cumulative, positions = options.get("cu_seq_lens_k"), options.get("position_ids")
    begins = torch.zeros(len(rows) * num_keys, dtype=torch.bool, device=rows.device)  # (B * S,)
    if cumulative is not None:
        begins[cumulative[:-1].long()] = True
    elif positions is not None and len(rows) == 1 and positions.shape[-1] == num_keys:
        # transformers: packed where position ids do not count up by one, cut where they are at their smallest
        flat = positions.reshape(-1)
        if bool((flat.diff() != 1).any()):
            begins = flat == flat.min()
    index = torch.arange(num_keys, device=rows.device)
    starts = torch.where(begins.view(len(rows), num_keys), index, 0).cummax(1).values
    return starts.gather(1, rows)
