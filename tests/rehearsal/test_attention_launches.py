"""Launches of the attention kernels on the pretended GPU, which has 132 multiprocessors."""

import pytest
import torch

import gpu_rehearsal
from appo_kernels.attention import triton_passes
from appo_kernels.attention.arguments import AttentionLayout


# So little scratch that one tile of rows at a time would fit, and so few rows that all of them do not fill the GPU.
@pytest.mark.parametrize(("rows", "full"), [(8000, True), (40, False)])
def test_a_part_of_the_rows_fills_the_gpu(monkeypatch, rows, full):
    monkeypatch.setattr(triton_passes, "SCRATCH_BYTES", 1)
    with gpu_rehearsal.rehearse() as recording:
        query = torch.zeros(1, 2, rows, 64, device="cuda", dtype=torch.bfloat16)
        key = torch.zeros(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        frames = (torch.arange(64, device="cuda") // 16)[None].int()
        layout = AttentionLayout(frames, None, None, None, None, 0.1)
        lse, mass = (torch.zeros(1, heads, rows, 4, device="cuda") for heads in (2, 1))
        triton_passes.attend(query, key, key, layout, query.clone(), lse[..., 0].contiguous(), mass, False)
    passes = [launch.grid for launch in recording.launches if launch.kernel == "online_kernel"]
    programs = [grid[0] * grid[1] for grid in passes]
    if full:
        assert all(n >= 2 * 132 for n in programs[:-1])  # the last has what is left
    else:
        assert len(programs) == 1
