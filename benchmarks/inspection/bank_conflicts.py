"""Bank conflicts of the attention kernels, as the emulated GPU counts them."""

import torch

import cudasim
from appo_kernels import frame_attention, frame_mass
from appo_kernels.cuda_constants import GRAD_HEAD_DIMS, HEAD_DIMS

HEADS, KEY_HEADS, ROWS, KEYS, FRAMES = 2, 1, 70, 150, 6  # lengths that cut tiles


def count() -> dict[tuple[str, str], int]:
    """(kernel's name, head size) -> conflicts of one call in bf16: frames between text, causal rows."""
    emulator = cudasim.emulator()
    place = torch.arange(KEYS)
    frame_ids = torch.where((place % 9 < 6) & (place // 9 < FRAMES), place // 9, -1)[None]
    options = {"num_frames": FRAMES, "last_key": place[None, -ROWS:], "backend": "cuda"}
    counted = {}
    for head_dim in HEAD_DIMS:
        query = torch.randn(1, HEADS, ROWS, head_dim, dtype=torch.bfloat16, requires_grad=True)
        key, value = torch.randn(2, 1, KEY_HEADS, KEYS, head_dim, dtype=torch.bfloat16, requires_grad=True)
        emulator.counters()
        with cudasim.serving(), torch.set_grad_enabled(head_dim in GRAD_HEAD_DIMS):
            output = frame_attention(query, key, value, frame_ids, **options)
            counted["attention_forward", str(head_dim)] = emulator.counters()["bank_conflicts"]
            if head_dim in GRAD_HEAD_DIMS:
                torch.autograd.grad(output.out.float().sum() + output.mass.sum(), (query, key, value))
                both = emulator.counters()["bank_conflicts"]
                counted["attention_backward_rows", str(head_dim)] = both
                counted["attention_backward_keys", str(head_dim)] = both
        with cudasim.serving(), torch.no_grad():
            frame_mass(query, key, frame_ids, **options)
            counted["attention_forward, mass only", str(head_dim)] = emulator.counters()["bank_conflicts"]
            frame_mass(query, key, frame_ids, lse=output.lse, **options)
            counted["frame_mass_replay", str(head_dim)] = emulator.counters()["bank_conflicts"]
    return counted
