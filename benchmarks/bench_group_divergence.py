"""group_divergence, kl and k3, beside the product of its unique rows and the dense way over (G, N, V); and
group_divergence_from_logits beside a sum over its unique rows."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import group_divergence, group_divergence_from_logits, token_logprobs
from appo_kernels.dtypes import dtype_name
from appo_kernels.ops.group_divergence import reference
from appo_kernels.testing import assert_as_good_as
from benchmarks import inputs_vocabulary as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_VOCABULARY, VocabularyShape, vocabulary_shapes

OP = "group_divergence"
SHAPES, DEFAULT = vocabulary_shapes, DEFAULT_VOCABULARY


def random_slots(shape: VocabularyShape, device: str) -> Tensor:
    """(K, G, J): J distinct positions of each response for each target frame, in order."""
    generator = torch.Generator().manual_seed(1)
    picked = [
        torch.randperm(shape.tokens, generator=generator)[: shape.slots].sort().values
        for _ in range(shape.frames * shape.responses)
    ]
    return torch.stack(picked).view(shape.frames, shape.responses, -1).to(device)


def case(shape: VocabularyShape, dtype: torch.dtype, device: str, kind: str) -> Case:
    head = peers.head_inputs(shape, dtype, device, gradients=False)
    slots = random_slots(shape, device)
    lse = token_logprobs(head.hidden.flatten(0, 1), head.weight, head.targets.flatten()).lse.view(head.targets.shape)
    usable, skipped = own_backends(OP, device, dtype)

    def ours(backend: str) -> Tensor:
        return group_divergence(head.hidden, head.weight, lse, slots, kind=kind, backend=backend)

    entries = [Entry(f"ours, {name}", "ours", partial(ours, name)) for name in usable]
    dense = partial(peers.dense_divergence, head.hidden, head.weight, slots, kind)
    entries.append(Entry("dense (G, N, V)", "peer", dense))
    unique = [head.hidden[i, slots[:, i].unique()] for i in range(shape.responses)]
    rows = torch.cat(unique)
    buffer = torch.empty(len(rows), shape.vocabulary, dtype=dtype, device=device)
    product = partial(torch.mm, rows, head.weight.t(), out=buffer)
    entries.append(Entry("bound: product of the unique rows", "bound", product))
    work = f"{shape.describe()}, {len(rows)} unique rows"
    verify = partial(check, head, slots, kind, usable)
    return Case(f"{OP} {kind}", shape.name, dtype_name(dtype), work, device, verify, entries, skipped)


def from_logits(shape: VocabularyShape, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape.responses, shape.tokens, shape.vocabulary, generator=generator).to(device, dtype)
    slots, lse = random_slots(shape, device), logits.float().logsumexp(-1)
    usable, skipped = own_backends(OP, device, dtype)

    def ours(backend: str) -> Tensor:
        return group_divergence_from_logits(logits, lse, slots, backend=backend)

    dense = partial(peers.dense_divergence_from_logits, logits, slots, "kl")
    runs = {f"ours, {name}": partial(ours, name) for name in usable}
    entries = [Entry(name, "ours", run) for name, run in runs.items()]
    entries.append(Entry("dense (G, N, V)", "peer", dense))
    unique = [slots[:, i].unique() for i in range(shape.responses)]
    # The rows are read; nothing of their size is written.
    rows = torch.cat([logits[i, positions] for i, positions in enumerate(unique)])
    entries.append(Entry("bound: sum of the unique rows", "bound", partial(torch.sum, rows, -1)))

    def verify() -> None:
        part = slots[:1, :, :2]
        exact = peers.dense_divergence_from_logits(logits.double(), part, "kl")
        plain = peers.dense_divergence_from_logits(logits, part, "kl")
        for name, run in runs.items():
            assert_as_good_as(run()[:1, :2], exact, plain, name=f"{OP} from logits, {name}")

    work = f"{shape.describe()}, {len(rows)} unique rows"
    name = f"{OP}_from_logits kl"
    return Case(name, shape.name, dtype_name(dtype), work, device, verify, entries, skipped)


def check(head: peers.Head, slots: Tensor, kind: str, backends: list[str], columns: int = 2048) -> None:
    """On two frames, four slots each, and as many words as fp64 logits are affordable for."""
    hidden, weight, slots = head.hidden, head.weight[:columns], slots[:2, :, :4]
    lse = torch.logsumexp(hidden.double() @ weight.double().t(), -1)
    exact = reference.group_divergence(hidden.double(), weight.double(), lse, slots, kind=kind)
    plain = peers.dense_divergence(hidden, weight, slots, kind)
    for backend in backends:
        got = group_divergence(hidden, weight, lse.float(), slots, kind=kind, backend=backend)
        assert_as_good_as(got, exact, plain, name=f"{OP} {kind}, {backend}")


def cases(shapes: list[VocabularyShape], device: str) -> Iterator[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for shape in shapes:
        for kind in ("kl", "k3"):
            yield case(shape, dtype, device, kind)
        yield from_logits(shape, dtype, device)
