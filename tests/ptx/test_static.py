"""The static gate: what the attention kernels may cost, and that the committed table is what the code gives."""

import pytest
import triton

from benchmarks import sass, static

COMMITTED = static.RESULT


def check(entries: list[static.Entry]) -> None:
    faults = [fault for entry in entries for fault in entry.faults()]
    overheads = list(static.mass_overhead(entries))
    assert overheads, "attention with and without the mass was not compiled"
    for _, ratio, over in overheads:
        assert ratio > 1.0  # the mass is not free: two stores at least
        faults += over
    assert not faults
    text = COMMITTED.read_text()
    if f"Triton {triton.__version__}" in text:  # another compiler gives other figures
        for line in static.table(entries).splitlines()[2:]:
            assert line in text, f"{COMMITTED.name} is not what the code gives; run python -m benchmarks.static"


def test_main_architecture():
    """bf16 and the head size of the models, sm_80: the code that the simulator executes."""
    check(list(static.attention_entries(128, "bf16", 80, gradients=False)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_all_kernels(arch):
    check(list(static.attention_entries(128, "bf16", arch)))


def test_gate_sees_what_it_forbids():
    """Spills, too much shared memory, and a mass that costs a shuffle."""
    plain = sass.Code(255, 3, sass.Counter({"all": 100, "tensor": 8, "exp": 4, "shuffle": 2}))
    costly = sass.Code(200, 0, sass.Counter({"all": 120, "tensor": 8, "exp": 4, "shuffle": 3}))
    entries = [
        static.Entry("online attention", "bf16", 128, 80, "128x32", 8, 200 << 10, plain),
        static.Entry("online attention + mass", "bf16", 128, 80, "128x32", 8, 1 << 10, costly),
    ]
    assert len(entries[0].faults()) == 2 and not entries[1].faults()
    ((_, ratio, over),) = static.mass_overhead(entries)
    assert ratio == 1.2 and len(over) == 2
    assert (
        costly.occupancy(80, 256, 1 << 10) == 1 and sass.Code(64, 0, sass.Counter()).occupancy(80, 256, 40 << 10) == 4
    )
