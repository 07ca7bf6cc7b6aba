"""weighted_surrogate: its definition, the losses of TRL at W = 1, its properties, its errors."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surrogate_cases import SERVED, cast, per_token, poisoned, to
from torch import Tensor

from appo_kernels import weighted_surrogate
from appo_kernels.ops.weighted_surrogate import autograd, reference
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as

EPS_LOW, EPS_HIGH, MAX_LENGTH = 0.2, 0.28, 11
# Every branch of the loss, each option alone and all of them together; delta below and above the clip range.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "delta": {"delta": 1.5},
    "delta inside the clip range": {"delta": 1.1},
    "kl": {"beta": 0.04},
    "sequence": {"level": "sequence"},
    "everything": {"delta": 2.0, "beta": 0.1, "rollout_cap": 1.3, "num_items": 50},
    "everything, sequence": {"delta": 2.0, "beta": 0.1, "rollout_cap": 1.3, "num_items": 50, "level": "sequence"},
}
AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")


def run(case: dict[str, Any], function: Callable[..., Any] = weighted_surrogate, **options: Any) -> tuple[Any, ...]:
    """loss, metrics, gradient"""
    loss, metrics = function(**case, **options)
    return loss, metrics, torch.autograd.grad(loss, case["logprobs"])[0]


def trl(case: dict[str, Any], loss_type: str, beta: float, delta: float | None, level: str, cap: float) -> Tensor:
    """TRL 1.16's losses, from its documentation and formulas, in its arithmetic; num_items is this batch's count."""
    mask = case["mask"].to(case["logprobs"].dtype)
    lengths = mask.sum(-1).clamp(min=1.0)
    log_ratio = case["logprobs"] - case["old_logprobs"]
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / lengths).unsqueeze(-1)
    importance = log_ratio.exp()
    A = case["advantages"].unsqueeze(1)
    other = importance.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * A
    if delta is not None:
        importance = importance.clamp(max=delta)
    loss = -torch.min(importance * A, other)
    loss = loss * (case["old_logprobs"] - case["rollout_logprobs"]).exp().clamp(max=cap)
    difference = case["ref_logprobs"] - case["logprobs"]
    loss = loss + beta * (difference.exp() - difference - 1)
    if loss_type == "grpo":
        return ((loss * mask).sum(-1) / lengths).mean()
    if loss_type == "dr_grpo":
        return (loss * mask).sum() / (loss.size(0) * MAX_LENGTH)
    return (loss * mask).sum() / mask.sum().clamp(min=1.0)


# Settings that TRL has too, in all combinations.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("level,delta,beta", list(itertools.product(("token", "sequence"), (None, 1.5), (0.0, 0.04))))
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_weights_of_one_give_the_losses_of_trl(
    loss_type: str, level: str, delta: float | None, beta: float, backend: str, device: str
) -> None:
    case = to(per_token(dtype=torch.float32), device)
    case["token_weights"] = torch.ones_like(case["token_weights"])
    options = {"delta": delta, "beta": beta, "level": level, "rollout_cap": 1.5}
    got, _, gradient = run(case, backend=backend, aggregation=loss_type, max_length=MAX_LENGTH, **options)
    expected = trl(case, loss_type, beta, delta, level, 1.5)
    assert abs(float((got - expected).detach())) <= 1e-6
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, case["logprobs"])[0], rtol=1e-5, atol=1e-6)


# Every way to average with every option; fp64 is left to gradcheck.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token_advantages", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_its_definition(
    options: dict[str, Any],
    aggregation: str,
    per_token_advantages: bool,
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    options = {**options, "aggregation": aggregation, "max_length": MAX_LENGTH}
    case = to(per_token(dtype=dtype), device)
    if per_token_advantages:
        case["advantages"] = torch.linspace(-1, 1, case["mask"].numel(), dtype=dtype, device=device).view(4, 9)
    loss, metrics, gradient = run(case, backend=backend, **options)
    exact, exact_metrics, exact_gradient = run(cast(case, torch.float64), reference.weighted_surrogate, **options)
    # Plain torch in the dtype that log-probabilities are computed in: fp32 for half precision ones.
    plain, plain_metrics, plain_gradient = run(cast(case, torch.float32), reference.weighted_surrogate, **options)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert_as_good_as(loss, exact, plain, name="loss")
    rounded = plain_gradient.to(dtype)
    assert_as_good_as(gradient, exact_gradient, rounded, factor=GRADIENT_FACTOR, name="gradient")
    assert metrics.keys() == exact_metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
        if name == "entropy":
            assert value.isnan()
        else:
            assert_as_good_as(value, exact_metrics[name], plain_metrics[name], name=name)


def test_metrics_of_a_case_worked_by_hand() -> None:
    ratio = torch.tensor([[0.5, 1.0, 2.0, 0.5], [0.5, 1.0, 2.0, 9.0]], dtype=torch.float64)
    case = {
        "logprobs": ratio.log().requires_grad_(),
        "old_logprobs": torch.zeros(2, 4, dtype=torch.float64),
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
        "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "token_weights": torch.tensor([[1, 1, 2, 2], [1, 1, 1, 9]], dtype=torch.float64),
    }
    loss, metrics, gradient = run(case)
    # min(ratio A, clipped A): 0.5 + 1 + 2 x 1.28 + 2 x 0.5 for A = 1, -0.8 - 1 - 2 for A = -1
    assert float(loss.detach()) == pytest.approx(-(0.5 + 1 + 2.56 + 1 - 0.8 - 1 - 2) / 7)
    torch.testing.assert_close(gradient * 7, torch.tensor([[-0.5, -1, 0, -1], [0, 1, 2, 0]], dtype=torch.float64))
    expected = {
        "clip_low": 1 / 7,
        "clip_high": 1 / 7,
        "approx_kl": sum(r - 1 - math.log(r) for r in (0.5, 1, 2, 0.5, 0.5, 1, 2)) / 7,
        "ratio_mean": 7.5 / 7,
        "ratio_max": 2.0,
        "clip_weighted": 1 / 2,
        "weight_mean": 9 / 7,
        "effective_tokens": 5,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value), name
    assert metrics["ref_kl"].isnan() and metrics["entropy"].isnan()


# Every way to average counts tokens in another place.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_tokens_may_hold_anything(aggregation: str, options: dict[str, Any], backend: str, device: str) -> None:
    options = {**options, "aggregation": aggregation, "max_length": MAX_LENGTH, "backend": backend}
    case = per_token(dtype=torch.float32)
    dirty = poisoned(case)
    dirty["advantages"][-1] = torch.nan  # its response is masked entirely
    clean, unclean = run(to(case, device), **options), run(to(dirty, device), **options)
    assert torch.equal(clean[0], unclean[0]) and torch.equal(clean[2], unclean[2])
    assert not clean[2][~to(case, device)["mask"]].any()
    for name in clean[1]:
        assert torch.equal(clean[1][name].nan_to_num(), unclean[1][name].nan_to_num())


# Every denominator that could be 0.
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("num_items", [None, 0])
def test_an_empty_mask_gives_zero(aggregation: str, level: str, num_items: int | None) -> None:
    case = per_token()
    case["mask"] = torch.zeros_like(case["mask"])
    options = {"aggregation": aggregation, "level": level, "num_items": num_items, "max_length": MAX_LENGTH}
    loss, metrics, gradient = run(case, **options)
    assert float(loss) == 0 and not gradient.any()
    assert all(float(value) == 0 for name, value in metrics.items() if name != "entropy")


def test_half_batches_with_the_global_count_give_the_gradient_of_the_whole() -> None:
    case = per_token(B=6)
    whole = run(case, beta=0.1)
    count = case["mask"].sum()  # a 0-d integer tensor, as a distributed sum gives it
    halves = [
        {name: x.detach()[part].requires_grad_(x.requires_grad) for name, x in case.items()}
        for part in (slice(2), slice(2, 6))
    ]
    results = [run(half, beta=0.1, num_items=n) for half, n in zip(halves, (count, int(count)), strict=True)]
    torch.testing.assert_close(sum(r[0] for r in results), whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), whole[2], rtol=1e-12, atol=0)


# The dtypes in which trainers keep masks: bool, counts of a tokenizer, and numbers to multiply with.
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_mask_dtypes_and_strides(mask_dtype: torch.dtype) -> None:
    case = per_token()
    expected = run(case)
    other = {
        n: x if x.dim() < 2 else x.detach().t().contiguous().t().requires_grad_(x.requires_grad)
        for n, x in case.items()
    }
    other["mask"] = other["mask"].to(mask_dtype)
    got = run(other)
    torch.testing.assert_close(got[0], expected[0]), torch.testing.assert_close(got[2], expected[2])


def test_advantages_are_told_apart_by_shape_where_b_is_t() -> None:
    case = per_token(B=5, T=5)
    per_response = case["advantages"]
    expected = run(case)[0]
    case["advantages"] = per_response[:, None].expand(5, 5)
    assert torch.equal(run(case)[0], expected)
    case["advantages"] = per_response[None, :].expand(5, 5)
    assert not torch.equal(run(case)[0], expected)


def test_constants_get_no_gradient() -> None:
    case = per_token()
    for name in ("old_logprobs", "advantages", "token_weights", "ref_logprobs", "rollout_logprobs"):
        case[name].requires_grad_()
    weighted_surrogate(**case, beta=0.1).loss.backward()
    assert [name for name, x in case.items() if x.grad is not None] == ["logprobs"]


@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_and_repeatability(options: dict[str, Any], backend: str, device: str) -> None:
    case = to(per_token(seed=3), device)
    rest = {name: x for name, x in case.items() if name != "logprobs"}
    assert torch.autograd.gradcheck(
        lambda logprobs: 3 * weighted_surrogate(logprobs, **rest, **options).loss, case["logprobs"]
    )
    first, second = run(case, backend=backend, **options), run(case, backend=backend, **options)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])


# A token's ratio and a sequence's are different graphs.
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_compiles_whole(level: str) -> None:
    case = per_token(dtype=torch.float32)

    def step(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
        loss, metrics = weighted_surrogate(**case, level=level, beta=0.1)
        return loss * 2, metrics["approx_kl"]

    eager, compiled = step(case), torch.compile(step, fullgraph=True, backend="aot_eager")(case)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    gradients = [torch.autograd.grad(loss, case["logprobs"])[0] for loss in (eager[0], compiled[0])]
    assert torch.equal(*gradients)


# With a gradient, and without, where its buffer is None.
@pytest.mark.parametrize("wanted", [True, False])
def test_opcheck(wanted: bool) -> None:
    logprobs, table = torch.randn(2, 3), torch.rand(7, 2, 3)
    table[0] = 1
    results = torch.empty(()), torch.empty(10), torch.empty(2, 3) if wanted else None
    torch.library.opcheck(
        autograd.weighted_surrogate_forward, (logprobs, table, *results, 0.2, 0.28, None, 0.0, "token", "torch")
    )


# Argument, what is wrong with it, and a word of the message beside the argument's name.
WRONG: list[tuple[str, Any, str]] = [
    ("logprobs", torch.zeros(4), "dimensions"),
    ("logprobs", torch.zeros(4, 9, dtype=torch.long), "dtype"),
    ("old_logprobs", torch.zeros(4, 8), "(B, T)"),
    ("old_logprobs", torch.zeros(4, 9, dtype=torch.long), "dtype"),
    ("mask", torch.zeros(9), "(B, T)"),
    ("mask", torch.full((4, 9), 0.5), "0 or 1"),
    ("mask", torch.full((4, 9), torch.nan), "0 or 1"),
    ("advantages", torch.zeros(9), "(B,)"),
    ("advantages", torch.zeros(4, 1), "(B,)"),
    ("advantages", torch.tensor([0.0, torch.nan, 0.0, 0.0]), "finite"),
    ("advantages", torch.tensor([0.0, torch.inf, 0.0, 0.0]), "finite"),
    ("token_weights", torch.zeros(4), "(B, T)"),
    ("token_weights", torch.full((4, 9), -0.5), "-0.5 at [0, 0]"),
    ("token_weights", torch.full((4, 9), torch.inf), ">= 0"),
    ("token_weights", torch.full((4, 9), torch.nan), ">= 0"),
    ("ref_logprobs", torch.zeros(4, 9, 1), "(B, T)"),
    ("rollout_logprobs", torch.zeros(9, 4), "(B, T)"),
    ("rollout_cap", 0.0, "> 0"),
    ("eps_low", -0.1, "[0, 1]"),
    ("eps_low", 1.1, "[0, 1]"),
    ("eps_high", -0.1, ">= 0"),
    ("eps_high", math.nan, ">= 0"),
    ("delta", 0.0, "> 0"),
    ("beta", -1.0, ">= 0"),
    ("level", "word", "sequence"),
    ("aggregation", "sum", "dr_grpo"),
    ("aggregation", "dr_grpo", "max_length"),
    ("num_items", -1, ">= 0"),
    ("num_items", math.nan, ">= 0"),
    ("num_items", torch.tensor(-1), ">= 0"),
    ("num_items", torch.tensor([3]), "dimensions"),
    ("backend", "fortran", "torch"),
    ("old_logprobs", torch.zeros(4, 9, device="meta"), "device"),
]


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize("argument,value,word", WRONG, ids=[f"{a}-{i}" for i, (a, _, _) in enumerate(WRONG)])
def test_errors_name_the_argument(argument: str, value: Any, word: str) -> None:
    case = per_token(dtype=torch.float32)
    case[argument] = value
    with pytest.raises(ValueError, match=r"weighted_surrogate: `.*`: expected .*, got .*") as error:
        weighted_surrogate(**case)
    assert argument in str(error.value) and word in str(error.value)


def test_beta_wants_reference_logprobs() -> None:
    case = per_token()
    case["ref_logprobs"] = None
    with pytest.raises(ValueError, match="`ref_logprobs`"):
        weighted_surrogate(**case, beta=0.1)
    assert weighted_surrogate(**case).metrics["ref_kl"].isnan()


def test_checks_of_values_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPO_CHECK_VALUES", "0")
    case = per_token()
    case["token_weights"] = -case["token_weights"]
    assert weighted_surrogate(**case).loss.isfinite()
