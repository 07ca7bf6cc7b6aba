"""Inputs, products and peers that the benchmarks over the vocabulary share."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import VocabularyShape

EPS_LOW, EPS_HIGH = 0.2, 0.28
# Of loss and gradients, to the largest entry. liger-kernel and TRL multiply in the dtype of their inputs as well.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
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
    """A training script's way: all logits, log_softmax in fp32, autograd. hidden (M, D), targets (M,)."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def trl_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's chunked log-probabilities, as its GRPO trainer asks for them."""
    from trl.kernels import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return found[0], found[1]


@dataclass
class Batch:
    """Inputs of a loss beside log-probabilities: old (G, N), ratios near one as after a few updates; advantages (G,);
    mask (G, N), all ones."""

    old: Tensor
    advantages: Tensor
    mask: Tensor


def batch_of(logprobs: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(2)
    device = logprobs.device
    advantages = torch.randn(len(logprobs), generator=generator).to(device)
    old = logprobs.detach() + 0.1 * torch.randn(logprobs.shape, generator=generator).to(device)
    return Batch(old, advantages, torch.ones(logprobs.shape, device=device))


def clipped_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    """The loss of docs/method.md section 6 as trainers write it, over valid tokens."""
    ratio, A = (logprobs - batch.old).exp(), batch.advantages[:, None]
    per_token = -torch.min(ratio * A, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * A)
    return (per_token * batch.mask).sum() / batch.mask.sum()


def loss_and_gradients_agree(op: str, runs: dict[str, Callable[[], tuple[Tensor, ...]]], dtype: torch.dtype) -> None:
    """Every entry's loss and gradients against "plain torch", relative to the largest element."""
    results = {name: run() for name, run in runs.items()}
    plain = next(name for name in results if name.startswith("plain torch"))
    for name, result in results.items():
        for number, (got, expected) in enumerate(zip(result, results[plain], strict=True)):
            error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
            if not error <= LOSS_TOLERANCE[dtype]:
                what = f"gradient {number}" if number else "loss"
                raise AssertionError(f"{op}, {name}: {what} off by {error:.2e}, allowed {LOSS_TOLERANCE[dtype]:.0e}")


def dense_divergence(hidden: Tensor, weight: Tensor, slots: Tensor, kind: str) -> Tensor:
    return dense_divergence_from_logits(hidden @ weight.t(), slots, kind)


def dense_divergence_from_logits(logits: Tensor, slots: Tensor, kind: str) -> Tensor:
    """As the released trainer: log_softmax of all (G, N, V) logits, then a copy (G, J, V) of each frame's members."""
    log_p = logits.log_softmax(-1) if logits.dtype == torch.float64 else logits.float().log_softmax(-1)
    response = torch.arange(len(logits), device=logits.device)[:, None]
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
