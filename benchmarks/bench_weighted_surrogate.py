"""weighted_surrogate, forward and backward, beside a copy of its inputs and plain torch."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import weighted_surrogate
from benchmarks import inputs_vocabulary as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_VOCABULARY, VocabularyShape, vocabulary_shapes

OP = "weighted_surrogate"
SHAPES, DEFAULT = vocabulary_shapes, DEFAULT_VOCABULARY
# 64 responses of 4,096 tokens: with fewer numbers a benchmark times the calls alone.
RESPONSES, TOKENS = 64, 4096


def case(shape: VocabularyShape, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    logprobs = (-3 * torch.rand(RESPONSES, TOKENS, generator=generator)).to(device).requires_grad_()
    batch = peers.batch_of(logprobs)
    usable, skipped = own_backends(OP, device, torch.float32, needs_grad=True)

    def ours(backend: str) -> Tensor:
        return weighted_surrogate(logprobs, batch.old, batch.advantages, batch.mask, backend=backend).loss

    losses: dict[str, Callable[[], Tensor]] = {f"ours, {name}": partial(ours, name) for name in usable}
    losses["plain torch"] = partial(peers.clipped_loss, logprobs, batch)

    def run(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, logprobs)

    runs = {name: partial(run, loss) for name, loss in losses.items()}
    entries = [Entry(name, "ours" if name.startswith("ours") else "peer", one) for name, one in runs.items()]
    copies = [logprobs.detach(), batch.old, batch.mask]
    entries.append(Entry("bound: copy of inputs", "bound", lambda: [tensor.clone() for tensor in copies]))
    verify = partial(peers.loss_and_gradients_agree, OP, runs, torch.float32)
    work = f"{RESPONSES} responses of {TOKENS:,} tokens, forward and backward"
    return Case(OP, shape.name, "float32", work, device, verify, entries, skipped)


def cases(shapes: list[VocabularyShape], device: str) -> Iterator[Case]:
    """One, whatever the shapes: there is no vocabulary in it."""
    yield case(shapes[0], device)
