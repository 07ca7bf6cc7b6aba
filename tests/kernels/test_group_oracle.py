"""group_attention and its mass against an fp64 oracle in NumPy, beside torch's own attention in the same dtype."""

import functools

import group_oracle as oracle
import numpy as np
import pytest
import torch

from appo_kernels import FramePlan, GroupLayout, frame_attention, frame_mass, group_attention

# A subset of the family: every number of groups, ratio of heads, head size and spread of the scores is in it.
FAST = range(0, 200, 9)
# A few units in the last place of the largest number: where torch's own error happens to be next to none.
FLOOR = 2.0**-21


@functools.cache
def problem(number: int, dtype: torch.dtype) -> tuple[oracle.Problem, dict[str, oracle.Array], dict[str, torch.Tensor]]:
    made = oracle.random_problem(number, dtype)
    return made, oracle.exact(made), oracle.frameworks(made)


def ours(made: oracle.Problem) -> dict[str, torch.Tensor]:
    layout = GroupLayout(made.prompts, made.responses)
    leaves = [x.clone().requires_grad_() for x in (made.query, made.key, made.value)]
    out, lse = group_attention(*leaves, layout)
    gradients = torch.autograd.grad([out, lse], leaves, [made.grad_out, made.grad_lse])
    plan = FramePlan.of_layout(made.frames, made.num_frames, layout)
    mass = frame_mass(*leaves[:2], lse=lse.detach(), plan=plan)
    of_mass = torch.autograd.grad(mass, leaves[:2], made.grad_mass)
    found = (out.detach(), lse.detach(), mass.detach(), *gradients, *of_mass)
    return dict(zip(oracle.RESULTS, found, strict=True))


def errors(result: torch.Tensor, exact: oracle.Array) -> tuple[float, float]:
    """Largest and root of the sum of squares."""
    difference = result.double().numpy() - exact
    return float(np.abs(difference).max()), float(np.linalg.norm(difference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_most_twice_the_error_of_torch(dtype: torch.dtype) -> None:
    """Of every result of every group; and typically no more than torch's error at all."""
    ratios: dict[str, list[float]] = {}
    for number in FAST:
        made, exact, theirs = problem(number, dtype)
        for name, result in ours(made).items():
            error, allowed = errors(result, exact[name])[0], errors(theirs[name], exact[name])[0]
            scale = float(np.abs(exact[name]).max())
            assert error <= 2 * allowed + FLOOR * scale, f"group {number}: {name}: {error:.2e}, torch {allowed:.2e}"
            if allowed > 0:
                ratios.setdefault(name, []).append(error / allowed)
    for name in ("out", "lse", "mass", "dq", "dk", "dv"):
        assert np.median(ratios[name]) < 1.25, name


def test_mass_is_within_twice_without_a_floor() -> None:
    """And its gradients; fp32, both from a given lse and beside the output: probabilities are normalised by the sum of
    their own row, where a rounded lse would be in all of them."""
    ratios: dict[str, list[float]] = {}
    for number in FAST:
        made, exact, theirs = problem(number, torch.float32)
        layout = GroupLayout(made.prompts, made.responses)
        plan = FramePlan.of_layout(made.frames, made.num_frames, layout)
        lse = group_attention(made.query, made.key, made.value, layout)[1]
        leaves = [x.clone().requires_grad_() for x in (made.query, made.key)]
        for mass in (
            frame_mass(*leaves, lse=lse, plan=plan),
            frame_attention(*leaves, made.value, plan=plan).mass,
        ):
            found = {"mass": mass.detach()}
            found |= dict(zip(oracle.RESULTS[6:], torch.autograd.grad(mass, leaves, made.grad_mass), strict=True))
            for name, result in found.items():
                error, allowed = (errors(x, exact[name])[0] for x in (result, theirs[name]))
                assert error <= 2 * allowed + 2.0**-24, f"{number}: {name}"
                ratios.setdefault(name, []).append(error / allowed if allowed else 0.0)
    assert all(np.median(found) < 1.25 for found in ratios.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_no_further_than_separate_sequences(dtype: torch.dtype) -> None:
    for number in FAST:
        made, _, _ = problem(number, dtype)
        made = made._replace(grad_lse=torch.zeros_like(made.grad_lse))
        exact, theirs, found = oracle.exact(made), oracle.separate(made), ours(made)
        for name, result in theirs.items():
            assert errors(found[name], exact[name])[1] <= errors(result, exact[name])[1], f"{number}: {name}"
