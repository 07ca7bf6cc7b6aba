"""frame_attention, one pass for out, lse and mass, beside flash attention alone and eager attention with its matrix."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from appo_kernels import frame_attention, frame_mass
from appo_kernels.dtypes import dtype_name
from appo_kernels.ops.frame_attention import reference
from appo_kernels.testing import assert_as_good_as
from benchmarks import inputs_attention as peers
from benchmarks.harness import Case, Entry, own_backends
from benchmarks.shapes import DEFAULT_ATTENTION, AttentionShape, attention_shapes

OP = "frame_attention"
SHAPES, DEFAULT = attention_shapes, DEFAULT_ATTENTION


def case(shape: AttentionShape, dtype: torch.dtype, device: str) -> Case | None:
    """None where attention over all rows takes minutes."""
    work = peers.attention_inputs(shape, dtype, device)
    if not work.whole:
        return None
    every_key = torch.arange(shape.keys, dtype=torch.int32, device=device).expand(shape.batch, -1)
    usable, skipped = own_backends(OP, device, dtype, shape.head_dim)

    def ours(backend: str) -> tuple[Tensor, Tensor]:
        result = frame_attention(
            work.query, work.key, work.value, work.frame_ids, num_frames=shape.frames, last_key=every_key,
            backend=backend,
        )  # fmt: skip
        return result.out, result.mass[:, -shape.rows :]

    def flash_and_replay() -> tuple[Tensor, Tensor]:
        """Recording where attention returns its lse: attention as it is, and the rows that matter again."""
        out, lse = peers.flash(work)
        mass = frame_mass(
            work.rows, work.key, work.frame_ids, num_frames=shape.frames, lse=lse[:, :, -shape.rows :],
            last_key=work.last_key,
        )  # fmt: skip
        return out, mass

    runs = {f"ours, {name}, fused": partial(ours, name) for name in usable}
    runs["ours, flash and frame_mass"] = flash_and_replay
    entries = [Entry(name, "ours", run) for name, run in runs.items()]
    entries.append(Entry("bound: flash attention", "bound", partial(peers.flash, work)))
    if work.matrix:
        runs["eager attention and its matrix"] = partial(peers.eager, work)
        entries.append(Entry("eager attention and its matrix", "peer", partial(peers.eager, work)))
    else:
        skipped["eager attention and its matrix"] = "its matrix does not fit"
    verify = partial(check, work, runs)
    return Case(OP, shape.name, dtype_name(dtype), shape.describe(), device, verify, entries, skipped)


def check(work: peers.Attention, runs: dict, rows: int = 48) -> None:
    """Output and mass of the last rows of the first sequence, against the definition in fp64."""
    shape = work.shape
    part = slice(-min(rows, shape.rows), None)
    operands = work.query[:1, :, part], work.key[:1], work.value[:1]
    arguments = {"num_frames": shape.frames, "last_key": work.last_key[:1, part]}
    exact = reference.frame_attention(*(t.double() for t in operands), work.frame_ids[:1], **arguments)
    plain = reference.frame_attention(*operands, work.frame_ids[:1], **arguments)
    for name, run in runs.items():
        out, mass = run()
        slack = 1e-6 if name.startswith("ours") else 1e-2
        assert_as_good_as(mass[:1, part], exact.mass, plain.mass, atol=slack, name=f"{OP}, mass, {name}")
        assert_as_good_as(out[:1, :, part], exact.out, plain.out, atol=1e-2, name=f"{OP}, out, {name}")


def cases(shapes: list[AttentionShape], device: str) -> Iterator[Case]:
    for shape in shapes:
        for dtype in peers.dtypes(shape, device):
            found = case(shape, dtype, device)
            if found is not None:
                yield found
