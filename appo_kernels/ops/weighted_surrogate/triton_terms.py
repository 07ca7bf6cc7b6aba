# mypy: disable-error-code="no-untyped-def"
"""Triton: loss, derivative and metrics of tokens, as in kinds.py and loss.py, one program per response.

Terms are fp32, sums of them fp64. Shapes: B responses, T tokens.
"""

import triton
import triton.language as tl

from appo_kernels.dtypes import LOG_ZERO
from appo_kernels.ops.weighted_surrogate.kinds import DPPO_CAP, SAPO_TAU_GAIN, SAPO_TAU_LOSS
from appo_kernels.vocabulary.triton_rows import exp_minus_line, row_offset

CLIP, CISPO, SAPO, DPPO_TV, GPG = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
TAU_GAIN, TAU_LOSS, TV_CAP = tl.constexpr(SAPO_TAU_GAIN), tl.constexpr(SAPO_TAU_LOSS), tl.constexpr(DPPO_CAP)
NO_PROBABILITY = tl.constexpr(LOG_ZERO)
# A program's sums, 16 lanes: the loss, then in the order of METRICS sums (``ratio_max``: the largest), then the numbers
# of valid tokens and of those with a weight above 1.
LANES = 16


@triton.jit
def expm1(x):
    return exp_minus_line(x) + x


@triton.jit
def clamped(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def load_row(p_table, row, stride, token, inside):
    """Row ``row`` of the table (7, n) at flat tokens."""
    return tl.load(p_table + row * tl.cast(stride, tl.int64) + token, mask=inside, other=0.0)


@triton.jit
def load_results(
    p_values, stride_values, token, inside, valid, GIVEN: tl.constexpr
):  # fmt: skip
    """Log-probability, entropy and lse of tokens, the first two 0 where not valid, from ``GIVEN`` rows of values:
    log-probabilities alone, with entropies, or the state of ``triton_rows.fold``."""
    stride_values = tl.cast(stride_values, tl.int64)
    first = tl.load(p_values + token, mask=inside, other=0.0).to(tl.float32)
    second = tl.zeros_like(first)
    if GIVEN > 1:
        second = tl.load(p_values + stride_values + token, mask=inside, other=1.0)
    logprob, entropy, lse = first, second, second
    if GIVEN == 4:  # row_max, row_sum, weighted_sum, target_logit
        weighted_sum = tl.load(p_values + 2 * stride_values + token, mask=inside, other=0.0)
        target_logit = tl.load(p_values + 3 * stride_values + token, mask=inside, other=0.0)
        log_sum = tl.log(second)
        logprob, entropy, lse = target_logit - first - log_sum, log_sum - weighted_sum / second, first + log_sum
    return tl.where(valid, logprob, 0.0), tl.where(valid, entropy, 0.0), lse


@triton.jit
def policy_terms(
    logprob, old, ratio, advantage, factor, eps_low, eps_high, delta, KIND: tl.constexpr, DELTA: tl.constexpr
):  # fmt: skip
    """Loss, slope, and whether a token is held at its lower or upper limit: ``kinds.policy_terms``."""
    low, high = (ratio < 1 - eps_low) & (advantage < 0), (ratio > 1 + eps_high) & (advantage > 0)
    never = low & (advantage > 0)
    if KIND == CLIP:
        bounded = clamped(ratio, 1 - eps_low, 1 + eps_high)
        free = tl.where(ratio > delta, delta, ratio) if DELTA else ratio
        branch = tl.where(factor * free >= factor * bounded, free, bounded)
        loss = factor * branch
        slope = tl.where(branch == ratio, loss, 0.0)
    elif KIND == SAPO:
        tau = tl.where(advantage > 0, TAU_GAIN, TAU_LOSS)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        moves = 4.0 * gate * (1.0 - gate)
        loss = factor * gate * 4.0 / tau
        slope = tl.where(moves == 0.0, 0.0, factor * moves * ratio)
        low, high = never, never
    else:
        if KIND == CISPO:
            slope = factor * tl.where(ratio > 1 + eps_high, 1 + eps_high, ratio)
            low = never
        elif KIND == DPPO_TV:
            moved = tl.exp(logprob) - tl.exp(old)
            low, high = (moved < -eps_low) & (advantage <= 0), (moved > eps_high) & (advantage > 0)
            cap = delta if DELTA else TV_CAP
            slope = tl.where(low | high, 0.0, factor * tl.where(ratio > cap, cap, ratio))
        else:
            slope = factor
            low, high = never, never
        loss = tl.where(slope == 0.0, 0.0, slope * logprob)
    return loss, slope, low, high


@triton.jit
def token_terms(
    p_values, p_table, stride_values, stride_table, token, inside, row_log_ratio, eps_low, eps_high,
    delta, beta,
    KIND: tl.constexpr, DELTA: tl.constexpr, SEQUENCE: tl.constexpr, COUPLED: tl.constexpr, BETA: tl.constexpr,
    KL_RATIO: tl.constexpr, COUPLED_KL: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Everything a token has. ``own`` is the part of its slope that is its own, ``shared`` what it gives to the slopes
    of all tokens of its response; both without the token's share of the loss."""
    mask = load_row(p_table, 0, stride_table, token, inside)
    valid = mask != 0.0
    old, advantage = (
        load_row(p_table, 1, stride_table, token, inside),
        load_row(p_table, 2, stride_table, token, inside),
    )
    weight, importance = (
        load_row(p_table, 3, stride_table, token, inside),
        load_row(p_table, 4, stride_table, token, inside),
    )
    logprob, entropy, lse = load_results(
        p_values, stride_values, token, inside, valid, GIVEN
    )  # fmt: skip
    log_ratio = logprob - old
    ratio = tl.exp(tl.where(valid, row_log_ratio, 0.0) if SEQUENCE else log_ratio)
    loss, slope, low, high = policy_terms(
        logprob, old, ratio, advantage, weight * importance * -advantage, eps_low, eps_high, delta, KIND, DELTA
    )  # fmt: skip
    moves = valid & (slope != 0.0)
    to_ref = load_row(p_table, 5, stride_table, token, inside) - logprob
    k3 = exp_minus_line(to_ref)
    own, shared = slope, tl.zeros_like(slope)
    if COUPLED:
        own, shared = tl.zeros_like(slope), slope
    if BETA:
        loss += beta * (ratio * k3 if KL_RATIO else k3)
        if COUPLED_KL:
            own -= beta * ratio * expm1(to_ref)
            shared += beta * ratio * k3
        elif KL_RATIO:
            own += beta * ratio * (k3 - expm1(to_ref))
        else:
            own -= beta * expm1(to_ref)
    return (
        valid,
        logprob,
        entropy,
        lse,
        log_ratio,
        ratio,
        weight,
        k3,
        loss,
        own,
        shared,
        low & valid,
        high & valid,
        moves,
    )


@triton.jit
def lane(values, index: tl.constexpr, total):
    """(LANES,): ``values`` with ``total`` at ``index``."""
    return tl.where(tl.arange(0, 16) == index, total, values)


# Loaded as scalars: the alignment of slices of them must not compile another kernel.
ROW_VECTORS = ("p_values", "p_table", "p_sums", "p_slope", "p_lse", "p_constant", "p_at_target")


@triton.jit(do_not_specialize=[*ROW_VECTORS, "T", "stride_values", "stride_table"])
def terms_kernel(
    p_values, p_table, p_sums, p_slope, p_lse, p_constant, p_at_target, stride_values, stride_table, T,
    eps_low, eps_high, delta, beta, entropy_coef,
    KIND: tl.constexpr, DELTA: tl.constexpr, SEQUENCE: tl.constexpr, COUPLED: tl.constexpr, BETA: tl.constexpr,
    KL_RATIO: tl.constexpr, COUPLED_KL: tl.constexpr, GIVEN: tl.constexpr,
    SUM: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of one response, or without SEQUENCE of a part of it: programs (parts, B).

    SUM: p_sums (B, parts, 16) fp64. SLOPE: p_slope (n,) d loss / d logprob. ROWS: what ``triton_rows.gradient`` takes,
    lse, constant, slope and at_target (n,) each, from g = d loss / d logprob and h = d loss / d entropy:
    dz = g (onehot - p) - h p (log p + H). n = B T tokens; p_table (7, n), rows ``stride_table`` apart, as those of
    the values are ``stride_values``.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    start, stop = part * BLOCK, tl.minimum(part * BLOCK + BLOCK, T)
    if SEQUENCE:
        stop = T
    base = b.to(tl.int64) * T
    row_log_ratio, length = 0.0, 1.0
    if SEQUENCE:
        differences, lengths = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float32)
        for first in range(start, stop, BLOCK):
            t = first + tl.arange(0, BLOCK)
            inside = t < stop
            mask = load_row(p_table, 0, stride_table, base + t, inside)
            logprob, _, _ = load_results(
                p_values, stride_values, base + t, inside, mask != 0.0, GIVEN
            )  # fmt: skip
            differences += (logprob - load_row(p_table, 1, stride_table, base + t, inside)).to(tl.float64)
            lengths += mask
        length = tl.maximum(tl.sum(lengths, 0), 1.0)
        row_log_ratio = (tl.sum(differences, 0) / length).to(tl.float32)
    from_all = 0.0
    if SUM or COUPLED or COUPLED_KL:
        zero, none = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float32)
        s_loss, s_kl, s_ref, s_entropy, s_ratio, s_weight, s_shared = zero, zero, zero, zero, zero, zero, zero
        s_low, s_high, s_held, s_moves, s_valid, s_weighted, most = none, none, none, none, none, none, none
        for first in range(start, stop, BLOCK):
            t = first + tl.arange(0, BLOCK)
            inside = t < stop
            valid, _, entropy, _, log_ratio, ratio, weight, k3, loss, _, shared, low, high, moves = token_terms(
                p_values, p_table, stride_values, stride_table, base + t, inside, row_log_ratio, eps_low,
                eps_high, delta, beta, KIND, DELTA, SEQUENCE, COUPLED, BETA, KL_RATIO, COUPLED_KL, GIVEN,
            )  # fmt: skip
            share = load_row(p_table, 6, stride_table, base + t, inside)
            s_shared += (shared * share).to(tl.float64)
            s_loss += ((loss - entropy_coef * entropy) * share).to(tl.float64)
            s_kl += exp_minus_line(log_ratio).to(tl.float64)
            s_ref += k3.to(tl.float64)
            s_entropy += entropy.to(tl.float64)
            s_ratio += tl.where(valid, ratio, 0.0).to(tl.float64)
            s_weight += weight.to(tl.float64)
            held, heavy = low | high, weight > 1.0
            s_low += low.to(tl.float32)
            s_high += high.to(tl.float32)
            s_held += (held & heavy).to(tl.float32)
            s_moves += moves.to(tl.float32)
            s_valid += valid.to(tl.float32)
            s_weighted += heavy.to(tl.float32)
            most = tl.maximum(most, tl.where(valid, ratio, 0.0))
        from_all = (tl.sum(s_shared, 0) / length).to(tl.float32)
        if SUM:
            sums = lane(tl.zeros([16], tl.float64), 0, tl.sum(s_loss, 0))
            sums = lane(sums, 1, tl.sum(s_low, 0).to(tl.float64))
            sums = lane(sums, 2, tl.sum(s_high, 0).to(tl.float64))
            sums = lane(sums, 3, tl.sum(s_kl, 0))
            sums = lane(sums, 4, tl.sum(s_ref, 0))
            sums = lane(sums, 5, tl.sum(s_entropy, 0))
            sums = lane(sums, 6, tl.sum(s_ratio, 0))
            sums = lane(sums, 7, tl.max(most, 0).to(tl.float64))
            sums = lane(sums, 8, tl.sum(s_held, 0).to(tl.float64))
            sums = lane(sums, 9, tl.sum(s_weight, 0))
            sums = lane(sums, 10, tl.sum(s_moves, 0).to(tl.float64))
            sums = lane(sums, 11, tl.sum(s_valid, 0).to(tl.float64))
            sums = lane(sums, 12, tl.sum(s_weighted, 0).to(tl.float64))
            tl.store(p_sums + (b.to(tl.int64) * tl.num_programs(0) + part) * 16 + tl.arange(0, 16), sums)
    if SLOPE or ROWS:
        for first in range(start, stop, BLOCK):
            t = first + tl.arange(0, BLOCK)
            inside = t < stop
            valid, logprob, entropy, lse, _, _, _, _, _, own, _, _, _, _ = token_terms(
                p_values, p_table, stride_values, stride_table, base + t, inside, row_log_ratio, eps_low,
                eps_high, delta, beta, KIND, DELTA, SEQUENCE, COUPLED, BETA, KL_RATIO, COUPLED_KL, GIVEN,
            )  # fmt: skip
            share = load_row(p_table, 6, stride_table, base + t, inside)
            g = own * share + from_all * load_row(p_table, 0, stride_table, base + t, inside)
            if SLOPE:
                tl.store(p_slope + base + t, g, mask=inside)
            else:
                h = -entropy_coef * share
                p_terms = tl.where(logprob > NO_PROBABILITY, tl.exp(logprob) * (logprob + entropy), 0.0)
                tl.store(p_lse + base + t, lse, mask=inside)
                tl.store(p_constant + base + t, -g - h * entropy, mask=inside)
                tl.store(p_slope + base + t, h, mask=inside)
                tl.store(p_at_target + base + t, -expm1(logprob) * g - h * p_terms, mask=inside)


@triton.jit(do_not_specialize=["count"])
def sums_kernel(p_sums, p_loss, p_metrics, count, HAS_ENTROPY: tl.constexpr):
    """loss () and metrics (10,) from the ``count`` sums of all programs, added in their order."""
    i = tl.arange(0, 16)
    total = tl.zeros([16], tl.float64)
    for k in range(count):
        sums = tl.load(p_sums + k * 16 + i)
        total = tl.where(i == 7, tl.maximum(total, sums), total + sums)
    valid = tl.maximum(tl.sum(tl.where(i == 11, total, 0.0), 0), 1.0)
    weighted = tl.maximum(tl.sum(tl.where(i == 12, total, 0.0), 0), 1.0)
    by = tl.where((i == 7) | (i == 10), 1.0, tl.where(i == 8, weighted, valid))
    metric = (total / by).to(tl.float32)
    if not HAS_ENTROPY:
        metric = tl.where(i == 5, float("nan"), metric)
    tl.store(p_metrics + i - 1, metric, mask=(i >= 1) & (i <= 10))
    loss = tl.sum(tl.where(i == 0, total, 0.0), 0)
    tl.store(p_loss, loss.to(tl.float32))


@triton.jit(do_not_specialize=["T", "v", "blocks"])
def scale_kernel(p_values, p_factor, stride_b, stride_t, T, v, blocks, BLOCK: tl.constexpr):
    """values (B, T, v) *= factor (), any strides with a unit last one. One program per row and block of columns."""
    factor = tl.load(p_factor)
    if factor == 1.0:
        return
    p_values += row_offset(tl.program_id(0) // blocks, T, stride_b, stride_t)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(p_values + column, mask=column < v, other=0.0).to(tl.float32)
    tl.store(p_values + column, (values * factor).to(p_values.dtype.element_ty), mask=column < v)
