"""frame_attention beside torch's attention under the same mask, and beside eager attention with the mass of its matrix.

    python benchmarks/bench_frame_attention.py [--threads N] [--repeats N]

Checks the values against the definition in fp64 first, then times forward, and forward with backward, in one run.
"""

import argparse
from collections.abc import Callable

import torch
from bench_frame_mass import FRAMES, KEYS, ROWS, best, problem
from torch import Tensor

from appo_kernels import frame_attention
from appo_kernels.ops.frame_attention.reference import frame_attention as definition
from appo_kernels.testing import peak_extra_bytes


def report(dtype: torch.dtype, repeats: int) -> None:
    query, key, value, frame_ids, last_key = problem(dtype)
    query = query[:, :, -ROWS:].contiguous()  # the response rows of a packed group attend to prompt and video
    mask = torch.arange(KEYS) <= last_key[..., None]  # (B, R, S)

    def ours(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = frame_attention(*inputs, frame_ids, num_frames=FRAMES, last_key=last_key)
        return output.out, output.mass

    def dense(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = definition(*inputs, frame_ids, num_frames=FRAMES, last_key=last_key)
        return output.out, output.mass

    def peer(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        attention = torch.nn.functional.scaled_dot_product_attention
        return (attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True),)

    exact = dense(query.double(), key.double(), value.double())
    errors = [float((got - want).abs().max()) for got, want in zip(ours(query, key, value), exact, strict=True)]
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    if errors[0] > allowed or errors[1] > 1e-6:
        raise SystemExit(f"{dtype}: errors {errors} against the definition; nothing is timed")
    extra = peak_extra_bytes(lambda: ours(query, key, value)) >> 20
    print(f"{dtype}, {torch.get_num_threads()} threads: errors {errors}, extra memory {extra} MiB")
    names = ("torch, attention alone", "frame_attention", "dense, mass of its matrix")
    for name, function in zip(names, (peer, ours, dense), strict=True):
        forward = best(lambda f=function: f(query, key, value), repeats)  # type: ignore[misc]
        both = best(with_backward(function, query, key, value), repeats)
        print(f"  {name:28s} forward {forward * 1e3:9.1f} ms   with backward {both * 1e3:9.1f} ms")


def with_backward(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Callable[[], object]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> object:
        return torch.autograd.grad(sum(result.sum() for result in function(*leaves)), leaves)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dtype in (torch.float32, torch.bfloat16):
        report(dtype, arguments.repeats)


if __name__ == "__main__":
    main()
