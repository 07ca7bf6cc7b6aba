"""linear_weighted_surrogate, forward and backward, beside its three products, plain torch, liger-kernel and TRL."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import linear_weighted_surrogate, token_logprobs
from benchmarks import vocabulary_work as peers
from benchmarks.harness import Case, Contestant, own_backends
from benchmarks.shapes import DEFAULT_VOCABULARY, VocabularyShape, vocabulary_shapes

OP = "linear_weighted_surrogate"
SHAPES, DEFAULT = vocabulary_shapes, DEFAULT_VOCABULARY
# Of loss and gradients, to the largest entry. liger-kernel and TRL multiply in the dtype of their inputs as well.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def case(shape: VocabularyShape, dtype: torch.dtype, device: str) -> Case:
    head = peers.head_inputs(shape, dtype, device, gradients=True)
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(shape.responses, generator=generator).to(device)
    mask = torch.ones(head.targets.shape, device=device)
    with torch.no_grad():  # ratios near one, as after a few updates
        logprobs = token_logprobs(head.hidden.flatten(0, 1), head.weight, head.targets.flatten()).logprobs
    old = logprobs.view(mask.shape) + 0.1 * torch.randn(mask.shape, generator=generator).to(device)
    backends = own_backends("weighted_surrogate", device, dtype, needs_grad=True)
    skipped = {f"ours, {name}": reason for name, reason in backends.items() if reason}

    def ours(backend: str) -> Tensor:
        arguments = head.hidden, head.weight, head.targets, old, advantages, mask
        return linear_weighted_surrogate(*arguments, backend=backend).loss

    losses: dict[str, Callable[[], Tensor]] = {
        f"ours, {name}": partial(ours, name) for name, reason in backends.items() if not reason
    }
    losses["plain torch, all logits"] = partial(peers.dense_surrogate, head, old, advantages, mask)
    if reason := peers.installed("liger_kernel"):
        skipped["liger-kernel, chunked"] = reason
    else:
        losses["liger-kernel, chunked"] = liger(head, old, advantages, mask)
    if reason := peers.installed("trl"):
        skipped["TRL, chunked"] = reason
    else:
        losses["TRL, chunked"] = partial(trl, head, old, advantages, mask)

    def run(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    runs = {name: partial(run, loss) for name, loss in losses.items()}
    contestants = [
        Contestant(name, "ours" if name.startswith("ours") else "peer", one, head.clear) for name, one in runs.items()
    ]
    contestants.append(Contestant("limit: 3 products", "limit", peers.products(head, 3)))
    verify = partial(check, head, runs)
    work = shape.describe() + ", forward and backward"
    return Case(OP, shape.name, str(dtype).removeprefix("torch."), work, device, verify, contestants, skipped)


def liger(head: peers.Head, old: Tensor, advantages: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """liger-kernel's chunked GRPO loss in its default settings, DAPO aggregation."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    eps = {"epsilon_low": peers.EPS_LOW, "epsilon_high": peers.EPS_HIGH}
    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, **eps)
    return lambda: module(head.hidden, head.weight, head.targets, mask, advantages, old_per_token_logps=old)[0]


def trl(head: peers.Head, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """TRL's chunked log-probabilities, then the loss in plain torch, as its GRPO trainer does."""
    logp = peers.trl_logprobs(head.hidden.flatten(0, 1), head.weight, head.targets.flatten())[0].view(old.shape)
    ratio, A = (logp - old).exp(), advantages[:, None]
    per_token = -torch.min(ratio * A, ratio.clamp(1 - peers.EPS_LOW, 1 + peers.EPS_HIGH) * A)
    return (per_token * mask).sum() / mask.sum()


def check(head: peers.Head, runs: dict[str, Callable[[], Tensor]]) -> None:
    """Loss and gradients of every contestant against plain torch, relative to the largest entry."""
    results = {}
    for name, run in runs.items():
        head.clear()
        loss = run()
        results[name] = (loss.double(), head.hidden.grad, head.weight.grad)
    tolerance = TOLERANCE[head.hidden.dtype]
    for name, result in results.items():
        expected_all = results["plain torch, all logits"]
        for what, got, expected in zip(("loss", "grad hidden", "grad weight"), result, expected_all, strict=True):
            error = float((got - expected).abs().max() / expected.abs().max())
            if not error <= tolerance:
                raise AssertionError(f"{OP}, {name}: {what} is off by {error:.2e}, allowed {tolerance:.0e}")
    head.clear()


def cases(shapes: list[VocabularyShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        yield case(shape, torch.bfloat16 if device == "cuda" else torch.float32, device)
