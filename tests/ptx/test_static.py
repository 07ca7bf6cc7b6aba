"""The static gate: what the kernels may cost, and that the committed table is what the code gives."""

from dataclasses import replace

import pytest
import triton

from appo_kernels.triton_launch import BACKWARD, FORWARD, tiling
from benchmarks.inspection import sass, static

COMMITTED = static.RESULT


def check(entries: list[static.Entry], *, overheads: int) -> None:
    faults = [fault for entry in entries for fault in entry.faults()]
    found = list(static.mass_overhead(entries))
    assert len(found) == overheads  # attention with and without the mass was compiled
    for _, ratio, over in found:
        assert ratio > 1.0  # the mass is not free: two stores at least
        faults += over
    assert not faults
    text = COMMITTED.read_text()
    if f"Triton {triton.__version__}" in text:  # another compiler gives other figures
        for line in static.table(entries).splitlines()[2:]:
            assert line in text, (
                f"{COMMITTED.name} is not what the code gives; run python -m benchmarks.inspection.static"
            )


def test_main_architecture():
    """bf16 and the head size of the models, sm_80: the code that the simulator executes."""
    check(list(static.attention_entries(128, "bf16", 80, gradients=False)), overheads=1)


def test_kernels_on_logits():
    """On the architecture that most of them will run on."""
    entries = list(static.logits_entries(90))
    check(entries, overheads=0)
    assert {entry.kernel.split()[0] for entry in entries} == {"fold", "gradient", "slots", "terms"}
    assert {entry.dtype for entry in entries} == {"fp32", "bf16"}


# Every head size and dtype: half an hour of one core where nothing is cached.
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", static.DTYPES)
@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_all_attention_kernels(arch, dtype):
    entries = [entry for head_dim in static.HEAD_DIMS for entry in static.attention_entries(head_dim, dtype, arch)]
    check(entries, overheads=len(static.HEAD_DIMS))


# Every architecture that has a table.
@pytest.mark.slow
@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_all_kernels_on_logits(arch):
    check(list(static.logits_entries(arch)), overheads=0)


def test_gate_sees_what_it_forbids():
    """Spills, too much shared memory, no block at all, and a mass that costs a shuffle."""
    plain = sass.Code(255, 3, sass.Counter({"all": 100, "tensor": 8, "exp": 4, "shuffle": 2}))
    costly = sass.Code(200, 0, sass.Counter({"all": 120, "tensor": 8, "exp": 4, "shuffle": 3}))
    entries = [
        static.Entry("online attention", "bf16", 128, 80, "128x32", 8, 200 << 10, plain),
        static.Entry("online attention + mass", "bf16", 128, 80, "128x32", 8, 1 << 10, costly),
    ]
    assert [fault.split(": ")[1][:9] for fault in entries[0].faults()] == ["3 instruc", "204800 by", "no block "]
    assert not entries[1].faults()
    ((_, ratio, over),) = static.mass_overhead(entries)
    assert ratio == 1.2 and len(over) == 2
    assert (
        costly.occupancy(80, 256, 1 << 10) == 1 and sass.Code(64, 0, sass.Counter()).occupancy(80, 256, 40 << 10) == 4
    )


def test_configurations():
    """Every call that is served has one. Newer architectures inherit, 12.x from 8.0; a row tile holds a whole group."""
    for table in (FORWARD, BACKWARD):
        for element in (2, 4):
            for head_dim in (8, 32, 33, 80, 128, 129, 256):
                choices = {arch: tiling(table, arch, element, head_dim, 7) for arch in (80, 86, 89, 90, 100, 103, 120)}
                assert choices[80] == choices[86] == choices[89] == choices[120]
                assert choices[100] == choices[103]
                assert tiling(table, 80, element, head_dim, 140).rows == 256
    blackwell = tiling(FORWARD, 100, 2, 128, 7)
    assert replace(blackwell, ahead_partial=True) == tiling(FORWARD, 90, 2, 96, 7) != tiling(FORWARD, 80, 2, 128, 7)
    assert tiling(FORWARD, 100, 2, 256, 7) != tiling(FORWARD, 100, 2, 128, 7)
