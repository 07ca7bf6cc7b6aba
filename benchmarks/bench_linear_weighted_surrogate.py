"""linear_weighted_surrogate, forward and backward, beside its three products, plain torch, liger-kernel and TRL."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import linear_weighted_surrogate, token_logprobs
from appo_kernels.dtypes import dtype_name
from benchmarks import inputs_vocabulary as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_VOCABULARY, VocabularyShape, vocabulary_shapes

OP = "linear_weighted_surrogate"
SHAPES, DEFAULT = vocabulary_shapes, DEFAULT_VOCABULARY


def case(shape: VocabularyShape, dtype: torch.dtype, device: str) -> Case:
    head = peers.head_inputs(shape, dtype, device, gradients=True)
    with torch.no_grad():
        logprobs = token_logprobs(head.hidden.flatten(0, 1), head.weight, head.targets.flatten()).logprobs
    batch = peers.batch_of(logprobs.view(head.targets.shape))
    usable, skipped = own_backends("weighted_surrogate", device, dtype, needs_grad=True)

    def ours(backend: str) -> Tensor:
        arguments = head.hidden, head.weight, head.targets, batch.old, batch.advantages, batch.mask
        return linear_weighted_surrogate(*arguments, backend=backend).loss

    losses: dict[str, Callable[[], Tensor]] = {f"ours, {name}": partial(ours, name) for name in usable}
    losses["plain torch, all logits"] = partial(through, peers.dense_logprobs, head, batch)
    if reason := peers.installed("liger_kernel"):
        skipped["liger-kernel, chunked"] = reason
    else:
        losses["liger-kernel, chunked"] = liger(head, batch)
    if reason := peers.installed("trl"):
        skipped["TRL, chunked"] = reason
    else:
        losses["TRL, chunked"] = partial(through, peers.trl_logprobs, head, batch)

    def run(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    entries = [
        Entry(name, "ours" if name.startswith("ours") else "peer", partial(run, loss), head.clear)
        for name, loss in losses.items()
    ]
    entries.append(Entry("bound: 3 matrix products", "bound", peers.products(head, 3)))

    def with_gradients(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        head.clear()
        value = run(loss)
        found = value, head.hidden.grad, head.weight.grad
        head.clear()
        return found

    runs = {name: partial(with_gradients, loss) for name, loss in losses.items()}
    verify = partial(peers.loss_and_gradients_agree, OP, runs, dtype)
    work = shape.describe() + ", forward and backward"
    return Case(OP, shape.name, dtype_name(dtype), work, device, verify, entries, skipped)


def through(logprobs_of: Callable[..., tuple[Tensor, Tensor]], head: peers.Head, batch: peers.Batch) -> Tensor:
    """The loss in plain torch from log-probabilities, as trainers do it."""
    logprobs = logprobs_of(head.hidden.flatten(0, 1), head.weight, head.targets.flatten())[0]
    return peers.clipped_loss(logprobs.view(batch.old.shape), batch)


def liger(head: peers.Head, batch: peers.Batch) -> Callable[[], Tensor]:
    """liger-kernel's chunked GRPO loss in its default settings, DAPO aggregation."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    eps = {"epsilon_low": peers.EPS_LOW, "epsilon_high": peers.EPS_HIGH}
    module = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, **eps)
    arguments = head.hidden, head.weight, head.targets, batch.mask, batch.advantages
    return lambda: module(*arguments, old_per_token_logps=batch.old)[0]


def cases(shapes: list[VocabularyShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        yield case(shape, torch.bfloat16 if device == "cuda" else torch.float32, device)
