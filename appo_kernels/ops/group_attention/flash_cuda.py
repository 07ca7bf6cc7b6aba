"""torch's flash attention on CUDA, as `vendor` asks for it. See there for the functions and their shapes.

All prompts and responses on themselves are one call, whose cumulative lengths cut the row at each of them; the
responses of a group on their prompt are a call of one sequence of queries and one of keys. Written from the signatures
and the layouts of torch's source (aten/src/ATen/native/transformers/cuda); no GPU has run it yet.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.dtypes import HALVES, dtype_name

COLUMNS = 8  # its head sizes are multiples of that
MOST_HEAD_DIM = 256


def unsupported(problem: dispatch.Problem) -> str | None:
    if problem.dtype not in HALVES:
        return f"torch's flash attention on CUDA takes float16 and bfloat16, not {dtype_name(problem.dtype)}"
    if problem.head_dim % COLUMNS or not 0 < problem.head_dim <= MOST_HEAD_DIM:
        return (
            f"torch's flash attention on CUDA takes head sizes that are multiples of {COLUMNS} up to {MOST_HEAD_DIM}, "
            f"not {problem.head_dim}"
        )
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash attention for CUDA"
    major, minor = torch.cuda.get_device_capability(problem.device)
    if major < 8:
        return f"torch's flash attention needs sm_80 or later, the device is sm_{major}{minor}"
    return None


def prepared(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


def causal(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[slice], scale: float) -> tuple[Tensor, Tensor]:
    cuts = _cuts(pieces, query.device)
    return _flash(query, key, value, cuts, cuts, True, scale)


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
    cuts = _cuts(pieces, query.device)
    for total, found in zip(
        totals, _flash_backward(grad, query, key, value, out, lse, cuts, cuts, True, scale), strict=True
    ):
        total.copy_(found)


def full(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _flash(query, key, value, _one_cut(query), _one_cut(key), False, scale)


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
    cuts = _one_cut(query), _one_cut(key)
    for total, found in zip(
        totals, _flash_backward(grad, query, key, value, out, lse, *cuts, False, scale), strict=True
    ):
        total += found


class Cuts(NamedTuple):
    """Begins and ends of sequences among rows that lie one behind the other."""

    places: Tensor  # (sequences + 1,) int32: cumulative lengths
    longest: int


def _cuts(pieces: Sequence[slice], device: torch.device) -> Cuts:
    return _cut_at((0, *(piece.stop for piece in pieces)), device)


def _one_cut(rows: Tensor) -> Cuts:
    """Of rows (1, H, R, d): one sequence of all R."""
    return _cut_at((0, rows.shape[2]), rows.device)


@functools.lru_cache(maxsize=64)  # the layers of a forward, and its backward, ask for the same ones
def _cut_at(places: tuple[int, ...], device: torch.device) -> Cuts:
    longest = max(stop - start for start, stop in itertools.pairwise(places))
    return Cuts(torch.tensor(places, dtype=torch.int32).to(device, non_blocking=True), longest)


def _rows(x: Tensor) -> Tensor:
    """(1, H, rows, d) -> (rows, H, d), a view."""
    return x[0].transpose(0, 1)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, rows: Cuts, keys: Cuts, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._flash_attention_forward(
        *map(_rows, (query, key, value)), rows.places, keys.places, rows.longest, keys.longest,
        0.0, causal, False, scale=scale,
    )  # fmt: skip
    out, lse = found[0].transpose(0, 1)[None], found[1][None]
    if lse.shape != query.shape[:3]:
        raise RuntimeError(
            f"group_attention: torch {torch.__version__} returns a log-sum-exp of shape {tuple(lse.shape[1:])}, "
            f'expected (Hq, T) = {tuple(query.shape[1:3])}. Pass backend="triton".'
        )
    return out, lse


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Cuts,
    keys: Cuts,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.shape[-1] > MOST_HEAD_DIM:
        raise ValueError(
            f"group_attention: `lse`: expected no gradient through it above head size {MOST_HEAD_DIM - COLUMNS} with "
            f'backend "torch" on CUDA, got {query.shape[-1] - COLUMNS}. Pass backend="triton".'
        )
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout that there is not
    found = torch.ops.aten._flash_attention_backward(
        *map(_rows, (grad, query, key, value, out)), lse[0].contiguous(), rows.places, keys.places,
        rows.longest, keys.longest, 0.0, causal, seed, seed.new_empty(0), scale=scale,
    )  # fmt: skip
    dquery, dkey, dvalue = (x.transpose(0, 1)[None] for x in found)
    return dquery, dkey, dvalue
