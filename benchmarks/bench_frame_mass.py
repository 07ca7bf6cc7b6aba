"""frame_mass, beside its matrix product alone, the attention it rides on, and four other ways to the same numbers."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import frame_mass
from appo_kernels.dtypes import dtype_name
from appo_kernels.ops.frame_mass import reference
from appo_kernels.testing import assert_as_good_as
from benchmarks import inputs_attention as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_ATTENTION, AttentionShape, attention_shapes

OP = "frame_mass"
SHAPES, DEFAULT = attention_shapes, DEFAULT_ATTENTION
TOO_LARGE = "attention over all rows takes minutes, or its matrix does not fit"


def case(shape: AttentionShape, dtype: torch.dtype, device: str) -> Case:
    work = peers.attention_inputs(shape, dtype, device)
    lse = peers.flash(work)[1][:, :, -shape.rows :] if work.whole else exact_lse(work)
    usable, skipped = own_backends(OP, device, dtype, shape.head_dim)
    entries = []

    def ours(backend: str, given: Tensor | None) -> Tensor:
        return frame_mass(
            work.rows, work.key, work.frame_ids, num_frames=shape.frames, lse=given, last_key=work.last_key,
            backend=backend,
        )  # fmt: skip

    for backend in usable:
        entries.append(Entry(f"ours, {backend}, lse given", "ours", partial(ours, backend, lse)))
    for backend in usable:
        entries.append(Entry(f"ours, {backend}, lse computed", "ours", partial(ours, backend, None)))
    entries.append(Entry("bound: matrix product", "bound", peers.matrix_product(work)))
    masses = {c.name: c.run for c in entries if c.role == "ours"}

    def add(name: str, run, *, possible: bool, mass=None) -> None:
        if possible:
            entries.append(Entry(name, "peer", run))
            if mass is not None:
                masses[name] = mass
        else:
            skipped[name] = TOO_LARGE

    add("flash attention alone, all rows", partial(peers.flash, work), possible=work.whole)
    replay = partial(peers.naive_replay, work, lse)
    add("plain torch from the lse", replay, possible=work.row_matrix, mass=replay)
    one_hot = partial(peers.one_hot_values, work)
    add("sdpa with one-hot values", one_hot, possible=work.row_matrix, mass=one_hot)
    eager = partial(peers.eager, work)
    add("eager attention and its matrix", eager, possible=work.matrix, mass=lambda: eager()[1])
    flex, reason = peers.flex(work) if work.row_matrix else (None, TOO_LARGE)
    if flex:
        add("FlexAttention, one-hot values", flex, possible=True, mass=flex)
    else:
        skipped["FlexAttention, one-hot values"] = reason
    verify = partial(check, work, masses)
    return Case(OP, shape.name, dtype_name(dtype), shape.describe(), device, verify, entries, skipped)


def exact_lse(work: peers.Attention) -> Tensor:
    """Of the response rows, in blocks of keys, where attention over all rows is out of reach."""
    parts = []
    rows, scale = work.rows.float(), work.shape.head_dim**-0.5
    group = work.shape.heads // work.shape.key_heads
    for start in range(0, work.shape.keys, 4096):
        keys = work.key[:, :, start : start + 4096].float().repeat_interleave(group, 1)
        scores = rows @ keys.transpose(-1, -2) * scale
        positions = torch.arange(start, start + keys.shape[2], device=scores.device)
        parts.append(scores.masked_fill_(positions > work.last_key[:, None, :, None], -torch.inf).logsumexp(-1))
    return torch.stack(parts).logsumexp(0)


def check(work: peers.Attention, masses: dict) -> None:
    """Everybody's mass on the last rows of the first sequence, against the definition in fp64."""
    shape = work.shape
    rows = max(8, min(48, 75_000_000 // (shape.heads * shape.keys)))  # their fp64 matrix takes 0.6 GB
    part = slice(-min(rows, shape.rows), None)
    query, key = work.rows[:1, :, part], work.key[:1]
    arguments = {"num_frames": shape.frames, "last_key": work.last_key[:1, part]}
    exact = reference.frame_mass(query.double(), key.double(), work.frame_ids[:1], **arguments)
    plain = reference.frame_mass(query, key, work.frame_ids[:1], **arguments)
    for name, mass in masses.items():
        got = mass()[:1, part]
        # The peers compute in the model's dtype, or sum in other orders: what they lose is theirs to lose.
        slack = 1e-6 if name.startswith("ours") else 1e-2
        assert_as_good_as(got, exact, plain, atol=slack, name=f"{OP}, {name}")


def cases(shapes: list[AttentionShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        for dtype in peers.dtypes(shape, device):
            yield case(shape, dtype, device)
