"""group_attention and merge_attention against dense definitions in fp64, and what holds for every layout."""

import functools
import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from backends import served
from group_cases import LAYOUTS, compare_groups, results, tensors
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from appo_kernels import GroupLayout, frame_mass, group_attention, merge_attention
from appo_kernels.attention.reference import attention_matrix, mass_of
from appo_kernels.ops.group_attention import flash_cpu, op, reference
from appo_kernels.testing import peak_extra_bytes

SERVED = served(op.OP, head_dim=32)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_layouts(backend: str, device: str, name: str) -> None:
    layout = GroupLayout(*LAYOUTS[name])
    compare_groups(backend, layout, tensors(layout, (6, 2), 32, device), torch.float32)


# Ratios 1, 7 and 8 and a single head; head sizes at both ends, and one that no kernel likes.
@pytest.mark.parametrize(("heads", "head_dim"), [((3, 3), 32), ((14, 2), 128), ((8, 1), 37), ((1, 1), 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_shapes_and_dtypes(
    backend: str, device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    layout = GroupLayout(*LAYOUTS["several"])
    compare_groups(backend, layout, tensors(layout, heads, head_dim, device), dtype, scale=0.2)


# 200 random groups in one test: the claim is about all layouts, and each alone is quick.
def test_random_groups() -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    for number in range(60):
        groups = 1 + number % 5
        layout = GroupLayout(numbers(1, 50, groups), [numbers(0, 30, 1 + number % 4) for _ in range(groups)])
        heads, head_dim = [(1, 1), (7, 1), (4, 2)][number % 3], (32, 64)[number % 2]
        compare_groups("torch", layout, tensors(layout, heads, head_dim), torch.float32)


# One thread takes everything in one piece; three do not divide heads, rows or groups evenly. Keys whole, and in blocks.
@pytest.mark.parametrize(("threads", "least_block"), [(1, 1024), (3, 1024), (3, 2)])
def test_threads(threads: int, least_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many heads and parts of rows a call takes: also a number of rows and heads that threads do not divide."""
    monkeypatch.setattr(flash_cpu, "FEW_NUMBERS", 0)
    monkeypatch.setattr(flash_cpu, "LEAST_BLOCK", least_block)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("several", "long", "ones"):
        layout = GroupLayout(*LAYOUTS[name])
        compare_groups("torch", layout, tensors(layout, (7, 1), 32), torch.float32)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_separate_sequences(backend: str, device: str) -> None:
    """Each response behind a copy of its prompt; in whatever company a response stands."""
    layout = GroupLayout(*LAYOUTS["several"])
    inputs = tensors(layout, (4, 2), 64, device)
    out, lse = group_attention(*inputs, layout, backend=backend)
    for group in layout.groups:
        for response in group.responses:
            places = torch.cat([torch.arange(s.start, s.stop) for s in (group.prompt, response)]).to(device)
            own = [x[:, :, places] for x in inputs]
            expected = scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)
            torch.testing.assert_close(out[:, :, places], expected, atol=2e-6, rtol=0)
            alone = group_attention(*own, GroupLayout([len(places)], [[]]), backend=backend)
            torch.testing.assert_close(lse[:, :, places], alone[1], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_bitwise_repeatable_with_any_strides(backend: str, device: str) -> None:
    layout = GroupLayout(*LAYOUTS["several"])
    inputs = tensors(layout, (6, 2), 32, device)
    strided = [torch.cat([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., :32] for x in inputs]
    first, *others = (
        results(group_attention, x, torch.float32, layout, backend=backend) for x in (inputs, inputs, strided)
    )
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_gradcheck() -> None:
    layout = GroupLayout([3, 1], [[2, 0, 1], [2]])
    inputs = [x.double().requires_grad_() for x in tensors(layout, (4, 2), 3)]
    assert torch.autograd.gradcheck(functools.partial(group_attention, layout=layout), inputs)


# The output alone and the lse alone: each reaches the inputs by a path of its own.
@pytest.mark.parametrize("result", [0, 1])
def test_one_result_and_one_gradient(result: int) -> None:
    layout = GroupLayout(*LAYOUTS["unequal"])
    query, key, value = tensors(layout, (4, 2), 32)
    found, exact = (
        torch.autograd.grad(function(query.to(d), leaf, value.to(d), layout)[result].square().sum(), leaf)[0]
        for function, d in ((group_attention, torch.float32), (reference.group_attention, torch.float64))
        for leaf in [key.to(d).requires_grad_()]
    )
    torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=1e-5)


def test_opcheck() -> None:
    layout = GroupLayout(*LAYOUTS["several"])
    query, key, value = tensors(layout, (4, 2), 32)
    lse, grads = query.new_empty(1, 4, layout.tokens), [torch.empty_like(x) for x in (query, key, value)]
    shared = query, key, value, layout.lengths, 0.2, torch.empty_like(query), lse
    torch.library.opcheck(op.forward_op, (*shared, "torch"))
    for upstream in ((query, None), (None, lse), (query, lse)):
        torch.library.opcheck(op.backward_op, (*shared, *upstream, *grads, "torch"))


def test_compiles_once_for_all_lengths() -> None:
    """One graph without breaks for six layouts of one number of tokens, with equal results."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout) -> Tensor:
        out, lse = group_attention(2 * query, key, value, layout)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for first in range(6):
        layout = GroupLayout([10 + first, 12], [[5, 9 - first], [1, 3]])
        inputs = [x.requires_grad_() for x in tensors(layout, (4, 2), 32)]
        expected = torch.autograd.grad(loss(*inputs, layout), inputs)
        for a, b in zip(expected, torch.autograd.grad(compiled(*inputs, layout), inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


# What works at the same time has gradients of keys of its own: also more of them than heads, and than cores here.
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_memory_is_linear_in_the_prompt(threads: int) -> None:
    """Forward and backward, results included: within 1.5 of inputs, output and gradients."""
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for prompt in (4096, 8192):
            layout = GroupLayout([prompt], [[128] * 4])
            leaves = [x.requires_grad_() for x in tensors(layout, (2, 1), 64)]

            def run(leaves: list[Tensor] = leaves, layout: GroupLayout = layout) -> Any:
                out, _ = group_attention(*leaves, layout)
                return out, torch.autograd.grad(out, leaves, torch.ones_like(out))

            found[prompt] = peak_extra_bytes(run)
    finally:
        torch.set_num_threads(before)
    numbers = layout.tokens * 64 * (2 * (2 + 1 + 1) + 2)
    assert found[8192] < 1.5 * 4 * numbers and found[8192] < 2.1 * found[4096]


def test_pairs_and_places() -> None:
    for prompts, responses in LAYOUTS.values():
        layout = GroupLayout(prompts, responses)
        assert layout.pairs == int(reference.visible(layout).sum())
        places = [
            place
            for group in layout.groups
            for s in (group.prompt, *group.responses)
            for place in range(s.start, s.stop)
        ]
        assert places == list(range(layout.tokens))
        sizes = [[r.stop - r.start for r in group.responses] for group in layout.groups]
        assert sizes == [[n for n in row if n] for row in responses]
    assert GroupLayout(torch.tensor([3]), torch.tensor([[1, 2]])).lengths.tolist() == [[3, 1, 2]]


# One wrong value for each rule that a layout has.
@pytest.mark.parametrize(
    ("argument", "prompts", "responses"),
    [
        ("prompt_lengths", [], []),
        ("prompt_lengths", [0], [[1]]),
        ("prompt_lengths", [2.0], [[1]]),
        ("response_lengths", [2], [[-1]]),
        ("response_lengths", [2], [[True]]),
        ("response_lengths", [2, 3], [[1]]),
        ("prompt_lengths", torch.tensor([[2]]), [[1]]),
    ],
)
def test_layout_refuses(argument: str, prompts: Any, responses: Any) -> None:
    with pytest.raises(ValueError, match=f"GroupLayout: `{argument}`: expected .*, got "):
        GroupLayout(prompts, responses)


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("query", {"query": torch.randn(2, 4, 12, 8)}),
        ("query", {"query": torch.randn(1, 3, 12, 8)}),
        ("query", {"query": torch.zeros(1, 4, 12, 8, dtype=torch.int64)}),
        ("key", {"key": torch.randn(1, 2, 11, 8)}),
        ("key", {"key": torch.randn(1, 2, 12, 8).half()}),
        ("value", {"value": torch.randn(1, 1, 12, 8)}),
        ("layout", {"layout": GroupLayout([4], [[7]])}),
        ("layout", {"layout": torch.tensor([[4, 8]])}),
        ("backend", {"backend": "flash"}),
    ],
)
def test_refuses(argument: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(
        zip(("query", "key", "value"), (torch.randn(1, h, 12, 8) for h in (4, 2, 2)), strict=True)
    )
    arguments |= {"layout": GroupLayout([4], [[5, 3]])} | wrong
    with pytest.raises(ValueError, match=f"group_attention: `{argument}`: expected .*, got "):
        group_attention(**arguments)


# merge_attention


def attention_parts(cuts: list[int], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Any], Any]:
    """Leaves query, key, value; results of each part of the keys, and of all keys; some rows are blind to parts."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(2, 4, n, 8, generator=generator, dtype=dtype).requires_grad_() for n in (5, 12, 12)
    )
    seen = torch.rand(2, 1, 5, 12, generator=generator) < 0.5
    seen[0, 0, 1], seen[:, :, 3, :6] = False, False
    ids = torch.randint(-1, 3, (2, 12), generator=generator)

    def attend(keys: slice) -> Any:
        probabilities, lse = attention_matrix(query, key[:, :, keys], seen[..., keys], None)
        return probabilities @ value[:, :, keys], lse, mass_of(probabilities, ids[:, keys], 3, "sum")

    parts = [attend(slice(a, b)) for a, b in itertools.pairwise([0, *cuts, 12])]
    return [query, key, value], parts, attend(slice(None))


def total(results: Any) -> Tensor:
    """A number that depends on all results; an lse of -inf is a constant."""
    out, lse, mass = results
    return (out.sin().sum() + torch.where(lse.isinf(), 0, lse).square().sum() + mass.square().sum()).double()


# One part; two; many, one of them without keys.
@pytest.mark.parametrize("cuts", [[], [5], [2, 2, 6, 7]])
def test_merge_of_parts_is_the_whole(cuts: list[int]) -> None:
    leaves, parts, whole = attention_parts(cuts)
    merged = merge_attention(parts)
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(total(r), leaves, retain_graph=True) for r in (merged, whole)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_merge_is_associative_and_commutative() -> None:
    _, (a, b, c), whole = attention_parts([3, 8])
    for order in ([merge_attention([a, b]), c], [a, merge_attention([c, b])], [c, a, b]):
        for got, expected in zip(merge_attention(order), whole, strict=True):
            torch.testing.assert_close(got, expected)


def test_merge_without_mass_keeps_dtypes() -> None:
    _, parts, whole = attention_parts([5])
    merged = merge_attention([(out.bfloat16(), lse.float()) for out, lse, _ in parts])
    assert merged.mass is None and merged.out.dtype == torch.bfloat16 and merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.out.double(), whole[0], atol=2e-2, rtol=1e-2)


def test_merge_has_the_mass_of_frame_mass() -> None:
    (query, key, value), _, _ = attention_parts([])
    ids = torch.arange(12).expand(2, -1) // 4
    masses = []
    for keys in (slice(0, 7), slice(7, 12)):
        probabilities, lse = attention_matrix(
            query, key[:, :, keys], torch.ones(2, 1, 5, 12, dtype=torch.bool)[..., keys], None
        )
        mass = frame_mass(query, key[:, :, keys], ids[:, keys], num_frames=3, per_head=True)
        masses.append((probabilities @ value[:, :, keys], lse, mass))
    expected = frame_mass(query, key, ids, num_frames=3, per_head=True)
    torch.testing.assert_close(merge_attention(masses).mass, expected)


def test_merge_compiles() -> None:
    _, parts, _ = attention_parts([5])
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(parts), merge_attention(parts), strict=True):
        torch.testing.assert_close(got, expected)


# One change for each thing that parts must agree on.
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("parts", lambda parts: []),
        ("parts", lambda parts: [parts[0], parts[1][:2]]),
        (r"parts\[1\].lse", lambda parts: [parts[0], (parts[1][0], parts[1][1][..., :3], parts[1][2])]),
        (r"parts\[1\].out", lambda parts: [parts[0], (parts[1][0][:, :1], *parts[1][1:])]),
        (r"parts\[0\].mass", lambda parts: [(*parts[0][:2], parts[0][2].mean(1))]),
    ],
)
def test_merge_refuses(argument: str, change: Any) -> None:
    with pytest.raises(ValueError, match=f"merge_attention: `{argument}`: expected .*, got "):
        merge_attention(change(attention_parts([5])[1]))
