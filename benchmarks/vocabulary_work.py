"""Inputs, products and peers that the benchmarks over the vocabulary share."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import VocabularyShape

EPS_LOW, EPS_HIGH = 0.2, 0.28
# As TRL's GRPO trainer calls it.
TRL_CHUNK = 32768


@dataclass
class Head:
    """hidden (G, N, D), weight (V, D), targets (G, N)."""

    shape: VocabularyShape
    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @property
    def device(self) -> str:
        return self.hidden.device.type

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def head_inputs(shape: VocabularyShape, dtype: torch.dtype, device: str, *, gradients: bool) -> Head:
    generator = torch.Generator().manual_seed(0)
    G, N, D, V = shape.responses, shape.tokens, shape.hidden, shape.vocabulary
    hidden = torch.randn(G, N, D, generator=generator).to(device, dtype).requires_grad_(gradients)
    weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(device, dtype).requires_grad_(gradients)
    return Head(shape, hidden, weight, torch.randint(V, (G, N), generator=generator).to(device))


def products(head: Head, count: int) -> Callable[[], None]:
    """The first ``count`` of logits, gradient of hidden, gradient of weight; more are recomputed logits. Into buffers
    that are there already."""
    x, weight = head.hidden.detach().flatten(0, 1), head.weight.detach()
    logits = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        for number in range(count):
            if number == 1:
                torch.mm(logits, weight, out=grad_x)
            elif number == 2:
                torch.mm(logits.t(), x, out=grad_weight)
            else:
                torch.mm(x, weight.t(), out=logits)

    return run


def dense_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a training script does: all logits, log_softmax in fp32, autograd. hidden (M, D), targets (M,)."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def trl_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's chunked log-probabilities, as its GRPO trainer asks for them."""
    from trl.kernels import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return found[0], found[1]


def dense_surrogate(head: Head, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """The clipped loss (SPEC section 6) with all logits and autograd."""
    logp = dense_logprobs(head.hidden.flatten(0, 1), head.weight, head.targets.flatten())[0].view(old.shape)
    ratio, A = (logp - old).exp(), advantages[:, None]
    per_token = -torch.min(ratio * A, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * A)
    return (per_token * mask).sum() / mask.sum()


def dense_divergence(hidden: Tensor, weight: Tensor, slots: Tensor, kind: str) -> Tensor:
    """As the released trainer: log_softmax of all (G, N, V) logits, then a copy (G, J, V) of each frame's members."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    response = torch.arange(len(hidden), device=hidden.device)[:, None]
    frames = []
    for positions in slots:  # (G, J)
        members = log_p[response, positions]  # (G, J, V)
        if kind == "kl":
            mixture = members.logsumexp(0) - math.log(len(members))
            frames.append((members.exp() * (members - mixture)).sum(-1).mean(0))
        else:
            d = (members.mean(0) - members).clamp(-11, 11)
            frames.append((d.exp() - d - 1).sum(-1).mean(0))
    return torch.stack(frames)


def installed(package: str) -> str:
    """ "" when a peer can be imported, else why it does not take part."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"
