"""frame_mass from a given lse, beside the flash attention that gives it, its matrix product alone, and eager attention.

    python benchmarks/bench_frame_mass.py [--threads N] [--repeats N]

Checks the values against the definition in fp64 first, then times everything in one run, and prints ratios.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels import frame_mass
from appo_kernels.ops.frame_mass.reference import frame_mass as definition
from appo_kernels.testing import peak_extra_bytes

# Qwen2.5-VL-7B with 16 frames at 224 x 224: 1,560 keys of which the last 384 are the response.
BATCH, HEADS, KEY_HEADS, KEYS, ROWS, HEAD_DIM = 2, 28, 4, 1560, 384, 128
TEXT, FRAMES, FRAME_KEYS = 20, 16, 64


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query (B, Hq, S, d), key and value (B, Hkv, S, d), frame ids (B, S) and last_key (B, R) of the response rows."""
    torch.manual_seed(0)
    query = torch.randn(BATCH, HEADS, KEYS, HEAD_DIM).to(dtype)
    key, value = (torch.randn(BATCH, KEY_HEADS, KEYS, HEAD_DIM).to(dtype) for _ in range(2))
    frame_ids = torch.full((BATCH, KEYS), -1, dtype=torch.int32)
    frame_ids[:, TEXT : TEXT + FRAMES * FRAME_KEYS] = torch.arange(FRAMES).repeat_interleave(FRAME_KEYS)
    last_key = torch.arange(KEYS - ROWS, KEYS, dtype=torch.int32).expand(BATCH, -1)
    return query, key, value, frame_ids, last_key


def flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = HEADS // KEY_HEADS
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True)


def eager(query: Tensor, key: Tensor, value: Tensor, in_frame: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' eager attention computes, with the mass of the last rows from its matrix."""
    group = HEADS // KEY_HEADS
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
    scores = scores + torch.full((KEYS, KEYS), -torch.inf, dtype=query.dtype).triu(1)
    weights = scores.float().softmax(-1).to(query.dtype)
    return weights @ value, (weights[:, :, -ROWS:].float() @ in_frame[:, None]).mean(1)


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` runs after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def report(dtype: torch.dtype, repeats: int) -> None:
    query, key, value, frame_ids, last_key = problem(dtype)
    rows = query[:, :, -ROWS:]
    lse = flash(query, key, value)[1].reshape(BATCH, HEADS, KEYS)[:, :, -ROWS:].float()
    replay = functools.partial(frame_mass, rows, key, frame_ids, num_frames=FRAMES, lse=lse, last_key=last_key)
    expected = definition(rows.double(), key.double(), frame_ids, num_frames=FRAMES, last_key=last_key)
    error = float((replay() - expected).abs().max())
    if error > 1e-6:
        raise SystemExit(f"{dtype}: error {error:.2e} against the definition; nothing is timed")

    one, keys = rows[0, 0].float().contiguous(), key[0, 0, : FRAMES * FRAME_KEYS].float().t()
    buffer = torch.empty(ROWS, FRAMES * FRAME_KEYS)
    in_frame = (frame_ids[..., None] == torch.arange(FRAMES)).float()

    def products() -> None:
        for _ in range(BATCH * HEADS):
            torch.mm(one, keys, out=buffer)

    first = best(lambda: flash(query, key, value), repeats)
    ours = best(replay, repeats)
    whole = best(lambda: eager(query, key, value, in_frame), max(1, repeats // 2))
    seconds = {
        "flash attention, causal, all rows": first,
        "limit: the matrix product in fp32": best(products, repeats),
        "frame_mass, lse given": ours,
        "frame_mass, lse computed": best(functools.partial(replay, lse=None), repeats),
        "eager attention, mass of its matrix": whole,
    }
    threads, extra = torch.get_num_threads(), peak_extra_bytes(replay) >> 20
    print(f"{dtype}, {threads} threads: error {error:.1e}, extra memory {extra} MiB")
    for name, taken in seconds.items():
        print(f"  {name:38s} {taken * 1e3:9.1f} ms  {taken / first:6.3f} of flash")
    print(f"  eager / (flash + frame_mass): {whole / (first + ours):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    for dtype in (torch.float32, torch.bfloat16):
        report(dtype, arguments.repeats)


if __name__ == "__main__":
    main()
