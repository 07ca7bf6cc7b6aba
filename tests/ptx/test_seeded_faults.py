"""Faults put into the shipped kernels on purpose: the harness must see each of them."""

import importlib.util
import re
from pathlib import Path

import attention_layouts as layouts
import backend_calls as calls
import pytest
import torch

import ptxsim
from appo_kernels.attention import triton_forward, triton_passes
from ptxsim import machine, triton_device

# What is wrong: (text of the kernel, what replaces it).
FAULTS = {
    "a missing mask": ("b_score = tl.where(seen, b_score, ", "b_score = tl.where(inside[None, :], b_score, "),
    "a wrong stride": ("load_keys(p_value, stride_vs,", "load_keys(p_value, stride_ks + 1,"),
    "a stale accumulator": ("row_sum = row_sum * decay + tile_sum", "row_sum = row_sum + tile_sum"),
    "a frame boundary forgotten": ("mass += tl.where(known,", "mass = tl.where(known,"),
    "a tile that was skipped is read": ("(tl.load(p_kinds + tile) > 0)", "(tl.load(p_kinds + tile) >= 0)"),
}


def small_layout() -> layouts.LayoutCase:
    """Enough for every fault: bounds, a frame of several tiles, a frame that the first tile of 18 rows does not see."""
    S, R = 230, 20
    ids = layouts.runs(S, (0, 3, 130), (1, 150, 64))[None]
    rows = torch.arange(R)
    last_key = layouts.ints(torch.where(rows < 18, 7 * rows + 20, S - 1))
    return layouts.LayoutCase(ids, 2, None, last_key, None, R)


def compare_forward() -> None:
    layout = small_layout()
    inputs = calls.tensors(layout, 7, 1, 64, torch.bfloat16)
    expected = calls.expected_attention(layout, inputs, scale=0.3, grads=calls.upstream(layout, inputs))
    framework = calls.attention(layout, inputs, "torch", scale=0.3)
    with triton_device.simulated(seed=0):
        got = calls.attention(layout, inputs, "triton", scale=0.3)
    calls.compare(got, expected, framework)


def mutated(tmp_path: Path, text: str, replacement: str):
    """The module of the forward kernels with one change."""
    source = Path(triton_forward.__file__).read_text()
    assert source.count(text) == 1, f"{text!r} is not in the kernel: the fault must follow the code"
    path = tmp_path / "mutated_forward.py"
    path.write_text(source.replace(text, replacement))
    spec = importlib.util.spec_from_file_location("mutated_forward", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_passes, "forward_kernels", mutated(tmp_path, *FAULTS[fault]))
    with pytest.raises((AssertionError, IndexError), match=r"error .* against fp64|out of bounds|misaligned"):
        compare_forward()


@pytest.mark.slow
def test_without_a_fault():
    compare_forward()


@pytest.mark.slow
def test_a_barrier_taken_out_of_a_shipped_kernel_is_seen(monkeypatch):
    """Four barriers of the compiled attention kernel, one at a time: what it guards goes wrong under some schedule."""
    monkeypatch.setattr(machine, "STEP_LIMIT", 150_000)  # a loop over a count read too early would not end
    layout = small_layout()
    inputs = calls.tensors(layout, 7, 1, 64, torch.bfloat16)
    with triton_device.simulated(seed=0) as device:
        right = calls.attention(layout, inputs, "triton", scale=0.3)
    ptx = next(launch.ptx for launch in device.launches if launch.name == "online_kernel").read_text()
    barriers = list(re.finditer(r"bar\.sync\s+0;", ptx))

    whole = triton_device._program

    def caught(barrier: re.Match[str]) -> bool:
        broken = ptxsim.parse(ptx[: barrier.start()] + ptx[barrier.end() :])
        monkeypatch.setattr(
            triton_device, "_program", lambda path: broken if path.name == "online_kernel.ptx" else whole(path)
        )
        for seed in range(3):
            try:
                with triton_device.simulated(seed=seed):
                    got = calls.attention(layout, inputs, "triton", scale=0.3)
            except (IndexError, RuntimeError):
                return True
            if any(not torch.equal(a, b) for a, b in zip(got, right, strict=True)):
                return True
        return False

    # Not every barrier is needed: some are followed by another before anything they guard is touched.
    chosen = barriers[:: max(1, len(barriers) // 4)][:4]
    results = [caught(barrier) for barrier in chosen]
    assert sum(results) >= 2, results
