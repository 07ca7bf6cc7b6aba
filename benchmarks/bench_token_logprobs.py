"""token_logprobs, forward and with gradients, beside its products, log_softmax of all logits, TRL's chunked way, and
cut-cross-entropy, which gives no entropy."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import token_logprobs
from appo_kernels.dtypes import dtype_name
from appo_kernels.ops.token_logprobs import reference
from appo_kernels.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_good_as
from benchmarks import inputs_vocabulary as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_VOCABULARY, VocabularyShape, vocabulary_shapes

OP = "token_logprobs"
SHAPES, DEFAULT = vocabulary_shapes, DEFAULT_VOCABULARY
CUT = "cut-cross-entropy, no entropy"
# hidden (M, D), weight, targets (M,) -> log-probabilities and, but for cut-cross-entropy, entropies
Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def ours(backend: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden, weight, targets, backend=backend)[:2]


def case(shape: VocabularyShape, dtype: torch.dtype, device: str, *, gradients: bool) -> Case:
    head = peers.head_inputs(shape, dtype, device, gradients=gradients)
    usable, skipped = own_backends(OP, device, dtype, needs_grad=gradients)
    functions: dict[str, Function] = {f"ours, {name}": partial(ours, name) for name in usable}
    functions["log_softmax of all logits"] = peers.dense_logprobs
    if reason := peers.installed("trl"):
        skipped["TRL, chunked"] = reason
    else:
        functions["TRL, chunked"] = peers.trl_logprobs
    if reason := peers.installed("cut_cross_entropy"):
        skipped[CUT] = reason
    else:
        functions[CUT] = cut_cross_entropy

    def run(function: Function) -> object:
        results = function(head.hidden.flatten(0, 1), head.weight, head.targets.flatten())
        if gradients:
            torch.stack([result.sum() for result in results]).sum().backward()
        return results

    entries = [
        Entry(name, "ours" if name.startswith("ours") else "peer", partial(run, function), head.clear)
        for name, function in functions.items()
    ]
    # Without logits in memory the backward computes them again: four products.
    count = 4 if gradients else 1
    entries.append(
        Entry(f"bound: {count} matrix product{'s' if count > 1 else ''}", "bound", peers.products(head, count))
    )
    work = shape.describe() + (", forward and backward" if gradients else ", forward")
    op = f"{OP} {'fwd+bwd' if gradients else 'fwd'}"
    verify = partial(check, head, functions)
    return Case(op, shape.name, dtype_name(dtype), work, device, verify, entries, skipped)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Its kernels are for a GPU; on a CPU the package compiles cross entropy of all logits."""
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if hidden.is_cuda else "torch_compile"
    return (-linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation),)


def check(head: peers.Head, functions: dict[str, Function], tokens: int = 64, columns: int = 4096) -> None:
    """Results and gradients on some tokens and as many words as an fp64 tensor of logits is affordable for."""
    leaves = [head.hidden.detach().flatten(0, 1)[:tokens], head.weight.detach()[:columns]]
    targets = head.targets.flatten()[:tokens] % columns

    def outcome(function: Function, dtype: torch.dtype, count: int) -> list[Tensor]:
        """The first ``count`` results, and the gradients of their sum."""
        inputs = [t.to(dtype).requires_grad_() for t in leaves]
        results = function(*inputs, targets)[:count]
        return [*results, *torch.autograd.grad([r.sum() for r in results], inputs)]

    exact_by_count = {count: outcome(reference.token_logprobs, torch.float64, count) for count in (1, 2)}
    plain_by_count = {count: outcome(peers.dense_logprobs, leaves[0].dtype, count) for count in (1, 2)}
    for name, function in functions.items():
        count = 1 if name == CUT else 2
        exact, plain = exact_by_count[count], plain_by_count[count]
        for i, got in enumerate(outcome(function, leaves[0].dtype, count)):
            factor = FORWARD_FACTOR if i < count else GRADIENT_FACTOR
            slack = 1e-6 if name.startswith("ours") else 1e-2
            assert_as_good_as(got, exact[i], plain[i], factor=factor, atol=slack, name=f"{OP}, {name}, result {i}")
    torch.compiler.reset()  # what was compiled for these sizes would be compiled for any size when the others come


def cases(shapes: list[VocabularyShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        for gradients in (False, True):
            yield case(shape, torch.bfloat16 if device == "cuda" else torch.float32, device, gradients=gradients)
