"""linear_weighted_surrogate, forward and backward, against its three matrix products, plain torch and liger-kernel.

    python benchmarks/bench_weighted_surrogate.py [--tokens 512 --hidden 512 --vocabulary 152064 --dtype float32 ...]

Every result is compared with plain torch first; times are the best of several rounds in which all take turns. Processor
time is printed too: with one thread its ratios hold on a machine that is busy with other things. liger-kernel's chunked
GRPO loss takes part where it is installed.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels import linear_weighted_surrogate
from appo_kernels.testing import peak_extra_bytes

EPS_LOW, EPS_HIGH = 0.2, 0.28


class Case:
    """B responses of T tokens, a random head (V, D), and ratios near one as after a few updates."""

    def __init__(self, options: argparse.Namespace, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, options.dtype)
        B, T, D, V = options.responses, tokens // options.responses, options.hidden, options.vocabulary
        self.hidden = torch.randn(B, T, D, generator=generator).to(dtype)
        self.weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(dtype)
        self.targets = torch.randint(0, V, (B, T), generator=generator)
        self.advantages = torch.randn(B, generator=generator)
        self.mask = torch.ones(B, T)
        logprobs = torch.empty(B, T)
        with torch.no_grad():  # one response at a time: this is not what is measured
            for b in range(B):
                logits = (self.hidden[b] @ self.weight.t()).float()
                logprobs[b] = logits.log_softmax(-1).gather(-1, self.targets[b, :, None])[:, 0]
        self.old_logprobs = logprobs + 0.1 * torch.randn(B, T, generator=generator)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def ours(self) -> Tensor:
        loss = linear_weighted_surrogate(
            self.hidden, self.weight, self.targets, self.old_logprobs, self.advantages, self.mask
        ).loss
        loss.backward()
        return loss.detach()

    def torch_loss(self) -> Tensor:
        """What a training script does: all logits, log_softmax in fp32, autograd."""
        logp = (self.hidden @ self.weight.t()).float().log_softmax(-1)
        ratio = (logp.gather(-1, self.targets[..., None])[..., 0] - self.old_logprobs).exp()
        clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
        A = self.advantages[:, None]
        loss = (-torch.min(ratio * A, clipped * A) * self.mask).sum() / self.mask.sum()
        loss.backward()
        return loss.detach()

    def liger(self) -> Callable[[], Tensor]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        module = LigerFusedLinearGRPOLoss(beta=0.0, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, use_ref_model=False)

        def run() -> Tensor:
            loss = module(
                self.hidden,
                self.weight,
                self.targets,
                self.mask,
                self.advantages,
                old_per_token_logps=self.old_logprobs,
            )[0]
            loss.backward()
            return loss.detach()

        return run

    def products(self) -> Callable[[], None]:
        """The three matrix products alone, each over all tokens at once, into buffers that are there already."""
        x, weight = self.hidden.detach().flatten(0, 1), self.weight.detach()
        logits = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

        def run() -> None:
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_x)
            torch.mm(logits.t(), x, out=grad_weight)

        return run

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def verify(case: Case, runs: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Loss and gradients of every contestant against plain torch, relative to the largest entry."""
    results = {}
    for name, run in runs.items():
        case.clear()
        loss = run()
        results[name] = (loss.double(), case.hidden.grad, case.weight.grad)
    for name, result in results.items():
        for what, got, expected in zip(("loss", "grad hidden", "grad weight"), result, results["torch"], strict=True):
            error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
            if not error <= tolerance:
                raise AssertionError(f"{name}: {what} differs from plain torch by {error:.2e}, allowed {tolerance:.0e}")
    case.clear()


def extra_bytes(case: Case) -> int:
    """Peak of ours beside its arguments and the gradients it returns."""
    case.clear()
    peak = peak_extra_bytes(case.ours)
    assert case.hidden.grad is not None and case.weight.grad is not None
    return peak - case.hidden.grad.nbytes - case.weight.grad.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="in all responses together")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-torch", action="store_true", help="verify against plain torch, but do not time it")
    parser.add_argument("--memory-tokens", type=int, nargs="*", default=[], help="also measure peak memory at these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    case = Case(options, options.tokens)
    runs: dict[str, Callable[[], Tensor]] = {"ours": case.ours, "torch": case.torch_loss}
    if importlib.util.find_spec("liger_kernel"):
        runs["liger"] = case.liger()
    verify(case, runs, 1e-3 if options.dtype == "float32" else 3e-2)
    if options.skip_torch:
        del runs["torch"]
    timed: dict[str, Callable[[], object]] = {"products": case.products(), **runs}
    best = dict.fromkeys(timed, float("inf"))
    processor = dict(best)
    for _ in range(options.rounds):
        for name, run in timed.items():
            case.clear()
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
            processor[name] = min(processor[name], time.process_time() - start_processor)
    shape = f"{options.tokens} tokens, D={options.hidden}, V={options.vocabulary}, {options.dtype}"
    print(f"linear_weighted_surrogate forward+backward, {shape}, {options.threads} threads, best of {options.rounds}")
    for clock, times in (("elapsed", best), ("processor", processor)):
        for name, seconds in times.items():
            of_products, of_ours = seconds / times["products"], seconds / times["ours"]
            print(f"  {clock:10}{name:10}{seconds:8.3f} s   {of_products:5.2f} x the products   {of_ours:5.2f} x ours")
    for tokens in options.memory_tokens:
        print(f"  peak memory at {tokens} tokens: {extra_bytes(Case(options, tokens)) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
