# mypy: disable-error-code="no-untyped-def"
"""Triton: the terms of all slots on one tile of logits, each logit read once per slot that it is in."""

import torch
import triton
import triton.language as tl

from appo_kernels.dtypes import K3_CLAMP, LOG_ZERO
from appo_kernels.vocabulary.triton_rows import exp_minus_line, scaled

NO_PROBABILITY, LARGEST = tl.constexpr(LOG_ZERO), tl.constexpr(K3_CLAMP)
SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit(do_not_specialize=["T", "missing", "S", "G", "v", "first_chunk", "chunks"])
def slots_kernel(
    p_logits, p_bias, p_lse, p_members, p_sums, stride_b, stride_t, T, missing, S, G, v, first_chunk, chunks,
    cap, temperature, log_uniform,
    KL: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sums[slot, first_chunk + chunk] = sum over CHUNK of the tile's columns of mean_i p_i (log p_i - log pbar), or of
    mean_i (exp d_i - d_i - 1).

    One program per slot and chunk; sums (S, chunks). p_members (S, G): where row b T + t of the (B, T, v) logits is a
    member, ``missing`` where there is none; p_lse: of these rows. GP: G padded to a power of two.
    """
    slot = tl.program_id(0)
    g = tl.arange(0, GP)
    member = tl.load(p_members + slot.to(tl.int64) * G + g, mask=g < G, other=missing).to(tl.int64)
    present = member < missing
    row = p_logits + tl.where(present, member // T * stride_b + member % T * stride_t, 0)  # (GP,)
    lse = tl.load(p_lse + member, mask=present, other=0.0)
    count = tl.sum(present.to(tl.float32), 0)
    total = 0.0
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, v), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < v
        x = tl.load(row[:, None] + column[None, :], mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(p_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        log_p = tl.maximum(scaled(x, cap, temperature, CAP) - lse[:, None], NO_PROBABILITY)  # where a logit is -inf
        if KL:
            p = tl.where(present[:, None] & inside[None, :], tl.exp(log_p), 0.0)
            mixture = tl.maximum(tl.sum(p, 0) / count, SMALLEST_NORMAL)
            terms = p * (log_p - tl.log(mixture)[None, :])  # mixture (BLOCK,)
        else:
            log_p = tl.where(present[:, None], log_p, log_uniform)
            log_p = tl.where((g < G)[:, None], log_p, 0.0)
            d = tl.sum(log_p, 0)[None, :] / G - log_p  # (GP, BLOCK)
            d = tl.minimum(tl.maximum(d, -LARGEST), LARGEST)
            terms = tl.where((g < G)[:, None] & inside[None, :], exp_minus_line(d), 0.0)
        total += tl.sum(tl.sum(terms, 0), 0)
    total = total / (tl.maximum(count, 1.0) if KL else G)
    tl.store(p_sums + slot.to(tl.int64) * chunks + first_chunk + tl.program_id(1), total)
