"""group_attention, forward and backward, beside separate sequences, a dense mask, FlexAttention with a block mask, and
verl's PrefixGrouper (`pip install prefix-grouper`), with torch's attention in flash-attn's place.

The lower bound is counted in pairs: torch's flash attention, without a mask, of as many query rows on as many keys as
make the same number of query-key pairs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from appo_kernels import GroupLayout, group_attention
from appo_kernels.dtypes import dtype_name
from appo_kernels.ops.group_attention import reference
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_GROUPS, GroupShape, group_shapes

OP = "group_attention"
SHAPES, DEFAULT = group_shapes, DEFAULT_GROUPS


def case(shape: GroupShape, dtype: torch.dtype, device: str) -> Case:
    layout = GroupLayout([shape.prompt], [[shape.length] * shape.responses])
    generator = torch.Generator().manual_seed(0)

    def leaves(batch: int, tokens: int, keys: int | None = None) -> list[Tensor]:
        sizes = [(shape.heads, tokens), *[(shape.key_heads, keys or tokens)] * 2]
        return [
            torch.randn(batch, *size, shape.head_dim, generator=generator).to(device, dtype).requires_grad_()
            for size in sizes
        ]

    packed = leaves(1, layout.tokens)
    upstream = torch.randn(packed[0].shape, generator=generator).to(device, dtype)
    separate = leaves(shape.responses, shape.prompt + shape.length)
    limit = leaves(1, layout.tokens, -(-layout.pairs // layout.tokens))
    seen = reference.visible(layout).to(device)

    def both(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None) -> tuple[Tensor, ...]:
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out) if grad is None else grad)

    def ours(backend: str, *inputs: Tensor) -> Tensor:
        return group_attention(*inputs, layout, backend=backend)[0]

    usable, skipped = own_backends(OP, device, dtype, shape.head_dim, needs_grad=True)
    full = partial(scaled_dot_product_attention, enable_gqa=True)
    causal = partial(full, is_causal=True)
    dense = partial(full, attn_mask=seen)
    grouper = prefix_grouper(layout)
    flex, reason = flex_attention(seen, packed)
    checked = {f"ours, {name}": partial(both, partial(ours, name), packed, upstream) for name in usable}
    entries = [Entry(name, "ours", run) for name, run in checked.items()]
    entries.append(Entry("separate flash", "peer", partial(both, causal, separate)))
    entries.append(Entry("dense mask, sdpa", "peer", partial(both, dense, packed, upstream)))
    if grouper is None:
        skipped["PrefixGrouper, sdpa"] = "the package prefix-grouper is not installed"
    else:
        checked["PrefixGrouper"] = partial(both, grouper, packed, upstream)
        entries.append(Entry("PrefixGrouper, sdpa", "peer", checked["PrefixGrouper"]))
    if flex is None:
        skipped["FlexAttention, block mask"] = reason
    else:
        entries.append(Entry("FlexAttention, block mask", "peer", partial(both, flex, packed, upstream)))
    entries.append(Entry("bound: flash, as many pairs", "bound", partial(both, full, limit)))
    verify = partial(check, shape, dtype, layout, checked, packed, upstream, dense)
    return Case(OP, shape.name, dtype_name(dtype), shape.describe(), device, verify, entries, skipped)


def prefix_grouper(layout: GroupLayout) -> Callable[..., Tensor] | None:
    """Prompt and responses taken apart, the prompt's keys repeated before each response's, and put together again."""
    try:
        from prefix_grouper import PrefixGrouper
        from prefix_grouper.forward import AttentionForward
    except ImportError:
        return None

    def causal(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        rows, keys = query.shape[2], key.shape[2]  # lengths are equal: no padding
        if rows == keys:
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
        seen = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    attend, grouper = AttentionForward(causal), PrefixGrouper(layout.lengths.tolist())
    return lambda *inputs: attend(grouper, *inputs).transpose(1, 2)


def flex_attention(seen: Tensor, inputs: list[Tensor]) -> tuple[Any, str]:
    """FlexAttention compiled for the visibility of the group, or None and why it does not run."""
    from torch.nn.attention import flex_attention as flex

    tokens = len(seen)
    try:
        mask = flex.create_block_mask(
            lambda b, h, q, kv: seen[q, kv], None, None, tokens, tokens, device=str(seen.device)
        )
        compiled = partial(torch.compile(flex.flex_attention, dynamic=False), block_mask=mask, enable_gqa=True)
        torch.autograd.grad(compiled(*inputs).sum(), inputs)
    except Exception as error:  # whatever the compiler or the kernel refuses, the table says so
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return compiled, ""


def check(
    shape: GroupShape,
    dtype: torch.dtype,
    layout: GroupLayout,
    runs: dict[str, Callable[[], tuple[Tensor, ...]]],
    packed: list[Tensor],
    upstream: Tensor,
    dense: Callable[..., Tensor],
) -> None:
    """Output and gradients against torch's attention with a dense mask in fp64, within its own error in ``dtype``."""
    wide = [x.detach().double().requires_grad_() for x in packed]
    exact, plain = (
        (out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype)))
        for inputs in (wide, packed)
        for out in [dense(*inputs)]
    )
    for name, run in runs.items():
        for what, got, true, theirs in zip(("out", "dq", "dk", "dv"), run(), exact, plain, strict=True):
            assert_as_good_as(got, true, theirs, factor=GRADIENT_FACTOR, name=f"{OP}, {what}, {name}")


def cases(shapes: list[GroupShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
            yield case(shape, dtype, device)
