"""linear_weighted_surrogate: its definition, the plain surrogate it equals, what it skips, its memory, its errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from surrogate_cases import SERVED, cast, from_hidden, poisoned, to
from torch import Tensor

from appo_kernels import linear_weighted_surrogate, logits_weighted_surrogate, weighted_surrogate
from appo_kernels.ops.weighted_surrogate import autograd, reference
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as, peak_extra_bytes
from appo_kernels.vocabulary import output_head, torch_rows

LEARNED = ("hidden", "weight", "bias")
# Token and sequence ratios, with and without everything that changes the gradient of a logit.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "entropy": {"entropy_coef": 0.1, "temperature": 1.3},
    "softcap": {"softcap": 3.0, "temperature": 0.7, "entropy_coef": 0.1},
    "kl, delta, num_items": {"beta": 0.1, "delta": 1.5, "num_items": 40},
    "sequence": {"level": "sequence", "aggregation": "grpo"},
    "sequence, everything": {"level": "sequence", "softcap": 3.0, "entropy_coef": 0.1, "beta": 0.1, "temperature": 0.7},
}


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 tokens (of up to 36), blocks of 2 rows, and slices of 16 of the vocabulary's 37 in half precision."""
    monkeypatch.setattr(output_head, "CPU_HEAD_TILE_BYTES", 5 * 37 * 4)
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 2 * 37 * 4)
    monkeypatch.setattr(output_head, "WEIGHT_TILE_BYTES", 16 * 16 * 4)


def run(
    case: dict[str, Any], function: Callable[..., Any] = linear_weighted_surrogate, **options: Any
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """loss, metrics, gradients of hidden, weight and bias"""
    loss, metrics = function(**case, **options)
    return loss, metrics, list(torch.autograd.grad(loss, [case[name] for name in LEARNED]))


class Products:
    """Rows of tokens that went through each kind of matrix product, as (m, k) of the left operand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
        self.forward = self.grad_hidden = self.grad_weight = 0
        product, add_product_ = output_head.product, output_head.add_product_

        def count(a: Tensor, b: Tensor) -> None:
            if b.shape[1] == vocabulary:
                self.forward += a.shape[0]
            elif a.shape[1] == vocabulary:
                self.grad_hidden += a.shape[0]
            else:
                self.grad_weight += a.shape[1]

        monkeypatch.setattr(output_head, "product", lambda a, b, out: (count(a, b), product(a, b, out))[1])
        monkeypatch.setattr(output_head, "add_product_", lambda t, a, b: (count(a, b), add_product_(t, a, b))[1])


# Every dtype that is taken: fp64 checks the formula, the others the rounding.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_its_definition(options: dict[str, Any], dtype: torch.dtype, backend: str, device: str) -> None:
    case = to(from_hidden(dtype=dtype), device)
    loss, metrics, gradients = run(case, backend=backend, **options)
    exact, exact_metrics, exact_gradients = run(
        cast(case, torch.float64), reference.linear_weighted_surrogate, **options
    )
    plain, plain_metrics, plain_gradients = run(case, reference.linear_weighted_surrogate, **options)
    # The loss is a sum of terms of either sign: rounding is relative to them, not to what is left of them.
    assert_as_good_as(loss + 1, exact + 1, plain + 1, name="loss")
    for name, got, expected, other in zip(LEARNED, gradients, exact_gradients, plain_gradients, strict=True):
        assert got.dtype == dtype
        assert_as_good_as(got, expected, other, factor=GRADIENT_FACTOR, name=f"gradient of {name}")
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.shape == ()
        assert_as_good_as(value, exact_metrics[name], plain_metrics[name], name=name)


# Every way to average: the three forms divide in different places.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_linear_logits_and_plain_are_one_loss(aggregation: str, level: str, backend: str, device: str) -> None:
    options = {"aggregation": aggregation, "level": level, "max_length": 12, "beta": 0.1, "delta": 1.5}
    case = to(from_hidden(), device)
    linear = run(case, backend=backend, **options)
    rest = {name: x for name, x in case.items() if name not in (*LEARNED, "targets")}

    def from_logits(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, **_: Any) -> Any:
        return logits_weighted_surrogate(hidden @ weight.t() + bias, targets, **rest, **options, backend=backend)

    def from_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, **_: Any) -> Any:
        logp = (hidden @ weight.t() + bias).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return weighted_surrogate(logp, **rest, **options)

    for loss, metrics, gradients in (run(case, from_logits), run(case, from_logprobs)):
        torch.testing.assert_close(loss, linear[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, linear[2], rtol=1e-10, atol=1e-12)
        for name, value in metrics.items():
            if not (name == "entropy" and value.isnan()):
                torch.testing.assert_close(value, linear[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    case = from_hidden(B=3, T=4, D=2, V=5, seed=1)
    rest = {name: x for name, x in case.items() if name not in LEARNED}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_weighted_surrogate(hidden, weight, bias=bias, **rest, **options).loss

    assert torch.autograd.gradcheck(loss, [case[name] for name in LEARNED])


# fp32 sums in place, bf16 in a buffer that is rounded at the end.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_second_run_and_garbage_at_masked_tokens_change_no_bit(
    options: dict[str, Any], dtype: torch.dtype, backend: str, device: str
) -> None:
    case = from_hidden(dtype=dtype)
    first, second, dirty = (run(to(c, device), backend=backend, **options) for c in (case, case, poisoned(case)))
    for other in (second, dirty):
        assert torch.equal(first[0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(first[2], other[2], strict=True))
    assert not first[2][0][~to(case, device)["mask"]].any()


def test_half_batches_with_the_global_count_give_the_gradient_of_the_whole() -> None:
    case = from_hidden(B=6, dtype=torch.float32)
    options = {"entropy_coef": 0.1, "beta": 0.1}
    whole = run(case, **options)
    count = case["mask"].sum()
    loss = torch.zeros(())
    for part in (slice(2), slice(2, 6)):
        half = {name: x[part] if name not in ("weight", "bias") else x for name, x in case.items()}
        loss = loss + linear_weighted_surrogate(**half, **options, num_items=count).loss
    torch.testing.assert_close(loss, whole[0], rtol=1e-6, atol=1e-7)
    gradients = torch.autograd.grad(loss, [case[name] for name in LEARNED])
    torch.testing.assert_close(list(gradients), whole[2], rtol=1e-5, atol=1e-7)


def test_a_response_alone_equals_itself_in_a_padded_batch() -> None:
    case = from_hidden(dtype=torch.float32)
    whole = run(case, num_items=30, entropy_coef=0.1)[2][0]
    for b in range(3):
        length = int(case["mask"][b].nonzero().max()) + 1
        part = (slice(b, b + 1), slice(length))
        alone = {n: x if n in ("weight", "bias") else x[part[: x.dim()]] for n, x in case.items()}
        loss = linear_weighted_surrogate(**alone, num_items=30, entropy_coef=0.1).loss
        torch.testing.assert_close(
            torch.autograd.grad(loss, case["hidden"])[0][part], whole[part], rtol=1e-6, atol=1e-6
        )


def test_rows_without_gradient_enter_no_product_they_do_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    case = from_hidden(dtype=torch.float32)
    case["advantages"][0] = 0.0
    valid = int(case["mask"].sum())
    products = Products(monkeypatch, 37)
    moved = int(run(case)[1]["effective_tokens"])
    assert 0 < moved < valid - int(case["mask"][0].sum()), "the case should have clipped tokens as well"
    assert (products.forward, products.grad_hidden, products.grad_weight) == (valid, moved, moved)

    products = Products(monkeypatch, 37)
    run(case, level="sequence", entropy_coef=0.1)  # two forward products, and every valid token has a gradient
    assert (products.forward, products.grad_hidden, products.grad_weight) == (2 * valid, valid, valid)


def test_what_is_frozen_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = from_hidden(dtype=torch.float32)
    expected = run(case)[2][0]
    case["weight"], case["bias"] = case["weight"].detach(), case["bias"].detach()
    products = Products(monkeypatch, 37)
    loss = linear_weighted_surrogate(**case).loss
    torch.testing.assert_close(torch.autograd.grad(loss, case["hidden"])[0], expected)
    assert products.grad_weight == 0 and products.grad_hidden > 0

    products = Products(monkeypatch, 37)
    with torch.no_grad():
        quiet = linear_weighted_surrogate(**case).loss
    assert torch.equal(quiet, loss) and not quiet.requires_grad
    assert products.grad_hidden == 0 and products.forward > 0
    # Without gradients no second pass is needed at level "sequence" either.
    products = Products(monkeypatch, 37)
    with torch.no_grad():
        linear_weighted_surrogate(**case, level="sequence")
    assert products.forward == int(case["mask"].sum())


def test_forbidden_tokens_have_no_gradient_and_no_entropy() -> None:
    case = from_hidden(dtype=torch.float32)
    forbidden = torch.zeros(37, dtype=torch.bool)
    forbidden[3::5] = True
    case["targets"] = case["targets"].masked_fill(forbidden[case["targets"]], 0)
    case["bias"] = case["bias"].detach().masked_fill(forbidden, -torch.inf).requires_grad_()
    loss, metrics, gradients = run(case, entropy_coef=0.1)
    exact, exact_metrics, _ = run(cast(case, torch.float64), reference.linear_weighted_surrogate, entropy_coef=0.1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["entropy"], exact_metrics["entropy"])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][forbidden].any() and gradients[1][~forbidden].any()


def test_nothing_valid_gives_zero_gradients() -> None:
    case = from_hidden(dtype=torch.bfloat16)
    case["mask"] = torch.zeros_like(case["mask"])
    loss, _, gradients = run(case, entropy_coef=0.1)
    assert float(loss.detach()) == 0 and not any(gradient.any() for gradient in gradients)


def test_slices_of_longer_sequences_need_no_copy() -> None:
    case = from_hidden(dtype=torch.float32)
    expected = run(case)
    longer = torch.randn(4, 15, 16)
    longer[:, 3:12] = case["hidden"].detach()
    case["hidden"] = longer[:, 3:12].requires_grad_()
    case["weight"] = case["weight"].detach().t().contiguous().t().requires_grad_()
    got = run(case)
    assert not case["hidden"].is_contiguous() and not case["weight"].is_contiguous()
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[2], expected[2])


def test_backward_scales_and_says_when_it_cannot_be_repeated() -> None:
    case = from_hidden(dtype=torch.float32)
    once = run(case)[2]
    loss = linear_weighted_surrogate(**case).loss
    learned = [case[name] for name in LEARNED]
    for _ in range(2):
        torch.testing.assert_close(list(torch.autograd.grad(loss, learned, retain_graph=True)), once)
    thrice = torch.autograd.grad(3 * loss, learned, retain_graph=True)
    torch.testing.assert_close(list(thrice), [3 * gradient for gradient in once])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, learned)


# Level "sequence" forms the logits twice: another graph.
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiles_whole(level: str) -> None:
    case = from_hidden(dtype=torch.float32)

    def step(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
        loss, metrics = linear_weighted_surrogate(**case, level=level, entropy_coef=0.1)
        return loss * 2, metrics["entropy"]

    eager, compiled = step(case), torch.compile(step, fullgraph=True, backend="aot_eager")(case)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    learned = [case[name] for name in LEARNED]
    torch.testing.assert_close(torch.autograd.grad(eager[0], learned), torch.autograd.grad(compiled[0], learned))


# With gradients, and without, where their buffers are None.
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(wanted: bool) -> None:
    hidden, weight, bias, table = torch.randn(2, 3, 4), torch.randn(6, 4), torch.randn(6), torch.rand(7, 2, 3)
    table[0] = 1
    gradients = [torch.empty_like(x) if wanted else None for x in (hidden, weight, bias)]
    results = torch.empty(()), torch.empty(10), *gradients
    numbers = 0.2, 0.28, None, 0.0, "token", 0.7, 5.0, 0.1, "torch"
    targets = torch.randint(6, (2, 3))
    torch.library.opcheck(
        autograd.linear_weighted_surrogate_forward, (hidden, weight, bias, targets, table, *results, *numbers)
    )


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles of 512 rows; 4,096 tokens at once would take 512 MiB. Above 32 MiB the allocator returns what it frees.
    V, D = 32_768, 16
    monkeypatch.setattr(output_head, "CPU_HEAD_TILE_BYTES", 512 * V * 4)
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 4 << 20)

    def extra(tokens: int) -> int:
        case = from_hidden(B=1, T=8, D=D, V=V, dtype=torch.float32)
        case["mask"][:] = True
        case = {
            n: x if n in ("weight", "bias", "advantages") else x.detach().repeat(1, tokens // 8, *[1] * (x.dim() - 2))
            for n, x in case.items()
        }
        case["hidden"].requires_grad_()
        peak = peak_extra_bytes(lambda: linear_weighted_surrogate(**case).loss.backward())
        return peak - sum(case[name].grad.nbytes for name in LEARNED)

    extra(4096)  # what the process keeps from its first call is not counted
    few, many = extra(512), extra(4096)
    assert 48 << 20 < few < 96 << 20, f"{few / 2**20:.1f} MiB: a tile of 64 MiB and little else"
    assert many == pytest.approx(few, rel=0.1), f"{few / 2**20:.1f} MiB at 512 tokens, {many / 2**20:.1f} at 4,096"


# Argument, what is wrong with it, and a word of the message beside the argument's name.
WRONG: list[tuple[str, Any, str]] = [
    ("hidden", torch.zeros(4, 9), "dimensions"),
    ("hidden", torch.zeros(4, 9, 16, dtype=torch.long), "dtype"),
    ("weight", torch.zeros(37), "dimensions"),
    ("weight", torch.zeros(37, 15), "(V, D)"),
    ("weight", torch.zeros(37, 16, dtype=torch.bfloat16), "dtype"),
    ("weight", torch.zeros(37, 16, device="meta"), "device"),
    ("bias", torch.zeros(36), "(V,)"),
    ("bias", torch.zeros(37, dtype=torch.float64), "dtype"),
    ("targets", torch.zeros(4, 8, dtype=torch.long), "(B, T)"),
    ("targets", torch.zeros(4, 9), "dtype"),
    ("targets", torch.full((4, 9), 37), "37 at [0, 0]"),
    ("targets", torch.full((4, 9), -1), "[0, 37)"),
    ("old_logprobs", torch.zeros(4, 8), "(B, T)"),
    ("advantages", torch.full((4,), torch.nan), "finite"),
    ("token_weights", torch.full((4, 9), -1.0), ">= 0"),
    ("temperature", 0.0, "> 0"),
    ("softcap", -1.0, "> 0"),
    ("entropy_coef", torch.inf, "finite"),
]


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize("argument,value,word", WRONG, ids=[f"{a}-{i}" for i, (a, _, _) in enumerate(WRONG)])
def test_errors_name_the_argument(argument: str, value: Any, word: str) -> None:
    case = from_hidden(dtype=torch.float32)
    case[argument] = value
    with pytest.raises(ValueError, match=r"linear_weighted_surrogate: `.*`: expected .*, got .*") as error:
        linear_weighted_surrogate(**case)
    assert argument in str(error.value) and word in str(error.value)
