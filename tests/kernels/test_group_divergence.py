"""group_divergence and group_divergence_from_logits against their definition in fp64, and what must always hold."""

import math
from typing import Any

import pytest
import torch
from backends import served
from torch import Tensor

from appo_kernels import group_divergence, group_divergence_from_logits, token_logprobs
from appo_kernels.ops.group_divergence import op, reference, streaming
from appo_kernels.testing import assert_as_good_as, max_error, peak_extra_bytes

INF = float("inf")
SERVED = served(op.OP, needs_grad=False)


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that the shapes below take several of them, and several chunks of slots, and leave remainders."""
    monkeypatch.setattr(streaming, "LEAST_COLUMNS", 40)
    monkeypatch.setattr(streaming, "CPU_SLOT_TILE_BYTES", 1)
    monkeypatch.setattr(streaming, "CPU_CHUNK_BYTES", 4 * 40 * 4 * 5)


def hidden_and_weight(
    G: int, N: int, D: int, V: int, dtype: torch.dtype, device: str = "cpu", spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (G, N, D) whose responses differ by ``spread``, weight (V, D), bias (V,)."""
    generator = torch.Generator().manual_seed(G * N + D + V)
    shared = torch.randn(1, N, D, generator=generator)
    hidden = shared + spread * torch.randn(G, N, D, generator=generator)
    weight = 2 * torch.randn(V, D, generator=generator) / D**0.5
    bias = torch.randn(V, generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def random_slots(K: int, G: int, J: int, N: int, missing: float = 0.25) -> Tensor:
    """(K, G, J): ascending positions, the last ones of some responses missing; slots with no and with one member."""
    generator = torch.Generator().manual_seed(K + G + J + N)
    slots = torch.stack([torch.randperm(N, generator=generator)[:J].sort().values for _ in range(K * G)]).view(K, G, J)
    count = torch.randint(int(J * (1 - 2 * missing)), J + 1, (K, G, 1), generator=generator)
    slots[torch.arange(J).expand_as(slots) >= count] = -1
    slots[0, :, -1] = -1
    slots[-1, 1:, -1] = -1
    return slots


def scaled_lse(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """(G, N) in fp64."""
    logits = hidden.double() @ weight.double().t()
    logits = logits if bias is None else logits + bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return torch.logsumexp(logits / temperature, dim=-1)


# A pair; the usual 8; an odd group with more slots than one chunk; vocabularies of less than a tile, with a remainder
# of one, and of no multiple of anything.
@pytest.mark.parametrize("shape", [(2, 5, 8, 37, 1, 3), (8, 9, 32, 121, 3, 6), (5, 23, 24, 1009, 2, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature, softcap, with_bias", [(1.0, None, False), (0.7, None, True), (1.3, 2.5, True)])
@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("backend, device", SERVED)
def test_matches_the_definition(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    with_bias: bool,
    kind: str,
    backend: str,
    device: str,
) -> None:
    G, N, D, V, K, J = shape
    hidden, weight, bias = hidden_and_weight(G, N, D, V, dtype, device)
    slots = random_slots(K, G, J, N).to(device)
    given = bias if with_bias else None
    lse = scaled_lse(hidden, weight, given, temperature, softcap)
    lse_given = lse if dtype == torch.float64 else lse.float()
    settings: dict[str, Any] = {"kind": kind, "temperature": temperature, "softcap": softcap}

    wide_bias = None if given is None else given.double()
    exact = reference.group_divergence(hidden.double(), weight.double(), lse, slots, bias=wide_bias, **settings)
    plain = reference.group_divergence(hidden, weight, lse_given, slots, bias=given, **settings)
    ours = group_divergence(hidden, weight, lse_given, slots, bias=given, **settings, backend=backend)
    assert ours.dtype == lse_given.dtype and ours.shape == (K, J) and not ours.requires_grad
    assert_as_good_as(ours, exact, plain)

    logits = (hidden.double() @ weight.double().t() + (0.0 if wide_bias is None else wide_bias)).to(dtype)
    if softcap is None:
        del settings["softcap"]
        rounded = torch.logsumexp(logits.double() / temperature, dim=-1)
        rounded_lse = rounded.to(lse_given.dtype)
        exact = reference.group_divergence_from_logits(logits.double(), rounded, slots, **settings)
        plain = reference.group_divergence_from_logits(logits, rounded_lse, slots, **settings)
        assert_as_good_as(
            group_divergence_from_logits(logits, rounded_lse, slots, **settings, backend=backend), exact, plain
        )


# Both kinds: their terms are written separately.
@pytest.mark.parametrize("kind", op.KINDS)
def test_equals_from_logits_on_the_same_inputs(kind: str) -> None:
    hidden, weight, _ = hidden_and_weight(8, 20, 16, 611, torch.float32)
    slots = random_slots(3, 8, 11, 20)
    lse = token_logprobs(hidden.flatten(0, 1), weight, torch.zeros(160, dtype=torch.int64), temperature=0.8).lse.view(
        8, 20
    )
    fused = group_divergence(hidden, weight, lse, slots, kind=kind, temperature=0.8)
    held = group_divergence_from_logits(hidden @ weight.t(), lse, slots, kind=kind, temperature=0.8)
    torch.testing.assert_close(fused, held, rtol=2e-6, atol=1e-6)


# Spreads at which differences of sums would be rounding alone, and exact agreement, which must give 0.
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 0.0])
@pytest.mark.parametrize("kind", op.KINDS)
def test_members_that_nearly_agree(spread: float, kind: str) -> None:
    """The divergence of near-identical rows is made of differences that bf16 tiles or summed entropies would lose."""
    hidden, weight, _ = hidden_and_weight(8, 6, 32, 2003, torch.float32, spread=spread)
    slots = torch.arange(6).expand(1, 8, 6)
    lse = scaled_lse(hidden, weight, None, 1.0, None)
    exact = reference.group_divergence(hidden.double(), weight.double(), lse, slots, kind=kind)
    plain = reference.group_divergence(hidden, weight, lse.float(), slots, kind=kind)
    got = group_divergence(hidden, weight, lse.float(), slots, kind=kind)
    assert max_error(got, exact) <= 2 * max_error(plain, exact) + 1e-9


def test_bounds_of_kl() -> None:
    """Distributions without a word in common reach log G; equal ones give 0; one member, or none, gives exactly 0."""
    logits = torch.full((4, 3, 404), -40.0)
    for i in range(4):
        logits[i, 0, i * 101 : (i + 1) * 101] = 0.0
    logits[:, 1:] = torch.randn(2, 404, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([[0, 1, 2, -1]] * 4)[None].clone()
    slots[0, 1:, 2] = -1
    lse = torch.logsumexp(logits, dim=-1)
    got = group_divergence_from_logits(logits, lse, slots)[0]
    torch.testing.assert_close(got[0], torch.tensor(math.log(4)), rtol=1e-6, atol=0.0)
    assert 0.0 <= got[1] < 1e-7
    assert got[2] == 0.0 and got[3] == 0.0


def test_missing_members_of_kl_are_left_out() -> None:
    hidden, weight, _ = hidden_and_weight(5, 7, 8, 203, torch.float32)
    slots = torch.tensor([2, -1, 4, -1, 0]).view(1, 5, 1)
    lse = scaled_lse(hidden, weight, None, 1.0, None).float()
    there = [0, 2, 4]
    expected = group_divergence(hidden[there], weight, lse[there], slots[:, there])
    torch.testing.assert_close(group_divergence(hidden, weight, lse, slots), expected, rtol=1e-6, atol=1e-7)


def test_missing_members_of_k3_are_uniform() -> None:
    logits = torch.randn(3, 2, 130, generator=torch.Generator().manual_seed(0))
    logits[1, 1] = 0.0
    lse = torch.logsumexp(logits, dim=-1)
    with_uniform = group_divergence_from_logits(logits, lse, torch.tensor([0, 1, 0]).view(1, 3, 1), kind="k3")
    missing = group_divergence_from_logits(logits, lse, torch.tensor([0, -1, 0]).view(1, 3, 1), kind="k3")
    torch.testing.assert_close(missing, with_uniform, rtol=1e-6, atol=0.0)
    nobody = torch.full((1, 3, 2), -1)
    assert group_divergence_from_logits(logits, lse, nobody, kind="k3").tolist() == [[0.0, 0.0]]


# Both kinds treat a probability of 0 differently; fp64 too, where exp reaches further down.
@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_words_that_cannot_be_said(kind: str, dtype: torch.dtype) -> None:
    """-inf for all rows takes a word out; for some, it adds nothing to kl, and the clamp decides k3."""
    logits = torch.randn(3, 4, 210, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[..., 60:140] = -INF
    slots = torch.arange(4).expand(1, 3, 4)
    kept = logits[..., torch.cat([torch.arange(60), torch.arange(140, 210)])]
    got = group_divergence_from_logits(logits, torch.logsumexp(logits, -1), slots, kind=kind)
    torch.testing.assert_close(
        got, group_divergence_from_logits(kept, torch.logsumexp(kept, -1), slots, kind=kind), rtol=2e-6, atol=1e-7
    )

    logits[1, :, 7] = -INF
    lse = torch.logsumexp(logits, -1)
    got = group_divergence_from_logits(logits, lse, slots, kind=kind)
    exact = reference.group_divergence_from_logits(logits.double(), lse.double(), slots, kind=kind)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-7)
    if kind == "k3":  # one row that cannot (d = 11) and two that can (d = -11)
        word = (math.expm1(11) - 11 + 2 * (math.expm1(-11) + 11)) / 3
        assert abs(float(got.mean()) - word) < 0.02 * word


# Both kinds: their terms are written separately.
@pytest.mark.parametrize("kind", op.KINDS)
def test_other_rows_do_not_matter(kind: str) -> None:
    """Rows that no slot names may hold anything, with any lse; other slots change nothing."""
    hidden, weight, _ = hidden_and_weight(4, 12, 16, 403, torch.float32)
    slots = random_slots(3, 4, 5, 12)
    lse = scaled_lse(hidden, weight, None, 1.0, None).float()
    together = group_divergence(hidden, weight, lse, slots, kind=kind)
    used = torch.zeros(4, 12, dtype=torch.bool)
    for i in range(4):
        used[i, slots[1, i][slots[1, i] >= 0]] = True
    hidden, lse = hidden.masked_fill(~used[..., None], float("nan")), lse.masked_fill(~used, float("nan"))
    alone = group_divergence(hidden, weight, lse, slots[1:2], kind=kind)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-6, atol=1e-6)


# Both kinds: their terms are written separately.
@pytest.mark.parametrize("kind", op.KINDS)
def test_same_bits_whatever_the_strides_and_the_run(kind: str) -> None:
    hidden, weight, bias = hidden_and_weight(4, 12, 16, 403, torch.float32)
    slots = random_slots(3, 4, 5, 12)
    lse = scaled_lse(hidden, weight, bias, 1.0, None).float()
    first = group_divergence(hidden, weight, lse, slots, bias=bias, kind=kind)
    assert torch.equal(group_divergence(hidden, weight, lse, slots, bias=bias, kind=kind), first)
    strided = torch.stack([hidden, hidden], dim=2)[:, :, 1]
    lse = lse.t().contiguous().t()
    slots = slots.int().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(group_divergence(strided, weight, lse, slots, bias=bias, kind=kind), first)


def test_buffers_need_no_initial_values() -> None:
    hidden, weight, bias = hidden_and_weight(4, 12, 16, 403, torch.bfloat16)
    lse = scaled_lse(hidden, weight, bias, 1.0, None).float()
    for kind in op.KINDS:
        for slots in (random_slots(3, 4, 5, 12), torch.full((3, 4, 5), -1)):
            result = torch.full((3, 5), float("nan"))
            op.forward_op(hidden, weight, lse, slots, kind, bias, 1.0, None, result, "torch")
            assert result.isfinite().all()


# Both kinds: their terms are written separately.
@pytest.mark.parametrize("kind", op.KINDS)
def test_no_target_frames(kind: str) -> None:
    hidden, weight, _ = hidden_and_weight(4, 3, 8, 37, torch.float32)
    assert group_divergence(
        hidden, weight, torch.zeros(4, 3), torch.empty(0, 4, 6, dtype=torch.int64), kind=kind
    ).shape == (0, 6)
    assert group_divergence(
        hidden, weight, torch.zeros(4, 3), torch.empty(2, 4, 0, dtype=torch.int64), kind=kind
    ).shape == (2, 0)


def test_result_carries_no_gradient() -> None:
    hidden, weight, _ = hidden_and_weight(4, 12, 16, 203, torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.t()
    lse = torch.logsumexp(logits, -1)
    slots = random_slots(2, 4, 5, 12)
    assert not group_divergence(hidden, weight, lse, slots).requires_grad
    assert not group_divergence_from_logits(logits, lse, slots).requires_grad


# Every row selected; D small, since it is not part of what is kept. At the full vocabulary a (G, N, V) tensor in fp32
# would take 1.9 GB and the copies of one frame's members 234 MB; the limit there is 128 MiB.
@pytest.mark.parametrize("kind", op.KINDS)
@pytest.mark.parametrize(
    "V, dtype",
    [
        (20_021, torch.float32),
        pytest.param(152_064, torch.float32, marks=pytest.mark.slow),
        pytest.param(152_064, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_memory_with_every_row_selected(
    V: int, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    G, N, D, K = 8, 384, 8, 8
    hidden, weight, _ = hidden_and_weight(G, N, D, V, dtype)
    slots = torch.arange(N).view(K, 1, N // K).expand(K, G, N // K)
    lse = torch.full((G, N), math.log(V))
    assert peak_extra_bytes(lambda: group_divergence(hidden, weight, lse, slots, kind=kind)) < 64 << 20


# Both kinds: the schema has the kind as text.
@pytest.mark.parametrize("kind", op.KINDS)
def test_opcheck(kind: str) -> None:
    hidden, weight, bias = hidden_and_weight(4, 12, 16, 203, torch.float32)
    slots = random_slots(2, 4, 5, 12)
    lse = scaled_lse(hidden, weight, bias, 0.7, 3.0).float()
    torch.library.opcheck(op.forward_op, (hidden, weight, lse, slots, kind, bias, 0.7, 3.0, torch.empty(2, 5), "torch"))
    logits = hidden @ weight.t()
    lse = torch.logsumexp(logits / 0.7, -1)
    torch.library.opcheck(op.from_logits_op, (logits, lse, slots, kind, 0.7, torch.empty(2, 5), "torch"))


def test_compiles_without_graph_breaks() -> None:
    hidden, weight, _ = hidden_and_weight(4, 12, 16, 203, torch.float32)
    slots = random_slots(2, 4, 5, 12)

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = 2 * hidden @ weight.t()
        lse = torch.logsumexp(logits, -1)
        fused = group_divergence(2 * hidden, weight, lse, slots)
        return fused, group_divergence_from_logits(logits, lse, slots, kind="k3")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(hidden, weight), both(hidden, weight), strict=True):
        assert torch.equal(got, expected)
