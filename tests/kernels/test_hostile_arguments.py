"""Every argument of every public operator, given what it is not for: an error that names operator and argument."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import appo_kernels

V, D, B, T = 7, 4, 2, 3


def attention() -> dict[str, Any]:
    """Valid arguments, every optional one among them."""
    rows = torch.zeros(B, T, dtype=torch.int64)
    return {
        "query": torch.randn(B, 4, T, 16),
        "key": torch.randn(B, 2, 5, 16),
        "frame_ids": torch.tensor([[0, 0, 1, -1, 1]]).expand(B, -1),
        "num_frames": 2,
        "first_key": rows,
        "last_key": rows + 3,
        "prefix_keys": rows + 1,
        "scale": 0.3,
        "reduction": "mean",
        "plan": None,
    }


def loss() -> dict[str, Any]:
    return {
        "old_logprobs": -torch.rand(B, T),
        "advantages": torch.randn(B),
        "mask": torch.ones(B, T, dtype=torch.bool),
        "token_weights": torch.ones(B, T),
        "eps_low": 0.2,
        "eps_high": 0.28,
        "delta": 2.0,
        "ref_logprobs": -torch.rand(B, T),
        "beta": 0.1,
        "rollout_logprobs": -torch.rand(B, T),
        "rollout_cap": 2.0,
        "level": "token",
        "aggregation": "dr_grpo",
        "num_items": 6,
        "max_length": 9,
        "kind": "clip",
        "kl_ratio": True,
        "rollout_correction": "clip",
        "rollout_level": "sequence",
        "rollout_floor": 0.1,
    }


def group() -> dict[str, Any]:
    return {"lse": torch.zeros(B, T), "slots": torch.arange(2).expand(1, B, 2), "kind": "kl", "temperature": 0.9}


TARGETS = torch.zeros(B, T, dtype=torch.int64)
HEAD = {"weight": torch.randn(V, D), "bias": torch.randn(V), "temperature": 0.9, "softcap": 3.0}
HIDDEN = torch.randn(B, T, D)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "frame_mass": (
        appo_kernels.frame_mass,
        {**attention(), "lse": torch.ones(B, 4, T), "per_head": False, "out": torch.zeros(B, T, 2)},
    ),
    "frame_attention": (appo_kernels.frame_attention, {**attention(), "value": torch.randn(B, 2, 5, 16)}),
    "group_attention": (
        appo_kernels.group_attention,
        {
            "query": torch.randn(1, 4, 9, 16), "key": torch.randn(1, 2, 9, 16), "value": torch.randn(1, 2, 9, 16),
            "layout": appo_kernels.GroupLayout([3], [[2, 4]]), "scale": 0.3,
        },
    ),
    "token_logprobs": (appo_kernels.token_logprobs, {"hidden": HIDDEN[0], "targets": TARGETS[0], **HEAD}),
    "group_divergence": (appo_kernels.group_divergence, {"hidden": HIDDEN, **group(), **HEAD}),
    "group_divergence_from_logits": (
        appo_kernels.group_divergence_from_logits, {"logits": torch.randn(B, T, V), **group()},
    ),
    "weighted_surrogate": (appo_kernels.weighted_surrogate, {"logprobs": -torch.rand(B, T), **loss()}),
    "logits_weighted_surrogate": (
        appo_kernels.logits_weighted_surrogate,
        {
            "logits": torch.randn(B, T, V), "targets": TARGETS, **loss(), "temperature": 0.9, "entropy_coef": 0.1,
            "inplace": False,
        },
    ),
    "linear_weighted_surrogate": (
        appo_kernels.linear_weighted_surrogate,
        {"hidden": HIDDEN, "targets": TARGETS, **loss(), **HEAD, "entropy_coef": 0.1},
    ),
}  # fmt: skip

INFINITE_IS_NO_LIMIT = ("eps_high", "delta", "rollout_cap")
# What no argument of its kind takes. None is left out where it is the default.
NO_TENSOR = ([[1.0]], np.ones((B, T)), "text", 3.5, torch.ones(2, 2).to_sparse(), torch.ones(1, 1, 1, 1, 1, 1))
NO_NUMBER = ("0.5", [1.0], np.ones(2), torch.ones(2), float("nan"), float("inf"), -float("inf"), 10**400, True, 1j)
NO_COUNT = ("2", [2], 2.5, -1, 10**30, torch.tensor([2]), float("nan"))
NO_FLAG = (1, "yes", None, torch.tensor(True))
NO_CHOICE = ("other", 1, None, ["sum"], torch.ones(2), np.ones(2))


def wrong_values(name: str, value: Any, default: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield from NO_TENSOR
        yield value.to(torch.complex64)
        if value.is_floating_point() and value.dim():
            yield value[..., :0]
        if value.dim() and value.shape[-1] > 1 and name not in ("advantages", "slots", "logits"):
            yield value[..., 1:]
        if default is not None:
            yield None
    elif isinstance(value, bool):
        yield from NO_FLAG
    elif isinstance(value, str):
        yield from NO_CHOICE
    elif name == "layout":
        yield from (None, [[3, 2, 4]], torch.tensor([[3, 2, 4]]), appo_kernels.GroupLayout([3], [[2]]))
    elif name == "plan":
        # The last is a plan beside the frame ids that it stands for.
        yield from ("plan", 1, {}, torch.ones(2), appo_kernels.FramePlan.build(torch.zeros(B, 5, dtype=torch.int64), 1))
    elif name == "num_frames":
        yield from NO_COUNT
    else:
        yield from (x for x in NO_NUMBER if not (str(x) == "inf" and name in INFINITE_IS_NO_LIMIT))
        if name in ("num_items", "max_length"):
            yield -1
        if name == "num_items":
            yield from (10**30, torch.tensor(-1.0), torch.tensor(float("inf")), torch.tensor(float("nan")))


def cases() -> Iterator[Any]:
    for op, (function, arguments) in CALLS.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if name == "backend":
                values: Iterator[Any] = iter(("gpu", None, 3, ["torch"], np.ones(2)))
            else:
                assert name in arguments, f"{op} has a new argument {name}: give it a valid value above"
                values = wrong_values(name, arguments[name], parameter.default)
            for number, value in enumerate(values):
                yield pytest.param(op, name, value, id=f"{op}-{name}-{number}")


# Every operator: a wrong argument proves nothing beside one that is wrong already.
@pytest.mark.parametrize("op", CALLS)
def test_the_valid_arguments_are_valid(op: str) -> None:
    """Else the test below would pass on any error."""
    function, arguments = CALLS[op]
    function(**arguments)


# An argument that does not fit another may be reported as the other's fault: these are told by two.
PAIRS = {
    "query": ("key", "value", "first_key", "lse", "layout"), "key": ("frame_ids", "value"),
    "hidden": ("weight", "targets", "lse"),
    "weight": ("bias", "hidden"), "logprobs": ("old_logprobs",), "logits": ("targets", "lse"), "lse": (),
}  # fmt: skip


# Every argument of every operator, with the wrong values of its kind (`wrong_values`).
@pytest.mark.parametrize(("op", "name", "value"), list(cases()))
def test_a_wrong_argument_is_named(op: str, name: str, value: Any) -> None:
    function, arguments = CALLS[op]
    if name == "num_items":  # read by this aggregation alone
        arguments = {**arguments, "aggregation": "dapo"}
    with pytest.raises(ValueError, match=rf"^{op}: `\w+`: expected .+, got .+\. .+") as error:
        function(**{**arguments, name: value})
    named = str(error.value).split("`")[1]
    assert named == name or named in PAIRS.get(name, ()), str(error.value)
    assert len(str(error.value)) < 600


def test_every_public_operator_is_here() -> None:
    """All but merge_attention, whose one argument is a list: ``test_group_attention.py`` has its errors."""
    functions = {name for name in appo_kernels.__all__ if name.islower()}
    assert functions - {"merge_attention"} == set(CALLS)


LEAF = torch.zeros(B, T, 2, requires_grad=True)
SHARED = torch.zeros(1000)


# `out` must be memory of its own; overlapping logits cannot be overwritten; empty groups.
@pytest.mark.parametrize(
    ("op", "change", "named"),
    [
        ("frame_mass", {"out": LEAF}, "out"),
        ("frame_mass", {"out": torch.zeros(1, T, 2).expand(B, T, 2)}, "out"),
        ("frame_mass", {"out": SHARED.as_strided((B, T, 2), (3, 1, 1))}, "out"),
        ("frame_mass", {"query": SHARED[:384].view(B, 4, T, 16), "out": SHARED[380:392].view(B, T, 2)}, "out"),
        ("frame_mass", {"lse": SHARED[:24].view(B, 4, T), "out": SHARED[:12].view(B, T, 2)}, "out"),
        ("group_divergence", {"hidden": HIDDEN[:0], "lse": torch.zeros(0, T), "slots": TARGETS[None, :0]}, "hidden"),
        ("group_divergence", {"hidden": HIDDEN[:, :0], "lse": torch.zeros(B, 0)}, "slots"),
        ("token_logprobs", {"weight": torch.zeros(0, D), "bias": torch.zeros(0)}, "weight"),
        ("weighted_surrogate", {"rollout_correction": "truncate"}, "rollout_floor"),
        ("weighted_surrogate", {"rollout_floor": 3.0}, "rollout_floor"),
        ("weighted_surrogate", {"kind": "dppo_tv", "level": "sequence"}, "level"),
    ],
)
def test_arguments_that_do_not_fit_together(op: str, change: dict[str, Any], named: str) -> None:
    function, arguments = CALLS[op]
    with pytest.raises(ValueError, match=rf"^{op}: `{named}`: expected .+, got .+\. .+"):
        function(**{**arguments, **change})


# The ends of int64, what 31 bits keep of them (-1 and 0), and the first number that 31 bits cannot hold.
@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 2**32 - 1, 2**32, 2**31, -(2**31) - 1])
@pytest.mark.parametrize("name", ["frame_ids", "first_key", "last_key", "prefix_keys"])
@pytest.mark.parametrize("op", ["frame_mass", "frame_attention"])
def test_integers_beyond_31_bits_do_not_wrap(op: str, name: str, value: int) -> None:
    function, arguments = CALLS[op]
    arguments = {**arguments, name: torch.full_like(arguments[name], value)}
    if op == "frame_mass":
        arguments["out"] = None
    refused = value > 0 if name == "last_key" else name != "first_key"
    if refused:
        with pytest.raises(ValueError, match=rf"^{op}: `{name}`: expected numbers"):
            function(**arguments)
        return
    nearest = {"first_key": 4 if value > 0 else 0, "last_key": -1}[name]
    expected = function(**{**arguments, name: torch.full_like(arguments[name], nearest)})
    torch.testing.assert_close(function(**arguments), expected, rtol=0, atol=0)


def differentiable(op: str) -> tuple[Callable[..., Any], dict[str, Any], list[str]]:
    function, arguments = CALLS[op]
    names = [n for n in ("query", "key", "value", "hidden", "weight", "bias", "logprobs", "logits") if n in arguments]
    arguments = {n: v.clone().requires_grad_() if n in names else v for n, v in arguments.items() if n != "out"}
    return function, arguments, names


# Every operator with a gradient.
@pytest.mark.parametrize("op", [op for op in CALLS if not op.startswith("group_divergence")])
def test_second_derivatives_raise(op: str) -> None:
    """A gradient penalty would otherwise have the first-order gradient alone, without a word."""
    function, arguments, names = differentiable(op)
    result = function(**arguments)
    first = result if isinstance(result, torch.Tensor) else result[0]
    for name in names:
        torch.autograd.grad(first.sum(), arguments[name], retain_graph=True)
        with pytest.raises(RuntimeError, match=rf"^{op}: `create_graph`: expected False"):
            torch.autograd.grad(first.sum(), arguments[name], create_graph=True, retain_graph=True)


@pytest.mark.parametrize("op", [op for op in CALLS if op != "group_attention"])  # its own test compiles it
def test_compiles_whole_with_dynamic_shapes(op: str) -> None:
    """Lengths, batch, vocabulary and the plain numbers are symbols; a head size may be a constant."""
    function, arguments, names = differentiable(op)
    arguments.pop("inplace", None)
    if op.startswith("group"):
        names = []

    def total(**given: Any) -> torch.Tensor:
        result = function(**given)
        results = [result] if isinstance(result, torch.Tensor) else result
        return sum(torch.where(r.isfinite(), r, 0.0).sum() for r in results if isinstance(r, torch.Tensor))

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for copies in (1, 2):  # another batch, so that a second shape goes through what was compiled
        per_batch = {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.shape[:1] == (B,)}
        given = {
            **arguments,
            **{n: torch.cat([v.detach()] * copies).requires_grad_(n in names) for n, v in per_batch.items()},
        }
        if op.startswith("group"):
            given["slots"] = arguments["slots"].repeat(1, copies, 1)
        eager, got = total(**given), compiled(**given)
        torch.testing.assert_close(got, eager)
        leaves = [given[n] for n in names]
        if leaves:
            torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(eager, leaves))


# NaN and infinities at a valid token, each argument that carries log-probabilities.
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("weighted_surrogate", "logprobs"),
        *itertools.product(
            ("weighted_surrogate", "logits_weighted_surrogate", "linear_weighted_surrogate"),
            ("old_logprobs", "ref_logprobs"),
        ),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_log_probabilities_that_are_no_numbers_are_named(op: str, name: str, value: float, beta: float) -> None:
    function, arguments = CALLS[op]
    spoiled = arguments[name].clone()
    spoiled[1, 2] = value
    with pytest.raises(ValueError, match=rf"^{op}: `{name}`: expected .+, got {value} at \[1, 2\]"):
        function(**{**arguments, "beta": beta, name: spoiled})
    function(**{**arguments, "beta": beta, name: spoiled, "mask": torch.tensor([[True] * 3, [True, True, False]])})


# A token's ratio and a sequence's are formed in different places.
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_unknown_rollout_logprobs_count_as_ratio_one(level: str) -> None:
    arguments = {**CALLS["weighted_surrogate"][1], "rollout_level": level, "rollout_floor": 0.0, "rollout_cap": 9.0}
    known = arguments["rollout_logprobs"].clone()
    unknown = known.clone()
    unknown[0, 1] = unknown[1, 0] = float("nan")
    known[0, 1], known[1, 0] = arguments["old_logprobs"][0, 1], arguments["old_logprobs"][1, 0]
    arguments["mask"] = torch.tensor([[1, 1, 1], [0, 1, 1]])
    got = appo_kernels.weighted_surrogate(**{**arguments, "rollout_logprobs": unknown})
    expected = appo_kernels.weighted_surrogate(**{**arguments, "rollout_logprobs": known})
    assert torch.equal(got.loss, expected.loss)
    assert got.metrics["rollout_missing"] == 1 and expected.metrics["rollout_missing"] == 0
