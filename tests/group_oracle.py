"""Attention of groups behind their prompts in fp64 NumPy, token by token, and what torch makes of the same.

Nothing of appo_kernels is used here: a response stands behind a copy of its prompt, a sequence of its own, and the
gradients are written out. Shapes: T tokens of the packed row, L of one sequence, F frames.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Array = NDArray[np.float64]
RESULTS = ("out", "lse", "mass", "dq", "dk", "dv", "dq of mass", "dk of mass")


class Problem(NamedTuple):
    """A packed row of random groups; tensors in one dtype, but for the gradients of lse and mass."""

    prompts: list[int]
    responses: list[list[int]]
    query: Tensor  # (1, Hq, T, d)
    key: Tensor  # (1, Hkv, T, d)
    value: Tensor
    frames: Tensor  # (1, T) int32, each group's own from 0; -1 for none
    num_frames: int
    grad_out: Tensor  # (1, Hq, T, d)
    grad_lse: Tensor  # (1, Hq, T) fp32
    grad_mass: Tensor  # (1, T, F) fp32

    def sequences(self) -> list[list[int]]:
        """The places of every prompt followed by each of its responses; of a prompt alone where it has none."""
        found, start = [], 0
        for prompt, lengths in zip(self.prompts, self.responses, strict=True):
            places, end = list(range(start, start + prompt)), start + prompt
            alone = True
            for length in lengths:
                if length:
                    found.append(places + list(range(end, end + length)))
                    alone = False
                end += length
            if alone:
                found.append(places)
            start = end
        return found


def random_problem(number: int, dtype: torch.dtype) -> Problem:
    """One of a family with empty responses, G = 1, one-token prompts, up to 5 groups in a row, ratios 1 to 7."""
    draw = np.random.default_rng(number)
    groups = 1 + number % 5
    prompts = [1 if draw.random() < 0.2 else int(draw.integers(2, 80)) for _ in range(groups)]
    size = [1, 4, 2, 8][number % 4]
    responses = [[0 if draw.random() < 0.2 else int(draw.integers(1, 40)) for _ in range(size)] for _ in prompts]
    heads, head_dim = [(1, 1), (7, 1), (4, 2), (6, 3)][number // 3 % 4], (32, 64, 128)[number % 3]
    tokens, spread = sum(prompts) + sum(map(sum, responses)), (0.5, 1.0, 2.0)[number // 2 % 3]
    num_frames = 1 + number % 6
    frames, start = np.full(tokens, -1), 0
    for prompt, lengths in zip(prompts, responses, strict=True):
        marks = np.sort(draw.integers(0, num_frames, prompt))
        frames[start : start + prompt] = np.where(draw.random(prompt) < 0.2, -1, marks)
        start += prompt + sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(draw.standard_normal((1, *shape)))

    query, key, value, grad_out = (normal(count, tokens, head_dim) for count in (heads[0], *[heads[1]] * 2, heads[0]))
    inputs = ((spread * query).to(dtype), (spread * key).to(dtype), value.to(dtype))
    grads = (grad_out.to(dtype), normal(heads[0], tokens).float(), normal(tokens, num_frames).float())
    return Problem(prompts, responses, *inputs, torch.from_numpy(frames).int()[None], num_frames, *grads)


def exact(problem: Problem) -> dict[str, Array]:
    """out (1, Hq, T, d), lse (1, Hq, T), mass (1, T, F), mean over heads; the gradients of query, key and value through
    out and lse, and those of query and key through the mass."""
    tensors = (problem.query, problem.key, problem.value, problem.grad_out, problem.grad_lse, problem.grad_mass)
    query, key, value, grad_out, grad_lse, grad_mass = (x[0].double().numpy() for x in tensors)
    heads, tokens, head_dim = query.shape
    ratio = heads // len(key)
    out, lse, mass = np.zeros_like(query), np.zeros((heads, tokens)), np.zeros((tokens, problem.num_frames))
    dquery, dkey, dvalue, dquery_mass, dkey_mass = (np.zeros_like(x) for x in (query, key, value, query, key))
    done: set[int] = set()
    for places in problem.sequences():
        new = [place not in done for place in places]  # rows of a prompt count once, with its first response
        rows = [place for place, first in zip(places, new, strict=True) if first]
        done.update(places)
        frame = problem.frames[0].numpy()[places]
        later = np.triu(np.ones((len(places), len(places)), dtype=bool), 1)[new]
        for head in range(heads):
            q, k, v = query[head, rows], key[head // ratio, places], value[head // ratio, places]
            scores = np.where(later, -np.inf, q @ k.T / np.sqrt(head_dim))
            highest = scores.max(1, keepdims=True)
            weights = np.exp(scores - highest)
            sums = weights.sum(1, keepdims=True)
            weights /= sums
            out[head, rows], lse[head, rows] = weights @ v, (highest + np.log(sums))[:, 0]
            for f in range(problem.num_frames):
                mass[rows, f] += weights[:, frame == f].sum(1) / heads
            np.add.at(dvalue[head // ratio], places, weights.T @ grad_out[head, rows])
            of_frames = np.where(frame >= 0, grad_mass[rows][:, frame], 0) / heads
            for dweights, dlse, of_query, of_key in (
                (grad_out[head, rows] @ v.T, grad_lse[head, rows], dquery, dkey),
                (of_frames, 0 * grad_lse[head, rows], dquery_mass, dkey_mass),
            ):
                delta = (weights * dweights).sum(1) - dlse
                dscores = weights * (dweights - delta[:, None]) / np.sqrt(head_dim)
                of_query[head, rows] += dscores @ k
                np.add.at(of_key[head // ratio], places, dscores.T @ q)
    found = zip(RESULTS, (out, lse, mass, dquery, dkey, dvalue, dquery_mass, dkey_mass), strict=True)
    return {name: array[None] for name, array in found}


def visible(problem: Problem) -> Tensor:
    seen = torch.zeros(problem.query.shape[2], problem.query.shape[2], dtype=torch.bool)
    for places in problem.sequences():
        for row, place in enumerate(places):
            seen[place, places[: row + 1]] = True
    return seen


def frameworks(problem: Problem) -> dict[str, Tensor]:
    """The same by torch in the dtype of the problem: its own attention with a dense mask for out, and for lse and mass,
    which that does not give, scores and weights as transformers' eager attention has them."""
    seen, marks = visible(problem), torch.nn.functional.one_hot(problem.frames[0].long() + 1, problem.num_frames + 1)
    leaves = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    query, key, value = leaves
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ repeated.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    lse, mass = scores.logsumexp(-1).float(), (weights @ marks[:, 1:].to(weights.dtype)).mean(1).float()
    gradients = torch.autograd.grad([out, lse], leaves, [problem.grad_out, problem.grad_lse], retain_graph=True)
    of_mass = torch.autograd.grad(mass, leaves[:2], problem.grad_mass)
    return dict(zip(RESULTS, (out.detach(), lse.detach(), mass.detach(), *gradients, *of_mass), strict=True))


def separate(problem: Problem) -> dict[str, Tensor]:
    """out and its gradients from each response behind its prompt as a sequence of its own, by torch's attention."""
    leaves = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out, total, done = torch.zeros_like(problem.query), torch.zeros(()), 0
    for places in problem.sequences():
        own = scaled_dot_product_attention(*(x[:, :, places] for x in leaves), is_causal=True, enable_gqa=True)
        new = [place >= done for place in places]
        done = places[-1] + 1
        rows = torch.tensor(places)[new]
        out[:, :, rows] = own[:, :, new].detach()
        total = total + (own[:, :, new] * problem.grad_out[:, :, rows]).sum().float()
    gradients = torch.autograd.grad(total, leaves)
    return {"out": out} | dict(zip(RESULTS[3:6], gradients, strict=True))
