"""group_divergence against its matrix product and against the dense way over (G, N, V) log-probabilities.

    python benchmarks/bench_group_divergence.py [--tokens 96 --hidden 512 --vocabulary 32064 --frames 4 --slots 16 ...]

Both kinds are compared with the definition in fp64 first. Times are the best of several rounds in which all take turns,
so that their ratios hold on a busy machine.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels import group_divergence, token_logprobs
from appo_kernels.ops.group_divergence import reference
from appo_kernels.testing import assert_as_good_as, peak_extra_bytes


def dense(hidden: Tensor, weight: Tensor, slots: Tensor, kind: str) -> Tensor:
    """log_softmax of all (G, N, V) logits, then per target frame a copy of its members (G, J, V), none missing."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    response = torch.arange(len(hidden), device=hidden.device)[:, None]
    frames = []
    for positions in slots:  # (G, J)
        members = log_p[response, positions]  # (G, J, V)
        if kind == "kl":
            mixture = members.logsumexp(0) - math.log(len(members))
            frames.append((members.exp() * (members - mixture)).sum(-1).mean(0))
        else:
            d = (members.mean(0) - members).clamp(-11, 11)
            frames.append((d.exp() - d - 1).sum(-1).mean(0))
    return torch.stack(frames)


def verify(hidden: Tensor, weight: Tensor, slots: Tensor, kind: str, columns: int = 2048) -> None:
    """On two frames, four slots each, and as many words as fp64 logits are affordable for."""
    weight, slots = weight[:columns], slots[:2, :, :4]
    lse = torch.logsumexp(hidden.double() @ weight.double().t(), -1)
    exact = reference.group_divergence(hidden.double(), weight.double(), lse, slots, kind=kind)
    got = group_divergence(hidden, weight, lse.float(), slots, kind=kind)
    assert_as_good_as(got, exact, dense(hidden, weight, slots, kind), name=kind)


def best(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each, the least of ``rounds`` rounds in which they take turns."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="N, of each response")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--frames", type=int, default=4, help="K, target frames")
    parser.add_argument("--slots", type=int, default=16, help="J, of each target frame")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    G, N, D, V, K, J = (
        getattr(options, name) for name in ("responses", "tokens", "hidden", "vocabulary", "frames", "slots")
    )
    dtype, device = getattr(torch, options.dtype), options.device

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(G, N, D, generator=generator).to(device, dtype)
    weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(device, dtype)
    picked = [torch.randperm(N, generator=generator)[:J].sort().values for _ in range(K * G)]
    slots = torch.stack(picked).view(K, G, J).to(device)
    unique = sum(len(slots[:, i].unique()) for i in range(G))
    nowhere = torch.zeros(G * N, dtype=torch.int64, device=device)
    lse = token_logprobs(hidden.flatten(0, 1), weight, nowhere).lse.view(G, N)
    for kind in ("kl", "k3"):
        verify(hidden, weight, slots, kind)
    print(f"verified; G {G}, N {N}, D {D}, V {V}, K {K}, J {J}, {unique} unique rows, {options.dtype}, {device}")

    rows = hidden.flatten(0, 1)[:unique]
    runs: dict[str, Callable[[], object]] = {"limit: 1 product": lambda: rows @ weight.t()}
    for kind in ("kl", "k3"):
        runs[f"ours, {kind}"] = lambda kind=kind: group_divergence(hidden, weight, lse, slots, kind=kind)
        runs[f"dense, {kind}"] = lambda kind=kind: dense(hidden, weight, slots, kind)
    seconds = best(runs, options.rounds, device)
    for name, run in runs.items():
        peak = peak_extra_bytes(run, device) / 2**20
        ratio = seconds[name] / seconds["limit: 1 product"]
        print(f"  {name:18s} {1e3 * seconds[name]:9.1f} ms  {ratio:5.2f} of limit  {peak:8.0f} MiB")


if __name__ == "__main__":
    main()
