"""Bank conflicts of the attention kernels, as the emulation counts them."""

import os

import library
import torch
from attention_cases import FRAMES, case

from appo_kernels import frame_attention, frame_mass

HEAD_DIMS, GRAD_HEAD_DIMS = (64, 80, 96, 128, 256), (64, 128)


def count() -> dict[tuple[str, str], int]:
    """(kernel's name, head size) -> conflicts of one call with lengths that cut tiles."""
    os.environ["APPO_EMULATION_LIBRARY"] = str(library.build())
    emulator = library.emulator()
    counted = {}
    for head_dim in HEAD_DIMS:
        example = case(batch=1, heads=(2, 1), rows=70, keys=150, head_dim=head_dim, layout="interleaved")
        example = example.to(torch.bfloat16)
        query, key, value, ids, bounds = example
        emulator.counters()
        with torch.set_grad_enabled(head_dim in GRAD_HEAD_DIMS):
            output = frame_attention(query, key, value, ids, num_frames=FRAMES, backend="cuda", **bounds)
        counted["attention_forward", str(head_dim)] = emulator.counters()["bank_conflicts"]
        if head_dim in GRAD_HEAD_DIMS:
            torch.autograd.grad(output.out.float().sum() + output.mass.sum(), (query, key, value))
            both = emulator.counters()["bank_conflicts"]
            counted["attention_backward_rows", str(head_dim)] = counted["attention_backward_keys", str(head_dim)] = both
        with torch.no_grad():
            frame_mass(query, key, ids, num_frames=FRAMES, backend="cuda", **bounds)
            counted["attention_forward, mass only", str(head_dim)] = emulator.counters()["bank_conflicts"]
            frame_mass(query, key, ids, num_frames=FRAMES, lse=output.lse, backend="cuda", **bounds)
            counted["frame_mass_replay", str(head_dim)] = emulator.counters()["bank_conflicts"]
    return counted
