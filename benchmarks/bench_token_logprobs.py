"""token_logprobs against its matrix products and against log_softmax of all logits.

    python benchmarks/bench_token_logprobs.py [--tokens 512 --hidden 512 --vocabulary 32064 --dtype float32 ...]

Results and gradients are compared with the definition in fp64 first. Times are the best of several rounds in which all
take turns, so that their ratios hold on a busy machine.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels import token_logprobs
from appo_kernels.ops.token_logprobs import reference
from appo_kernels.testing import GRADIENT_FACTOR, assert_as_good_as, peak_extra_bytes


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a training script does: all logits, log_softmax in fp32, autograd."""
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden, weight, targets)[:2]


def verify(hidden: Tensor, weight: Tensor, targets: Tensor, columns: int = 4096) -> None:
    """On as many words as an fp64 tensor of logits is affordable for."""
    V = min(columns, weight.shape[0])
    leaves = [hidden.detach(), weight.detach()[:V]]
    outcomes = []
    for function, dtype in ((ours, hidden.dtype), (dense, hidden.dtype), (reference.token_logprobs, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in leaves]
        results = function(*inputs, targets % V)[:2]
        outcomes.append([*results, *torch.autograd.grad([r.sum() for r in results], inputs)])
    for i, (got, plain, exact) in enumerate(zip(*outcomes, strict=True)):
        assert_as_good_as(got, exact, plain, factor=2.0 if i < 2 else GRADIENT_FACTOR, name=f"output {i}")


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
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    M, D, V, dtype = options.tokens, options.hidden, options.vocabulary, getattr(torch, options.dtype)

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=generator).to(options.device, dtype)
    weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(options.device, dtype)
    targets = torch.randint(V, (M,), generator=generator).to(options.device)
    verify(hidden, weight, targets)
    print(f"verified; {M} tokens, D {D}, V {V}, {options.dtype}, {options.device}, {torch.get_num_threads()} threads")

    gradient = torch.ones(M, V, device=options.device, dtype=dtype)

    def products(count: int) -> None:
        for operands in ((hidden, weight.t()), (hidden, weight.t()), (gradient, weight), (gradient.t(), hidden))[
            :count
        ]:
            torch.mm(*operands)

    def with_gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logprobs, entropy = function(*leaves, targets)
        (logprobs.sum() + entropy.sum()).backward()

    passes: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {
            "ours": lambda: ours(hidden, weight, targets),
            "limit: 1 product": lambda: products(1),
            "log_softmax": lambda: dense(hidden, weight, targets),
        },
        "forward and backward": {
            "ours": lambda: with_gradients(ours),
            "limit: 4 products": lambda: products(4),
            "log_softmax (3 products)": lambda: with_gradients(dense),
        },
    }
    for title, runs in passes.items():
        seconds = best(runs, options.rounds, options.device)
        limit = next(value for name, value in seconds.items() if name.startswith("limit"))
        print(title)
        for name, run in runs.items():
            peak = peak_extra_bytes(run, options.device) / 2**20
            print(f"  {name:26s} {1e3 * seconds[name]:9.1f} ms  {seconds[name] / limit:5.2f} of limit  {peak:8.0f} MiB")


if __name__ == "__main__":
    main()
