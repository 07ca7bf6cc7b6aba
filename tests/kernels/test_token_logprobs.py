"""token_logprobs against its definition in fp64, its gradients, and what must hold whatever the numbers."""

from typing import Any

import pytest
import torch
from backends import served
from torch import Tensor

from appo_kernels import token_logprobs
from appo_kernels.ops.token_logprobs import op, reference
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as, peak_extra_bytes
from appo_kernels.vocabulary import torch_tiles as tiling

INF = float("inf")
SERVED = served(op.OP)


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that the shapes below take several of them in both directions and leave a remainder."""
    monkeypatch.setattr(tiling, "CPU_TILE_ROWS", 16)
    monkeypatch.setattr(tiling, "CPU_LOGITS_TILE_BYTES", 16 * 96 * 4)


def problem(M: int, D: int, V: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """hidden (M, D), weight (V, D), bias (V,) with gradients wanted, targets (M,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=generator).to(device, dtype).requires_grad_()
    weight = (2 * torch.randn(V, D, generator=generator) / D**0.5).to(device, dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(device, dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(V, (M,), generator=generator).to(device)


# 1 row, a full tile, one more than a tile; vocabularies of one tile, with a remainder of one, no multiple of anything.
@pytest.mark.parametrize("shape", [(1, 8, 5), (16, 32, 97), (17, 24, 203), (63, 111, 1009)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature, softcap, with_bias", [(1.0, None, False), (0.7, None, True), (1.3, 2.5, True)])
@pytest.mark.parametrize("backend, device", SERVED)
def test_matches_the_definition(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    with_bias: bool,
    backend: str,
    device: str,
) -> None:
    hidden, weight, bias, targets = problem(*shape, dtype, device)
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    settings: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    upstream = torch.randn(3, shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)

    def run(function: Any, to: torch.dtype, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.detach().to(to).requires_grad_() for t in inputs]
        extra = {"bias": leaves[2]} if with_bias else {}
        results = function(leaves[0], leaves[1], targets, **extra, **settings, **more)
        gradients = torch.autograd.grad(
            list(results), leaves, [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]
        )
        return list(results), list(gradients)

    exact, exact_gradients = run(reference.token_logprobs, torch.float64)
    plain, plain_gradients = run(reference.token_logprobs, dtype)
    ours, our_gradients = run(token_logprobs, dtype, backend=backend)
    for name, got, expected, torchs in zip(op.TokenLogprobs._fields, ours, exact, plain, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_as_good_as(got, expected, torchs, name=name)
    for name, got, expected, torchs in zip(
        ["hidden", "weight", "bias"], our_gradients, exact_gradients, plain_gradients, strict=False
    ):
        assert got.dtype == dtype
        assert_as_good_as(got, expected, torchs, factor=GRADIENT_FACTOR, name=f"gradient of {name}")


# Each result alone; a temperature and a soft cap change the slope between logit and raw logit.
@pytest.mark.parametrize("result", op.TokenLogprobs._fields)
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.6, 1.5)])
def test_gradcheck(result: str, temperature: float, softcap: float | None) -> None:
    hidden, weight, bias, targets = problem(19, 3, 131, torch.float64)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return getattr(
            token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap), result
        )

    assert torch.autograd.gradcheck(function, (hidden, weight, bias), fast_mode=True)


def test_words_that_cannot_be_said() -> None:
    """A bias of -inf over whole tiles, the first among them, takes those words out and leaves every gradient finite."""
    hidden, weight, bias, _ = problem(21, 8, 403, torch.float64)
    kept = torch.cat([torch.arange(200, 260), torch.arange(391, 403)])
    masked = torch.full_like(bias, -INF)
    masked[kept] = bias.detach()[kept]
    masked.requires_grad_()
    targets = kept[torch.arange(21) * 3]
    got = token_logprobs(hidden, weight, targets, bias=masked, temperature=0.8)
    few = reference.token_logprobs(hidden, weight[kept], torch.arange(21) * 3, bias=masked[kept], temperature=0.8)
    for ours, expected in zip(got, few, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(sum(r.sum() for r in got), (hidden, weight, masked))
    expected = torch.autograd.grad(sum(r.sum() for r in few), (hidden, weight, masked))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_target_that_cannot_be_said() -> None:
    hidden, weight, bias, targets = problem(3, 4, 120, torch.float32)
    bias = bias.detach().clone()
    bias[targets[1]] = -INF
    result = token_logprobs(hidden, weight, targets, bias=bias)
    assert result.logprobs[1] == -INF and result.entropy.isfinite().all() and result.lse.isfinite().all()
    assert torch.autograd.grad(result.logprobs.sum(), hidden)[0].isfinite().all()


def test_a_large_lse_costs_no_digits() -> None:
    """log p and the gradient of a likely target beside logits of 1,000, where an fp32 number has steps of 6e-5."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[1000.0], [993.0]])
    bias = torch.zeros(2, requires_grad=True)
    result = token_logprobs(hidden, weight, torch.tensor([0]), bias=bias)
    result.logprobs.sum().backward()
    exact = torch.nn.functional.softplus(torch.tensor([-7.0], dtype=torch.float64))
    torch.testing.assert_close(-result.logprobs.detach().double(), exact, rtol=0.0, atol=1e-7)
    torch.testing.assert_close(bias.grad[:1].double(), -torch.expm1(-exact), rtol=0.0, atol=1e-7)


def test_buffers_need_no_initial_values() -> None:
    hidden, weight, bias, targets = (t.detach() for t in problem(35, 12, 211, torch.bfloat16))
    results = torch.full((3, 35), float("nan")).unbind()
    op.forward_op(hidden, weight, targets, bias, 0.9, None, *results, "torch")
    assert all(r.isfinite().all() for r in results)
    gradients = [torch.full_like(t, float("nan")) for t in (hidden, weight, bias)]
    op.backward_op(hidden, weight, targets, bias, 0.9, None, *results, *torch.ones(3, 35).unbind(), *gradients, "torch")
    assert all(g.isfinite().all() for g in gradients)


# fp32 tiles are written in place, bf16 ones converted.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_integer_types_do_not_matter(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = (t.detach() for t in problem(33, 10, 203, dtype))
    strided_weight = weight.t().contiguous().t().requires_grad_()
    strided_hidden = torch.stack([hidden, hidden], dim=1)[:, 1].requires_grad_()
    plain_hidden, plain_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    got = token_logprobs(strided_hidden, strided_weight, targets.int().repeat_interleave(2)[::2], bias=bias)
    expected = token_logprobs(plain_hidden, plain_weight, targets, bias=bias)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    (got.logprobs.sum() - got.entropy.sum()).backward()
    (expected.logprobs.sum() - expected.entropy.sum()).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(strided_hidden.grad, plain_hidden.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(strided_weight.grad, plain_weight.grad, rtol=tolerance, atol=tolerance)


def test_same_bits_on_a_second_run() -> None:
    hidden, weight, bias, targets = problem(37, 16, 307, torch.float32)

    def run() -> list[Tensor]:
        results = token_logprobs(hidden, weight, targets, bias=bias)
        return [*results, *torch.autograd.grad(sum(r.sum() for r in results), (hidden, weight, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_row_alone_equals_itself_among_others() -> None:
    hidden, weight, _, targets = problem(40, 32, 511, torch.float32)
    among = token_logprobs(hidden, weight, targets)
    alone = token_logprobs(hidden[19:20], weight, targets[19:20])
    for a, b in zip(alone, among, strict=True):
        torch.testing.assert_close(a, b[19:20], rtol=1e-6, atol=1e-6)


def test_no_rows() -> None:
    hidden, weight, bias, targets = problem(0, 4, 11, torch.float32)
    results = token_logprobs(hidden, weight, targets, bias=bias)
    assert all(r.shape == (0,) for r in results)
    gradients = torch.autograd.grad(sum(r.sum() for r in results), (hidden, weight, bias))
    assert not any(g.any() for g in gradients)


def test_only_wanted_gradients_are_computed() -> None:
    """A frozen weight, as under LoRA: no weight gradient, and hidden's is the same as with one."""
    hidden, weight, _, targets = problem(18, 8, 131, torch.float32)
    wanted, _ = torch.autograd.grad(token_logprobs(hidden, weight, targets).logprobs.sum(), (hidden, weight))
    results = token_logprobs(hidden, weight.detach(), targets)
    assert results.logprobs.grad_fn.next_functions[1][0] is None
    assert torch.equal(torch.autograd.grad(results.logprobs.sum(), hidden)[0], wanted)
    assert not token_logprobs(hidden.detach(), weight.detach(), targets).entropy.requires_grad


def test_autocast_does_not_change_the_dtype_of_the_tiles() -> None:
    hidden, weight, _, targets = problem(18, 64, 131, torch.float32)
    plain = token_logprobs(hidden, weight, targets)
    plain_gradient = torch.autograd.grad(plain.logprobs.sum(), weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = token_logprobs(hidden, weight, targets)
        assert torch.equal(torch.autograd.grad(cast.logprobs.sum(), weight)[0], plain_gradient)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


# (M, V) in fp32 would be 61 and 246 MB.
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory_does_not_grow_with_tokens(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    V, D = 30_011, 32

    def peak(M: int) -> int:
        hidden, weight, _, targets = problem(M, D, V, torch.float32)
        weight = weight.detach() if frozen else weight
        hidden.grad = torch.zeros_like(hidden)
        if not frozen:
            weight.grad = torch.zeros_like(weight)

        def run() -> None:
            results = token_logprobs(hidden, weight, targets)
            (results.logprobs.sum() + results.entropy.sum()).backward()

        run()  # what the allocator and the matrix library keep is not the operator's
        return peak_extra_bytes(run)

    few, many = peak(512), peak(2048)
    assert many - few < 2 << 20 and many < 32 << 20, (few, many)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("hidden", {"hidden": torch.zeros(2, 3, 4)}),
    ("hidden", {"hidden": torch.zeros(6, 4, dtype=torch.int64)}),
    ("weight", {"weight": torch.zeros(11, 5)}),
    ("weight", {"weight": torch.zeros(11, 4, dtype=torch.bfloat16)}),
    ("weight", {"weight": torch.zeros(11, 4, device="meta")}),
    ("targets", {"targets": torch.zeros(5, dtype=torch.int64)}),
    ("targets", {"targets": torch.zeros(6)}),
    ("targets", {"targets": torch.tensor([0, 1, 2, 3, 4, 11])}),
    ("targets", {"targets": torch.tensor([0, -100, 2, 3, 4, 5])}),
    ("bias", {"bias": torch.zeros(4)}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": float("nan")}),
    ("softcap", {"softcap": -1.0}),
    ("backend", {"backend": "numpy"}),
]


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize("argument, change", BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_wrong_arguments_are_named(argument: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(11, 4),
        "targets": torch.zeros(6, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=rf"token_logprobs: `{argument}`: expected .*, got .*\. "):
        token_logprobs(**{**good, **change})


def test_opcheck() -> None:
    hidden, weight, bias, targets = (t.detach() for t in problem(18, 6, 131, torch.float32))
    results = torch.empty(3, 18).unbind()
    arguments = (hidden, weight, targets, bias, 0.7, 3.0)
    torch.library.opcheck(op.forward_op, (*arguments, *results, "torch"))
    op.forward_op(*arguments, *results, "torch")
    upstream = torch.randn(3, 18).unbind()
    gradients = [torch.empty_like(t) for t in (hidden, weight, bias)]
    torch.library.opcheck(op.backward_op, (*arguments, *results, *upstream, *gradients, "torch"))
    torch.library.opcheck(op.backward_op, (*arguments, *results, *upstream, gradients[0], None, None, "torch"))


def test_compiles_without_graph_breaks() -> None:
    hidden, weight, bias, targets = problem(18, 6, 131, torch.float32)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        results = token_logprobs(hidden * 2, weight, targets, bias=bias, temperature=0.7, softcap=3.0)
        return (results.logprobs - 0.1 * results.entropy + 0.01 * results.lse).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(hidden, weight, bias), compiled(hidden, weight, bias)
    assert torch.equal(got, expected)
    ours = torch.autograd.grad(got, (hidden, weight, bias))
    assert all(
        torch.equal(a, b) for a, b in zip(ours, torch.autograd.grad(expected, (hidden, weight, bias)), strict=True)
    )
