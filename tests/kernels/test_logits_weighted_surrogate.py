"""logits_weighted_surrogate: its definition, and writing the gradient in place of the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from surrogate_cases import SERVED, cast, from_hidden, per_token, poisoned, to
from torch import Tensor

from appo_kernels import logits_weighted_surrogate
from appo_kernels.ops.weighted_surrogate import autograd, reference
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as
from appo_kernels.vocabulary import torch_rows

# Without and with the gradient of an entropy, with every other term beside it, and with ratios of whole responses.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy_coef": 0.1, "temperature": 0.7},
    "everything": {"entropy_coef": 0.1, "temperature": 1.3, "beta": 0.1, "delta": 1.5, "num_items": 40},
    "sequence": {"level": "sequence", "entropy_coef": 0.1, "aggregation": "grpo"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "CPU_BLOCK_BYTES", 2 * 37 * 4)


def from_logits(dtype: torch.dtype = torch.float64, **shape: int) -> dict[str, Any]:
    """``logits`` (B, T, V) wanting a gradient, and everything beside them."""
    case = from_hidden(**shape)
    logits = case.pop("hidden").detach() @ case.pop("weight").detach().t() + case.pop("bias").detach()
    return cast({"logits": logits.requires_grad_(), **case}, dtype)


def run(
    case: dict[str, Any], function: Callable[..., Any] = logits_weighted_surrogate, **options: Any
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """loss, metrics, gradient of the logits"""
    loss, metrics = function(**case, **options)
    return loss, metrics, torch.autograd.grad(loss, case["logits"])[0]


def in_place(case: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The same through logits that a layer made, which are overwritten."""
    made = case["logits"] * 1.0
    loss, metrics = logits_weighted_surrogate(**{**case, "logits": made}, inplace=True, **options)
    gradient = torch.autograd.grad(loss, case["logits"])[0]
    assert torch.equal(made.detach(), gradient)
    return loss, metrics, gradient


# Every dtype; the gradient in a tensor of its own and in the place of the logits.
@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [run, in_place])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_its_definition(
    options: dict[str, Any], function: Callable[..., Any], dtype: torch.dtype, backend: str, device: str
) -> None:
    case = to(from_logits(dtype), device)
    loss, metrics, gradient = function(case, backend=backend, **options)
    exact, exact_metrics, exact_gradient = run(
        cast(case, torch.float64), reference.logits_weighted_surrogate, **options
    )
    plain, plain_metrics, plain_gradient = run(case, reference.logits_weighted_surrogate, **options)
    # The loss is a sum of terms of either sign: rounding is relative to them, not to what is left of them.
    assert_as_good_as(loss + 1, exact + 1, plain + 1, name="loss")
    assert gradient.dtype == dtype and not gradient[~case["mask"]].any()
    assert_as_good_as(gradient, exact_gradient, plain_gradient, factor=GRADIENT_FACTOR, name="gradient")
    for name, value in metrics.items():
        assert_as_good_as(value, exact_metrics[name], plain_metrics[name], name=name)


@pytest.mark.parametrize("backend,device", SERVED)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_second_run_and_garbage_at_masked_tokens_change_no_bit(
    options: dict[str, Any], backend: str, device: str
) -> None:
    case = from_logits(torch.float32)
    expected = run(to(case, device), backend=backend, **options)
    for function, other in ((run, case), (run, poisoned(case)), (in_place, poisoned(case))):
        got = function(to(other, device), backend=backend, **options)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: dict[str, Any]) -> None:
    case = from_logits(B=3, T=3, D=3, V=5, seed=1)
    rest = {name: x for name, x in case.items() if name != "logits"}
    assert torch.autograd.gradcheck(
        lambda logits: logits_weighted_surrogate(logits, **rest, **options).loss, case["logits"]
    )


def test_a_slice_of_longer_logits_is_overwritten_where_it_is() -> None:
    case = from_logits(torch.float32)
    expected = run(case)[2]
    longer = torch.randn(4, 15, 37)
    longer[:, 3:12] = case["logits"].detach()
    made = longer.clone().requires_grad_() * 1.0
    sliced = made[:, 3:12]
    logits_weighted_surrogate(**{**case, "logits": sliced}, inplace=True).loss.backward()
    assert torch.equal(made.detach()[:, 3:12], expected)
    assert torch.equal(made.detach()[:, :3], longer[:, :3]) and torch.equal(made.detach()[:, 12:], longer[:, 12:])


def test_forbidden_tokens() -> None:
    case = from_logits(torch.float32)
    with torch.no_grad():
        case["logits"][..., 5] = -torch.inf
    case["targets"] = case["targets"].masked_fill(case["targets"] == 5, 0)
    loss, metrics, gradient = run(case, entropy_coef=0.1)
    exact = run(cast(case, torch.float64), reference.logits_weighted_surrogate, entropy_coef=0.1)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["entropy"], exact[1]["entropy"])
    assert gradient.isfinite().all() and not gradient[..., 5].any()


# The kept tokens at the start, and at the end: which block, or warp, is merged into which.
@pytest.mark.parametrize("kept", [slice(0, 100), slice(900, None)])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_tokens_masked_by_the_smallest_number(backend: str, device: str, kept: slice) -> None:
    """Masks of finfo.min, not -inf: sums of such logits overflow where what they are multiplied by is 0."""
    V = 1003
    case = to(per_token(B=1, T=2, dtype=torch.float32), device)
    del case["logprobs"]
    case["mask"][:] = True
    logits = torch.full((1, 2, V), torch.finfo(torch.float32).min)
    logits[..., kept] = torch.randn(logits[..., kept].shape, generator=torch.Generator().manual_seed(0))
    case |= {"logits": logits.to(device).requires_grad_(), "targets": torch.full((1, 2), range(V)[kept][0]).to(device)}
    got = run(case, entropy_coef=0.1, backend=backend)
    expected = run(cast(case, torch.float64), reference.logits_weighted_surrogate, entropy_coef=0.1)
    for a, b in ((got[0], expected[0]), (got[1]["entropy"], expected[1]["entropy"]), (got[2], expected[2])):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_in_place_leaves_logits_alone_where_no_gradient_is_wanted() -> None:
    case = from_logits(torch.float32)
    before = case["logits"].detach().clone()
    with torch.no_grad():
        logits_weighted_surrogate(**case, inplace=True)
    logits_weighted_surrogate(**{**case, "logits": case["logits"].detach()}, inplace=True)
    assert torch.equal(case["logits"].detach(), before)


def test_in_place_is_refused_or_noticed_where_it_would_be_wrong() -> None:
    case = from_logits(torch.float32)
    with pytest.raises(ValueError, match=r"`inplace`.*leaf that requires grad"):
        logits_weighted_surrogate(**case, inplace=True)
    shared = (case["logits"][:1] * 1.0).expand(4, 9, 37)
    with pytest.raises(ValueError, match=r"`inplace`.*expanded"):
        logits_weighted_surrogate(**{**case, "logits": shared}, inplace=True)
    # tanh needs its output for its own backward: autograd must find that it was overwritten.
    loss = logits_weighted_surrogate(**{**case, "logits": case["logits"].tanh()}, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# In place the gradient aliases an input, which torch.compile has to be told.
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(inplace: bool) -> None:
    case = from_logits(torch.float32)

    def step(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
        logits = case["logits"] * 1.0
        loss, metrics = logits_weighted_surrogate(**{**case, "logits": logits}, inplace=inplace)
        return loss * 2, metrics["entropy"]

    eager, compiled = step(case), torch.compile(step, fullgraph=True, backend="aot_eager")(case)
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    gradients = [torch.autograd.grad(loss, case["logits"])[0] for loss in (eager[0], compiled[0])]
    torch.testing.assert_close(*gradients)


# Each form of the operator: its schema differs in what is mutated.
@pytest.mark.parametrize("how", ["gradient", "in place", "no gradient"])
def test_opcheck(how: str) -> None:
    logits, table = torch.randn(2, 3, 6), torch.rand(7, 2, 3)
    table[0] = 1
    source = None if how == "in place" else logits
    gradient = {"gradient": torch.empty_like(logits), "in place": logits, "no gradient": None}[how]
    numbers = 0.2, 0.28, None, 0.0, "token", 0.7, 0.1, "torch"
    results = torch.empty(()), torch.empty(10), gradient
    torch.library.opcheck(
        autograd.logits_weighted_surrogate_forward, (source, torch.randint(6, (2, 3)), table, *results, *numbers)
    )


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize(
    "argument,value,word",
    [
        ("logits", torch.zeros(4, 37), "dimensions"),
        ("logits", torch.zeros(4, 9, 37, dtype=torch.long), "dtype"),
        ("targets", torch.zeros(4, 8, dtype=torch.long), "(B, T)"),
        ("targets", torch.full((4, 9), 37), "[0, 37)"),
        ("mask", torch.ones(4, 8), "(B, T)"),
        ("advantages", torch.full((4,), torch.inf), "finite"),
        ("temperature", -1.0, "> 0"),
    ],
)
def test_errors_name_the_argument(argument: str, value: Any, word: str) -> None:
    case = from_logits(torch.float32)
    case[argument] = value
    with pytest.raises(ValueError, match=r"logits_weighted_surrogate: `.*`: expected .*, got .*") as error:
        logits_weighted_surrogate(**case)
    assert argument in str(error.value) and word in str(error.value)


# Views that start at columns 1 to 3, of an odd and of a round vocabulary: the gradient has memory of its own, aligned
# otherwise.
@pytest.mark.parametrize("V", [37, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_logits_that_start_anywhere(backend: str, device: str, dtype: torch.dtype, V: int) -> None:
    case = to(per_token(dtype=dtype), device)
    wide = torch.randn(4, 9, V + 3, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    case = {name: x.detach() for name, x in case.items() if name != "logprobs"}
    case["targets"] = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for column in (None, 1, 2, 3):
        logits = wide[..., 1 : V + 1].clone() if column is None else wide.clone()[..., column : column + V]
        logits.copy_(wide[..., 1 : V + 1])
        leaf = logits.detach().requires_grad_()
        loss = logits_weighted_surrogate(leaf, **case, backend=backend).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=2e-3, atol=1e-7)
