"""logits_weighted_surrogate, forward and backward, beside a copy of the logits, plain torch, liger-kernel's Triton."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import logits_weighted_surrogate
from appo_kernels.dtypes import dtype_name
from benchmarks import inputs_vocabulary as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_VOCABULARY, VocabularyShape, vocabulary_shapes

OP = "logits_weighted_surrogate"
SHAPES, DEFAULT = vocabulary_shapes, DEFAULT_VOCABULARY


def case(shape: VocabularyShape, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    G, N, V = shape.responses, shape.tokens, shape.vocabulary
    logits = torch.randn(G, N, V, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(V, (G, N), generator=generator).to(device)
    with torch.no_grad():
        batch = peers.batch_of(plain_logprobs(logits, targets))
    usable, skipped = own_backends("weighted_surrogate", device, dtype, needs_grad=True)

    def ours(backend: str) -> Tensor:
        arguments = logits, targets, batch.old, batch.advantages, batch.mask
        return logits_weighted_surrogate(*arguments, backend=backend).loss

    losses: dict[str, Callable[[], Tensor]] = {f"ours, {name}": partial(ours, name) for name in usable}
    leaves: dict[str, Tensor] = {}  # of those that want logits of another shape
    losses["plain torch"] = lambda: peers.clipped_loss(plain_logprobs(logits, targets), batch)
    if reason := peers.installed("liger_kernel"):
        skipped["liger-kernel, Triton"] = reason
    elif device != "cuda":
        skipped["liger-kernel, Triton"] = "runs on a GPU only"
    else:
        losses["liger-kernel, Triton"], leaves["liger-kernel, Triton"] = liger(logits, targets, batch)

    def run(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    def clear() -> None:
        for leaf in (logits, *leaves.values()):
            leaf.grad = None

    entries = [
        Entry(name, "ours" if name.startswith("ours") else "peer", partial(run, loss), clear)
        for name, loss in losses.items()
    ]
    # The logits are read and a gradient of their size is written.
    entries.append(Entry("bound: copy of the logits", "bound", logits.detach().clone))

    def with_gradient(name: str) -> tuple[Tensor, ...]:
        clear()
        value = run(losses[name])
        found = value, leaves.get(name, logits).grad[:, :N]
        clear()
        return found

    runs = {name: partial(with_gradient, name) for name in losses}
    verify = partial(peers.loss_and_gradients_agree, OP, runs, dtype)
    work = f"G {G}, N {N}, V {V:,}, forward and backward"
    return Case(OP, shape.name, dtype_name(dtype), work, device, verify, entries, skipped)


def plain_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def liger(logits: Tensor, targets: Tensor, batch: peers.Batch) -> tuple[Callable[[], Tensor], Tensor]:
    """And the logits it takes: with a position behind the last token, which it leaves out."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    longer = torch.nn.functional.pad(logits.detach(), (0, 0, 0, 1)).requires_grad_()
    # Not in place: the logits are those of the next run as well.
    settings = {"temperature": 1.0, "beta": 0.0, "eps_low": peers.EPS_LOW, "eps_high": peers.EPS_HIGH, "inplace": False}
    settings |= {"loss_type": "dapo", "reduce": True}
    arguments = longer, batch.old, None, targets, batch.advantages, batch.mask
    return lambda: triton_grpo_loss(*arguments, **settings)[0], longer


def cases(shapes: list[VocabularyShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        yield case(shape, torch.bfloat16 if device == "cuda" else torch.float32, device)
