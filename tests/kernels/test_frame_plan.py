"""FramePlan: the results of the arguments it was made of, worked out once; groups of a row on their own frames."""

from typing import Any

import pytest
import torch
from attention_cases import case, small_tiles
from attention_layouts import FRAMES, VISIBILITIES
from backends import served
from torch import Tensor

from appo_kernels import FramePlan, GroupLayout, frame_attention, frame_mass, group_attention
from appo_kernels.attention import torch_tiles
from appo_kernels.ops.frame_mass.op import OP

SERVED = served(OP, head_dim=32)
GROUPS = GroupLayout([14, 9, 3], [[4, 0, 6], [5], []])


def packed(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """query, key, value of a packed row, and its frames: three groups that number them alike, unequal ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, GROUPS.tokens, 32, generator=generator) for heads in (4, 2, 2)]
    frame_ids = torch.full((1, GROUPS.tokens), -1)
    for group, lengths in zip(GROUPS.groups, ([3, 1, 4], [2, 2], [1]), strict=True):
        run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        frame_ids[0, group.prompt.start + 1 : group.prompt.start + 1 + len(run)] = run
    return [t.to(device, dtype).requires_grad_() for t in tensors], frame_ids.to(device)


# Visibilities differ in which bounds they give; frames of other tiles than neighbours, and in no order.
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("layout", ["unequal", "scattered"])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_results_of_its_arguments(
    backend: str, device: str, layout: str, visibility: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    example = case(layout=layout, visibility=visibility, device=device).to(torch.float32)
    plan = FramePlan.build(example.frame_ids, FRAMES, **example.bounds)
    for reduction in ("sum", "mean"):
        expected = frame_attention(
            *example[:4], num_frames=FRAMES, reduction=reduction, backend=backend, **example.bounds
        )
        wanted = torch.autograd.grad(expected.mass.square().sum() + expected.out.sum(), example[:3])
        for _ in range(2):  # the second time from what is kept
            got = frame_attention(*example[:3], plan=plan, reduction=reduction, backend=backend)
            found = torch.autograd.grad(got.mass.square().sum() + got.out.sum(), example[:3])
            assert all(torch.equal(a, b) for a, b in zip((*got, *found), (*expected, *wanted), strict=True))
            mass = frame_mass(*example[:2], plan=plan, reduction=reduction, backend=backend, lse=got.lse)
            alone = frame_mass(
                *example[:2], example.frame_ids, num_frames=FRAMES, reduction=reduction, backend=backend,
                lse=expected.lse, **example.bounds,
            )  # fmt: skip
            assert torch.equal(mass, alone)


def test_layers_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    example, calls = case(batch=2), []
    original = torch_tiles.key_tiles
    monkeypatch.setattr(torch_tiles, "key_tiles", lambda *a, **k: calls.append(1) or original(*a, **k))
    plan = FramePlan.build(example.frame_ids, FRAMES, **example.bounds)
    for _ in range(3):
        frame_mass(*example[:2], plan=plan)
    assert len(calls) == 2, "one for each sequence"
    frame_mass(*example[:2], example.frame_ids, num_frames=FRAMES, **example.bounds)
    assert len(calls) == 4, "nothing is kept without a plan"


# "mean" divides by the keys of a frame, which are those of a group; "sum" does not ask.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_groups_count_their_own_frames(backend: str, device: str, reduction: str) -> None:
    """Of a packed row: out and lse of group_attention, and of each response the mass of prompt and response alone."""
    tensors, frame_ids = packed(device)
    plan = FramePlan.of_layout(frame_ids, 3, GROUPS)
    got = frame_attention(*tensors, plan=plan, reduction=reduction, backend=backend)
    out, lse = group_attention(*tensors, GROUPS, backend=backend)
    torch.testing.assert_close(got.out, out, atol=2e-6, rtol=0)
    torch.testing.assert_close(got.lse, lse, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        frame_mass(*tensors[:2], lse=lse, plan=plan, reduction=reduction, backend=backend), got.mass, atol=1e-6, rtol=0
    )
    for group in GROUPS.groups:
        for response in group.responses or (slice(0, 0),):
            chosen = torch.cat([torch.arange(s.start, s.stop) for s in (group.prompt, response)]).to(device)
            own = [x[:, :, chosen] for x in tensors[:2]]
            causal = torch.arange(len(chosen), device=device)[None]
            alone = frame_mass(
                *own, frame_ids[:, chosen], num_frames=3, last_key=causal, reduction=reduction, backend=backend
            )
            torch.testing.assert_close(got.mass[:, chosen], alone, atol=1e-6, rtol=0)


def test_chosen_rows_and_heads() -> None:
    tensors, frame_ids = packed()
    lse = group_attention(*tensors, GROUPS)[1]
    whole = frame_mass(*tensors[:2], lse=lse, plan=FramePlan.of_layout(frame_ids, 3, GROUPS), per_head=True)
    rows = torch.tensor([30, 2, 17, 40, 13])  # in any order, of any group
    plan = FramePlan.of_layout(frame_ids, 3, GROUPS, rows=rows)
    total = torch.ones(1, 4, 5, 3)
    found = frame_mass(
        tensors[0][:, :, rows], tensors[1], lse=lse[:, :, rows], plan=plan, per_head=True, out=total.clone()
    )
    torch.testing.assert_close(found, total + whole[:, :, rows], atol=1e-6, rtol=0)


def test_gradients_through_groups() -> None:
    tensors, frame_ids = packed(dtype=torch.float64)
    tensors = [x[..., :3].detach().requires_grad_() for x in tensors]
    plan = FramePlan.of_layout(frame_ids, 3, GROUPS)
    assert torch.autograd.gradcheck(
        lambda *t: frame_attention(*t, plan=plan, reduction="mean"), tensors, fast_mode=True
    )


def test_compiles_without_graph_breaks() -> None:
    example = case(visibility="shared prefix").to(torch.float32)
    plan = FramePlan.build(example.frame_ids, FRAMES, **example.bounds)

    def mass(query: Tensor, key: Tensor) -> Tensor:
        return frame_mass(2 * query, key, plan=plan)

    compiled = torch.compile(mass, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*example[:2]), mass(*example[:2]))


# One call for each thing that a plan and the arguments beside it can disagree on.
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("frame_mass: `frame_ids`", lambda t, ids: frame_mass(*t[:2])),
        ("frame_mass: `num_frames`", lambda t, ids: frame_mass(*t[:2], ids)),
        ("frame_mass: `plan`", lambda t, ids: frame_mass(*t[:2], ids, plan=FramePlan.build(ids, 3))),
        (
            "frame_mass: `plan`",
            lambda t, ids: frame_mass(t[0][:, :, :3], t[1], plan=FramePlan.of_layout(ids, 3, GROUPS)),
        ),
        ("frame_mass: `frame_ids`", lambda t, ids: frame_mass(*t[:2], plan=FramePlan.build(ids, 2))),
        ("FramePlan: `frame_ids`", lambda t, ids: FramePlan.of_layout(ids[:, :9], 3, GROUPS)),
        ("FramePlan: `frame_ids`", lambda t, ids: FramePlan.of_layout(ids.abs(), 3, GROUPS)),
        ("FramePlan: `rows`", lambda t, ids: FramePlan.of_layout(ids, 3, GROUPS, rows=torch.tensor([99]))),
        ("FramePlan: `last_key`", lambda t, ids: FramePlan.build(ids, 3, last_key=torch.zeros(3))),
    ],
)
def test_refuses(argument: str, call: Any) -> None:
    tensors, frame_ids = packed()
    with pytest.raises(ValueError, match=f"{argument}: expected .*, got "):
        call([t.detach() for t in tensors], frame_ids)


def test_bounds_beyond_31_bits_do_not_wrap():
    """The largest int64 is no key, with a plan as without one: it must not become -1, which would hide every key."""
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16)
    frame_ids = torch.tensor([[0, 0, 1, 1, -1]])
    last_key = torch.full((1, 3), torch.iinfo(torch.int64).max)
    plan = FramePlan.build(frame_ids, 2, last_key=last_key)
    with pytest.raises(ValueError, match="`last_key`: expected numbers up to 4"):
        frame_mass(query, key, plan=plan, backend="torch")
    with pytest.raises(ValueError, match="`frame_ids`"):
        frame_mass(query, key, plan=FramePlan.build(frame_ids + 2**32, 2), backend="torch")
