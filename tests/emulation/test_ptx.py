"""The PTX that nvcc makes of csrc/ for sm_80, executed by ptxsim with the very params of an operator's call.

The emulation runs the same sources as C++ and so never sees the inline assembly of platform.h; this does.
"""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import case
from attention_layouts import FRAMES
from planted_faults import PTX_FAULTS, Fault, planted
from test_faults import RUNS

from appo_kernels import frame_attention
from cudasim.replay import Call, record
from cudasim.runtime import Emulator, Launch
from ptxsim.machine import Machine, Statistics
from ptxsim.memory import GLOBAL_BASE, GlobalMemory
from ptxsim.parser import Program, parse

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: install the CUDA toolkit")
SOURCE = {
    "frame_attention": "frame_attention.cu",
    "frame_attention in fp16": "frame_attention.cu",
    "frame_mass": "frame_mass.cu",
    "surrogate": "weighted_surrogate.cu",
    "divergence": "group_divergence.cu",
    "backward": "attention_backward.cu",
}


def run_attention(dtype: torch.dtype = torch.bfloat16) -> None:
    # A row and a key tile that are cut, one that is whole, and a second stage: what a block can meet, in two blocks.
    example = case(
        batch=1, heads=(2, 1), rows=20, keys=101, head_dim=64, layout="interleaved", visibility="left padding"
    )
    frame_attention(
        *(t.to(dtype) for t in example[:3]), example.frame_ids, num_frames=FRAMES, backend="cuda", **example.bounds
    )


def run_backward() -> None:
    example = case(
        batch=1, heads=(2, 1), rows=20, keys=101, head_dim=64, layout="interleaved", visibility="left padding"
    )
    example = example.to(torch.bfloat16)
    output = frame_attention(*example[:4], num_frames=FRAMES, backend="cuda", **example.bounds)
    (output.out.float().sum() + output.lse[..., 4:].sum() + output.mass[..., 0].sum()).backward()


def compiled(sources: Path, name: str, folder: Path) -> str:
    """PTX of one kernel file."""
    target = folder / f"{name}.ptx"
    command = ["nvcc", "-std=c++17", "-O3", "-arch=compute_80", "--expt-relaxed-constexpr", "-ptx", "-o", str(target)]
    result = subprocess.run([*command, str(sources / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target.read_text()


def program(ptx: str, entry: str, params_address: int) -> Program:
    """The kernel of ``ptx`` called ``entry``.

    nvcc takes the address of a params struct that a lambda captures. The simulator has no addresses in parameter space:
    such loads go to a copy of the struct in global memory.
    """
    parts = ptx.split(".visible .entry ")
    own = next(p for p in parts[1:] if p.split("(")[0].strip() == entry)
    own = re.sub(rf"(mov\.b64\s+%rd\d+), {re.escape(entry)}_param_0;", rf"\1, {params_address};", own)
    own = re.sub(r"ld\.param(\.\S+\s+[^\[]*\[%rd)", r"ld.global\1", own)
    kept = (".version", ".target", ".address_size", ".extern .shared")
    declarations = [line for line in ptx.splitlines() if line.startswith(kept)]
    return parse("\n".join(declarations) + "\n.visible .entry " + own)


def execute(ptx: str, launch: Launch, call: Call, memory: list[np.ndarray[Any, Any]], seed: int | None) -> None:
    """One launch on copies of a call's buffers; ``memory`` is changed in place."""
    struct = np.zeros(len(launch.params), np.uint8)
    layout = GlobalMemory([*memory, struct])
    params = bytearray(launch.params)
    for at, index in call.pointers:
        address = GLOBAL_BASE + int(layout.starts[index])
        params[at : at + 8] = address.to_bytes(8, sys.byteorder)
    struct[:] = np.frombuffer(bytes(params), np.uint8)
    heap = GlobalMemory([*memory, struct])
    kernel = program(ptx, launch.kernel, GLOBAL_BASE + int(heap.starts[-1]))
    ((name, size),) = kernel.parameters
    assert size == len(params)
    random = None if seed is None else np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        for block in range(int(np.prod(launch.grid))):
            chosen, parameters = np.array([block]), {name: bytes(params)}
            machine = Machine(
                kernel, launch.grid, launch.block, chosen, heap, parameters, launch.shared_bytes, random, Statistics()
            )  # fmt: skip
            machine.run()
    heap.copy_back()


def differences(
    operator: str, sources: Path, emulator: Emulator, patch: Any, folder: Path, seed: int | None = 0
) -> list[float]:
    """Largest difference between compiled and emulated kernels, of each buffer that the operator's kernels write."""
    mine = {
        "frame_attention": run_attention,
        "frame_attention in fp16": functools.partial(run_attention, torch.float16),
        "backward": run_backward,
    }
    run = mine.get(operator) or RUNS[operator]
    with emulator.record() as launches:
        calls = record(run, patch)
    ptx = compiled(sources, SOURCE[operator], folder)
    result = []
    remaining = list(launches)
    for call in calls:
        mine = [remaining.pop(0) for _ in range(2 if call.launcher == "appo_attention_backward" else 1)]
        if not all(f".entry {x.kernel}(" in ptx for x in mine):
            continue  # of another file, or of the forward of a backward
        memory = [np.frombuffer(b, np.uint8).copy() for b in call.before]
        for launch in mine:
            execute(ptx, launch, call, memory, seed)
        for got, before, wanted in zip(memory, call.before, call.after, strict=True):
            if before != wanted:
                result.append(difference(got, np.frombuffer(wanted, np.uint8), operator))
    assert not remaining and result
    return result


def difference(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], operator: str) -> float:
    """Relative to the largest number; inf where one is not finite and the other is. As fp32, or else as 16 bits."""
    views = []
    for data in (got, wanted):
        fp32 = data.view(np.float32).astype(np.float64) if data.size % 4 == 0 else None
        if operator.endswith("in fp16"):
            half = data.view(np.float16).astype(np.float64)
        else:
            half = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        views.append((fp32, half))
    options = []
    for mine, theirs in zip(*views, strict=True):
        if mine is None or theirs is None:
            continue
        finite = np.isfinite(theirs)
        scale = np.abs(theirs[finite]).max(initial=1e-30)
        if not (1e-8 < scale < 1e8):  # these bytes are not numbers of this type
            continue
        with np.errstate(invalid="ignore"):
            same = np.where(mine == theirs, 0.0, np.abs(mine - theirs) / scale)
        options.append(float(np.nan_to_num(same, nan=np.inf).max()))
    if not options:  # integers
        return 0.0 if np.array_equal(got, wanted) else float("inf")
    return min(options)


# Sums in another order and ex2.approx: fp32 results differ in the last digits, bf16 ones by half a unit now and then.
TOLERANCE = 1e-2


# One call of each kernel file, attention in both element types; the long ones are for the slow tests.
@pytest.mark.parametrize(
    "operator",
    [
        "frame_attention",
        "surrogate",
        "frame_attention in fp16",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("frame_mass", "divergence", "backward")),
    ],
)
def test_compiled_kernels_agree_with_the_emulation(
    operator: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = planted(None, tmp_path, "__half" if operator.endswith("in fp16") else "__nv_bfloat16")
    assert max(differences(operator, sources, emulator, monkeypatch, tmp_path)) < TOLERANCE


# The first always, so that the check itself is checked by every run; the others take as long each.
@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f.name, marks=pytest.mark.slow if i else ()) for i, f in enumerate(PTX_FAULTS)]
)
def test_fault_of_the_assembly_is_caught(
    fault: Fault, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = planted(fault, tmp_path, "__half" if fault.operator.endswith("in fp16") else "__nv_bfloat16")
    try:
        found = max(differences(fault.operator, sources, emulator, monkeypatch, tmp_path))
    except IndexError as error:  # the simulator's word for an access outside of a buffer
        assert "out of bounds" in str(error)
        return
    assert found > 10 * TOLERANCE
