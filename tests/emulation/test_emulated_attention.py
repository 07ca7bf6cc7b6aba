"""frame_mass and frame_attention with backend "cuda", on the emulated GPU, against their definition in fp64."""

from typing import Any

import pytest
import torch
from attention_cases import Case, attention_results, case, compare_attention, compare_mass, mass_results, true_lse
from attention_layouts import FRAMES, LAYOUTS, VISIBILITIES
from torch import Tensor

from appo_kernels import frame_attention, frame_mass
from cudasim import Emulator

BF16, FP16 = torch.bfloat16, torch.float16


# More keys than one tile of 64 and fewer than two, so that every layout meets a whole tile, a cut one and the end; rows
# likewise. Every layout and every visibility once; the other pairs are for the slow tests. Both element types in turn:
# what differs between them is one instruction.
PAIRS = [
    pytest.param(layout, seen, marks=() if "interleaved" in layout or seen == "shared prefix" else pytest.mark.slow)
    for layout in LAYOUTS
    for seen in VISIBILITIES
]


@pytest.mark.parametrize(("layout", "visibility"), PAIRS)
def test_layouts(layout: str, visibility: str) -> None:
    example = case(batch=1, heads=(2, 1), rows=70, keys=101, head_dim=64, layout=layout, visibility=visibility)
    dtype = BF16 if len(layout) % 2 else FP16
    compare_attention("cuda", example, dtype)
    compare_mass("cuda", example, dtype, given=True)


# Every head size with and without a remainder in rows and keys; 7 query heads to a key head; one row, one key.
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "heads", "rows", "keys"),
    [(64, (7, 1), 5, 130), (80, (2, 2), 65, 64), (96, (4, 2), 33, 150), (128, (7, 1), 20, 129), (256, (2, 1), 17, 70)],
)
def test_head_sizes(head_dim: int, heads: tuple[int, int], rows: int, keys: int, dtype: torch.dtype) -> None:
    example = case(batch=1, heads=heads, rows=rows, keys=keys, head_dim=head_dim, layout="interleaved")
    gradients = head_dim in (64, 128)
    compare_attention("cuda", example, dtype, gradients=gradients)
    for given in (True, False):
        compare_mass("cuda", example, dtype, given, gradients=gradients, reduction="mean")


# Negative and zero scales are turned into positive ones; per_head and the mean are other ends of the same kernels.
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
def test_options(given: bool, per_head: bool, scale: float) -> None:
    example = case(
        heads=(6, 2), rows=9, keys=70, head_dim=64, layout="unequal", visibility="shared prefix", strided=True
    )
    compare_mass("cuda", example, FP16, given, per_head=per_head, scale=scale, reduction="mean")
    compare_attention("cuda", example, BF16, scale=scale)


def test_one_row_one_key_and_none() -> None:
    compare_attention("cuda", case(rows=1, keys=1, head_dim=64, layout="shuffled", visibility="all"), BF16)
    for rows, keys in ((0, 5), (5, 0)):
        empty = case(rows=rows, keys=keys, head_dim=64, layout="none", visibility="all").to(BF16)
        results = attention_results(frame_attention, empty, gradients=False, backend="cuda")
        assert not results["out"].any() and not results["mass"].any() and results["lse"].isneginf().all()


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16, in rows that are not either."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


def test_any_strides_and_alignment() -> None:
    example = case(heads=(4, 2), rows=20, keys=70, head_dim=64).to(BF16)
    plain = attention_results(frame_attention, example, gradients=False, backend="cuda")
    odd = Case(*(unaligned(t.detach()) for t in example[:3]), *example[3:])
    assert odd.query.data_ptr() % 16
    for name, tensor in attention_results(frame_attention, odd, gradients=False, backend="cuda").items():
        assert torch.equal(tensor, plain[name]), name


def test_bitwise_equal_alone_and_in_a_batch() -> None:
    example = case(batch=3, heads=(4, 2), rows=70, keys=150, head_dim=64, layout="unequal", visibility="left padding")
    example = example.to(BF16)
    whole = attention_results(frame_attention, example, gradients=False, backend="cuda")
    given = frame_mass(
        *example[:2], example.frame_ids, num_frames=FRAMES, lse=whole["lse"], backend="cuda", **example.bounds
    )
    for b in range(3):
        part = Case(*(t.detach()[b : b + 1] for t in example[:4]), {k: v[b : b + 1] for k, v in example.bounds.items()})
        alone = attention_results(frame_attention, part, gradients=False, backend="cuda")
        for name, tensor in alone.items():
            assert torch.equal(tensor[0], whole[name][b]), name
        options: dict[str, Any] = {"num_frames": FRAMES, "backend": "cuda", **part.bounds}
        mass = frame_mass(*part[:2], part.frame_ids, lse=whole["lse"][b : b + 1], **options)
        assert torch.equal(mass[0], given[b])


# A schedule must not show in one bit of the result. Seeds let one warp run far ahead and copies land early or late.
@pytest.mark.parametrize(("head_dim", "seed"), [(64, 1), (64, 2), (128, 3)])
def test_bitwise_equal_under_every_schedule(emulator: Emulator, head_dim: int, seed: int) -> None:
    example = case(batch=1, heads=(2, 1), rows=70, keys=200, head_dim=head_dim, layout="interleaved")

    def run() -> list[Tensor]:
        attention = attention_results(frame_attention, example.to(BF16), backend="cuda")
        mass = mass_results(frame_mass, example.to(FP16), backend="cuda", lse=true_lse(example.to(FP16)))
        return [*attention.values(), *mass.values()]

    regular = run()
    with emulator.schedule(seed):
        scheduled = run()
    for a, b in zip(regular, scheduled, strict=True):
        assert torch.equal(a, b)


# Blocks that visit no tile never wait for what they had begun to load. 256 is the size that keeps its queries there.
@pytest.mark.parametrize("head_dim", [64, 256])
def test_blocks_that_see_nothing(emulator: Emulator, head_dim: int) -> None:
    example = case(batch=1, heads=(2, 1), rows=70, keys=70, head_dim=head_dim, layout="equal", visibility="causal")
    blind = torch.full_like(example.bounds["last_key"], -1)
    for seed in range(1, 7):
        with emulator.schedule(seed):
            results = attention_results(
                frame_attention,
                example._replace(bounds={"last_key": blind}).to(BF16),
                gradients=head_dim == 64,
                backend="cuda",
            )
        assert results.pop("lse").isneginf().all()
        assert all(not tensor.any() for tensor in results.values())


# Every head size that is built: each has a layout of its own in shared memory.
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_no_bank_conflicts(emulator: Emulator, head_dim: int) -> None:
    """Tiles are laid out so that ldmatrix and cp.async never wait for a bank, in any pass."""
    example = case(batch=1, heads=(1, 1), rows=64, keys=128, head_dim=head_dim, visibility="all").to(BF16)
    emulator.counters()
    attention_results(frame_attention, example, gradients=head_dim in (64, 128), backend="cuda")
    mass_results(frame_mass, example, gradients=False, backend="cuda", lse=true_lse(example))
    counted = emulator.counters()
    assert counted["ldmatrix"] > 0 and counted["async_copies"] > 0
    assert counted["bank_conflicts"] == 0
