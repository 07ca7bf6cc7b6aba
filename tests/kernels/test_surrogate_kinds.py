"""Kinds of the surrogate, bias-corrected KL and rollout corrections: all three forms against the definition."""

from typing import Any

import pytest
import torch
from surrogate_cases import SERVED, cast, from_hidden, per_token, poisoned, to

import appo_kernels
from appo_kernels.ops.weighted_surrogate import reference
from appo_kernels.ops.weighted_surrogate.kinds import KINDS
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as

# Each kind at each level that it has; delta, the KL and corrections where they meet a kind's own rule.
OPTIONS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    **{f"{kind}, sequence": {"kind": kind, "level": "sequence"} for kind in KINDS if kind != "dppo_tv"},
    "dppo_tv with a narrow range and cap": {"kind": "dppo_tv", "eps_low": 0.01, "eps_high": 0.02, "delta": 1.2},
    "gspo_token, two-sided": {"kind": "gspo_token", "delta": 1.1},
    "bias-corrected KL": {"beta": 0.1, "kl_ratio": True},
    "bias-corrected KL, sequence": {"beta": 0.1, "kl_ratio": True, "level": "sequence"},
    "bias-corrected KL, cispo": {"beta": 0.1, "kl_ratio": True, "kind": "cispo", "level": "sequence"},
    "bias-corrected KL, gspo_token": {"beta": 0.1, "kl_ratio": True, "kind": "gspo_token"},
    "floor": {"rollout_correction": "clip", "rollout_floor": 0.8, "rollout_cap": 1.2},
    "mask": {"rollout_correction": "mask", "rollout_floor": 0.7, "rollout_cap": 1.4},
    "truncated by response": {"rollout_level": "sequence", "rollout_cap": 1.5, "kind": "sapo"},
    "mask by response": {"rollout_correction": "mask", "rollout_level": "sequence", "rollout_floor": 0.2},
}
FORMS = ("weighted_surrogate", "logits_weighted_surrogate", "linear_weighted_surrogate")
LEAVES = {
    "weighted_surrogate": ["logprobs"],
    "logits_weighted_surrogate": ["logits"],
    "linear_weighted_surrogate": ["hidden", "weight", "bias"],
}


def case(form: str, dtype: torch.dtype) -> dict[str, Any]:
    if form == "weighted_surrogate":
        return per_token(dtype=dtype)
    inputs = from_hidden(dtype=dtype)
    if form == "linear_weighted_surrogate":
        return inputs
    hidden, weight, bias = (inputs.pop(name).detach() for name in ("hidden", "weight", "bias"))
    return {"logits": (hidden @ weight.t() + bias).requires_grad_(), **inputs}


def run(form: str, inputs: dict[str, Any], module: Any, **options: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    loss, metrics = getattr(module, form)(**inputs, **options)
    return loss, metrics, list(torch.autograd.grad(loss, [inputs[name] for name in LEAVES[form]]))


# Every kind in every form: each form has code of its own for a token's slope.
@pytest.mark.parametrize(("backend", "device"), SERVED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_its_definition(name: str, form: str, backend: str, device: str) -> None:
    options = {"aggregation": "grpo", **OPTIONS[name]}
    if form != "weighted_surrogate":
        options["entropy_coef"] = 0.05
    inputs = to(case(form, torch.float32), device)
    loss, metrics, gradients = run(form, inputs, appo_kernels, backend=backend, **options)
    exact, exact_metrics, exact_gradients = run(form, cast(inputs, torch.float64), reference, **options)
    plain, plain_metrics, plain_gradients = run(form, cast(inputs, torch.float32), reference, **options)
    assert_as_good_as(loss, exact, plain, atol=3e-6, name="loss")
    for leaf, got, wanted, framework in zip(LEAVES[form], gradients, exact_gradients, plain_gradients, strict=True):
        assert_as_good_as(got, wanted, framework, factor=GRADIENT_FACTOR, atol=3e-6, name=leaf)
    assert metrics.keys() == exact_metrics.keys()
    for key in ("clip_low", "clip_high", "clip_weighted", "ratio_mean", "rollout_missing", "ref_kl"):
        assert_as_good_as(metrics[key], exact_metrics[key], plain_metrics[key], atol=3e-6, name=key)


# Every kind in every form: each reads what is at masked tokens in another place.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_masked_tokens_may_hold_anything(name: str, form: str) -> None:
    inputs = case(form, torch.float64)
    clean = run(form, inputs, appo_kernels, **OPTIONS[name])
    dirty = run(form, poisoned(inputs), appo_kernels, **OPTIONS[name])
    assert torch.equal(clean[0], dirty[0])
    for got, expected in zip(dirty[2], clean[2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_values_worked_by_hand() -> None:
    """One token of ratio 2 and probability 0.5, A = 1 and W = 3: what each kind reports, and its slope."""
    logprobs = torch.tensor([[0.5]], dtype=torch.float64).log().requires_grad_()
    shared = {
        "old_logprobs": torch.tensor([[0.25]], dtype=torch.float64).log(),
        "advantages": torch.ones(1, dtype=torch.float64),
        "mask": torch.ones(1, 1),
        "token_weights": torch.full((1, 1), 3.0, dtype=torch.float64),
    }
    half, gate = float(logprobs.detach()), 1 / (1 + torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item())
    expected = {
        "clip": (-3 * 1.28, 0.0),
        "cispo": (-3 * 1.28 * half, -3 * 1.28),
        "sapo": (-3 * 4 * gate, -3 * 4 * gate * (1 - gate) * 2),
        "dppo_tv": (-3 * 2 * half, -3 * 2),  # 0.5 - 0.25 is within 0.28
        "gpg": (-3 * half, -3.0),
        "gspo_token": (-3 * 1.28, 0.0),
    }
    assert set(expected) == set(KINDS)
    for kind, (value, slope) in expected.items():
        loss, metrics = appo_kernels.weighted_surrogate(logprobs, kind=kind, **shared)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert float(loss.detach()) == pytest.approx(value, rel=1e-12), kind
        assert float(gradient) == pytest.approx(slope, rel=1e-12), kind
        assert metrics["clip_high"] == (kind in ("clip", "cispo", "gspo_token"))
    loss, metrics = appo_kernels.weighted_surrogate(logprobs, kind="dppo_tv", eps_high=0.2, **shared)
    assert float(loss.detach()) == 0 and metrics["clip_high"] == 1 and metrics["effective_tokens"] == 0


# Every kind: the ratio overflows fp32 in each of them in another place.
@pytest.mark.parametrize("kind", KINDS)
def test_ratios_without_bounds_stay_numbers(kind: str) -> None:
    """An impossible token now (log pi = -inf) and one whose ratio overflows: no NaN where the definition has none."""
    logprobs = torch.tensor([[-torch.inf, 0.0]]).requires_grad_()
    old, mask = torch.tensor([[-1.0, -800.0]]), torch.ones(1, 2)
    for advantage in (1.0, 0.0):
        loss, _ = appo_kernels.weighted_surrogate(logprobs, old, torch.tensor([advantage]), mask, kind=kind)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert not gradient.isnan().any()
        assert not loss.isnan() or kind == "gspo_token"  # its one ratio is exp(-inf + inf)


def test_linear_form_takes_one_product_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 MVD for every kind whose ratio is the token's; 8 where a response must be known first."""
    from appo_kernels.vocabulary.output_head import OutputHead

    calls, logits = [0], OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda head, x: (calls.__setitem__(0, calls[0] + 1), logits(head, x))[1])
    found = {}
    for kind in KINDS:
        calls[0] = 0
        run("linear_weighted_surrogate", case("linear_weighted_surrogate", torch.float32), appo_kernels, kind=kind)
        found[kind] = calls[0]
    assert found == {kind: 2 if kind == "gspo_token" else 1 for kind in KINDS}
