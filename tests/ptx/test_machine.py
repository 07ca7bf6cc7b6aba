"""The simulator as a test instrument: what a real GPU lets pass, or fails on by chance, must be an error here."""

import numpy as np
import pytest

import ptxsim
from ptxsim import memory

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
PROLOGUE = """
    ld.param.u64 %in, [source]; ld.param.u64 %out, [result];
    mov.u32 %t, %tid.x; mov.u32 %w0, %ctaid.x; mov.u32 %w1, %ntid.x; mad.lo.s32 %w0, %w0, %w1, %t;
    mul.wide.u32 %d0, %w0, 4; add.s64 %in, %in, %d0; add.s64 %out, %out, %d0;
"""


def run(
    body: str, source: np.ndarray, blocks: int = 1, threads: int = 128, seed: int | None = None, shared: int = 0
) -> np.ndarray:
    text = f"""{HEADER}.extern .shared .align 16 .b8 dynamic[];
    .visible .entry k(.param .u64 source, .param .u64 result) {{
    .reg .u64 %in, %out, %d<8>; .reg .b32 %t, %w<16>; .reg .pred %q<8>; .reg .f32 %f<8>; {PROLOGUE} {body} ret; }}"""
    out = np.zeros(blocks * threads, source.dtype)
    ptxsim.launch(ptxsim.parse(text), (blocks, 1, 1), (threads, 1, 1), [source, out], shared_bytes=shared, seed=seed)
    return out


REVERSE = """
    .shared .align 16 .b8 buffer[512];
    mov.u32 %w2, buffer; shl.b32 %w3, %t, 2; add.s32 %w3, %w2, %w3;
    ld.global.b32 %w4, [%in]; st.shared.b32 [%w3], %w4;
    {barrier}
    sub.s32 %w5, 127, %t; shl.b32 %w5, %w5, 2; add.s32 %w5, %w2, %w5;
    ld.shared.b32 %w6, [%w5]; st.global.b32 [%out], %w6;
"""
DATA = np.arange(128, dtype="f4")


# The regular schedule and three in which warps run far apart.
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_barrier_orders_the_block(seed):
    np.testing.assert_array_equal(run(REVERSE.format(barrier="bar.sync 0;"), DATA, seed=seed), DATA[::-1])


def test_a_missing_barrier_is_seen():
    """Lockstep hides it; a warp that runs ahead reads NaN."""
    missing = REVERSE.format(barrier="")
    caught = [seed for seed in range(8) if np.isnan(run(missing, DATA, seed=seed)).any()]
    assert len(caught) == 8


def test_a_missing_second_barrier_is_seen():
    """Rounds through one buffer: without a barrier between them a fast warp overwrites what a slow one still reads."""
    rounds = """
    .shared .align 16 .b8 buffer[512];
    mov.u32 %w2, buffer; shl.b32 %w3, %t, 2; add.s32 %w3, %w2, %w3;
    sub.s32 %w5, 127, %t; shl.b32 %w5, %w5, 2; add.s32 %w5, %w2, %w5;
    ld.global.f32 %f0, [%in]; mov.u32 %w7, 0; mov.f32 %f1, 0f00000000;
    $again:
    st.shared.f32 [%w3], %f0; bar.sync 0; ld.shared.f32 %f2, [%w5]; add.f32 %f1, %f1, %f2; add.f32 %f0, %f0, 0f42C80000;
    {second}
    add.s32 %w7, %w7, 1; setp.lt.s32 %q0, %w7, 3; @%q0 bra $again;
    st.global.f32 [%out], %f1;
    """
    want = 3 * DATA[::-1] + 300
    for seed in range(6):
        np.testing.assert_array_equal(run(rounds.format(second="bar.sync 0;"), DATA, seed=seed), want)
    assert any((run(rounds.format(second=""), DATA, seed=seed) != want).any() for seed in range(6))


COPY = """
    .shared .align 16 .b8 buffer[512];
    mov.u32 %w2, buffer; shl.b32 %w3, %t, 2; add.s32 %w3, %w2, %w3;
    cp.async.ca.shared.global [%w3], [%in], 4; cp.async.commit_group;
    {wait} bar.sync 0;
    xor.b32 %w4, %t, 1; shl.b32 %w4, %w4, 2; add.s32 %w4, %w2, %w4; ld.shared.b32 %w6, [%w4]; st.global.b32 [%out], %w6;
"""


def test_an_asynchronous_copy_lands_when_it_is_waited_for():
    np.testing.assert_array_equal(run(COPY.format(wait="cp.async.wait_group 0;"), DATA), DATA[np.arange(128) ^ 1])
    assert np.isnan(run(COPY.format(wait=""), DATA)).all()
    assert np.isnan(run(COPY.format(wait="cp.async.wait_group 1;"), DATA)).all()  # one group too few


def test_uninitialised_memory_and_registers_are_nan():
    shared = "mov.u32 %w5, dynamic; ld.shared.f32 %f0, [%w5]; st.global.f32 [%out], %f0;"
    assert np.isnan(run(shared, DATA, shared=64)).all()
    assert np.isnan(run("st.global.f32 [%out], %f7;", DATA)).all()


# Programs that a GPU would run to wrong numbers, or not at all, each with the words of its error.
FAULTS = {
    "behind the array": ("ld.global.b32 %w4, [%in+4];", "out of bounds"),
    "before the array": ("ld.global.b32 %w4, [%in+-4];", "out of bounds"),
    "misaligned": ("ld.global.v2.b32 {%w4, %w5}, [%in];", "misaligned"),
    "shared": ("mov.u32 %w5, dynamic; st.shared.b32 [%w5+64], %t;", "out of bounds"),
    "division": ("div.u32 %w4, %t, 0;", "division by zero"),
    "unknown opcode": ("multimem.red %w4;", "opcode 'multimem'"),
    "unknown modifier": ("ld.global.frobnicate.b32 %w4, [%in];", "modifier frobnicate"),
    "divergent collective": ("setp.lt.u32 %q0, %t, 3; @%q0 ret; bar.sync 0; bra $x; $x: bar.sync 1, 256;", "deadlock"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_errors(fault):
    body, message = FAULTS[fault]
    with pytest.raises((IndexError, NotImplementedError, RuntimeError, ZeroDivisionError), match=message):
        run(body, DATA, shared=64)


def test_lanes_that_disagree_forever_are_a_deadlock():
    """A warp-wide instruction in a branch that only some lanes take, with a barrier on the other side."""
    body = """setp.lt.u32 %q0, %t, 16; @%q0 bra $few; bar.sync 0; bra $end;
    $few: shfl.sync.bfly.b32 %w4, %t, 1, 31, 0xffffffff; bar.sync 0; $end:"""
    with pytest.raises(RuntimeError, match="deadlock"):
        run(body, DATA)


# The regular schedule and two in which warps run far apart.
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_divergent_lanes_meet_again(seed):
    """Loops of different length per lane, then a shuffle that needs the whole warp."""
    body = """
    and.b32 %w4, %t, 7; mov.u32 %w5, 0;
    $loop: setp.ge.s32 %q0, %w5, %w4; @%q0 bra $done; add.s32 %w5, %w5, 1; bra.uni $loop;
    $done: shfl.sync.bfly.b32 %w6, %w5, 1, 31, 0xffffffff; cvt.rn.f32.u32 %f0, %w6; st.global.f32 [%out], %f0;"""
    np.testing.assert_array_equal(run(body, DATA, seed=seed), (np.arange(128) ^ 1) & 7)


def test_blocks_are_independent_and_all_run():
    source = np.arange(100 * 64, dtype="f4")
    body = "ld.global.f32 %f0, [%in]; add.f32 %f0, %f0, %f0; st.global.f32 [%out], %f0;"
    for seed in (None, 3):
        np.testing.assert_array_equal(run(body, source, blocks=100, threads=64, seed=seed), 2 * source)


def test_pointers_into_one_array_see_each_other():
    text = f"""{HEADER}.visible .entry k(.param .u64 a, .param .u64 b, .param .f32 c) {{
    .reg .u64 %a, %b; .reg .f32 %f<2>; .reg .u32 %t; .reg .u64 %d;
    ld.param.u64 %a, [a]; ld.param.u64 %b, [b]; ld.param.f32 %f0, [c]; mov.u32 %t, %tid.x; mul.wide.u32 %d, %t, 4;
    add.s64 %a, %a, %d; add.s64 %b, %b, %d; ld.global.f32 %f1, [%a];
    mul.f32 %f1, %f1, %f0; st.global.f32 [%b], %f1; ret; }}"""
    array = np.arange(64, dtype="f4")
    ptxsim.launch(ptxsim.parse(text), (1, 1, 1), (32, 1, 1), [array, ptxsim.Pointer(array, 128), 0.5])
    np.testing.assert_array_equal(array[32:], np.arange(32) * np.float32(0.5))
    with pytest.raises(ValueError, match="contiguous"):
        ptxsim.launch(ptxsim.parse(text), (1, 1, 1), (32, 1, 1), [array[::2], array, 0.5])


def test_large_arrays_are_copied_by_pages(monkeypatch):
    """Two arrays that are too large to copy, beside one that is not: only what is touched moves, in both directions."""
    monkeypatch.setattr(memory, "LARGE", 1 << 16)
    source, size = np.arange(1 << 15, dtype="f4"), (1 << 15) * 4
    body = (
        "ld.global.f32 %f0, [%in+{0}]; add.f32 %f0, %f0, %f0; st.global.f32 [%in+{0}], %f0; st.global.f32 [%out], %f0;"
    )
    for far in (0, 4096 - 256, size - 512):  # at the start, across two pages, at the very end
        values = source.copy()
        want = 2 * source[far // 4 :][:128]
        np.testing.assert_array_equal(run(body.format(far), values), want)
        np.testing.assert_array_equal(values[far // 4 :][:128], want)
        assert np.array_equal(
            np.delete(values, slice(far // 4, far // 4 + 128)), np.delete(source, slice(far // 4, far // 4 + 128))
        )
    with pytest.raises(IndexError, match="out of bounds"):
        run(body.format(size), source)
    heap = memory.GlobalMemory([source, DATA, source.copy()])
    assert heap.whole == 1 and heap.bytes.size == memory.PAGE


def test_a_grid_that_no_gpu_takes_is_an_error():
    text = f"{HEADER}.visible .entry k() {{ ret; }}"
    ptxsim.launch(ptxsim.parse(text), (70_000, 1, 1), (32, 1, 1), [])
    with pytest.raises(ValueError, match="grid"):
        ptxsim.launch(ptxsim.parse(text), (1, 70_000, 1), (32, 1, 1), [])


def test_parser_scopes_and_names():
    text = f"""{HEADER}.entry a() {{ .reg .u32 %r; mov.u32 %r, 1; ret; }}
    .entry b() {{ .reg .u32 %r; {{ .reg .pred p; setp.eq.s32 p, 1, 1; }}
    {{ .reg .pred p; setp.eq.s32 p, 1, 1; }} ret; }}"""
    with pytest.raises(ValueError, match="expected one kernel"):
        ptxsim.parse(text)
    program = ptxsim.parse(text, "b")
    assert [i.opcode for i in program.instructions] == ["setp", "setp", "ret"]
    assert len(program.registers) == 3  # the two `p` are different registers
