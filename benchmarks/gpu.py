"""python -m benchmarks.gpu [--minutes 8]: every operator on this machine's GPU, correctness first, then times.

Prints a table per case and writes, after every case, results/<GPU>.csv, .json (environment) and .md (one page), at
the end a plot and <GPU>.order.csv: which backend was the faster at which size, for APPO_BACKEND_ORDER to name. A
second run goes on where the first ended (--again: from the start). The cases are those of `python -m benchmarks`,
with frames that are no multiple of a tile, backwards of attention, and FlexAttention and flash-attn (where installed)
beside it. GPU times are medians by CUDA events with the host ahead of the GPU, L2 cache flushed before each; host
times are what a call takes to return. Checks of values are off while timing. Two bounds are given: `x bound`, the
time of the vendor's kernel that does the unavoidable part of the work (see bench_<op>.py), and the fraction of the
tensor-core rate that a large matrix product reaches on this very GPU. Needs torch, triton and this checkout alone.
"""

import argparse
import gc
import importlib
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch

from appo_kernels import frame_attention
from appo_kernels.dtypes import dtype_name
from benchmarks import harness, inputs_attention, inputs_vocabulary
from benchmarks.__main__ import OPERATORS
from benchmarks.gpu_report import Report, Row, table

CACHE_BYTES = 256 << 20  # more than the L2 cache of any GPU
AHEAD_CYCLES = 20_000_000  # that the GPU waits, about 10 ms, while the host launches
LONG_RUN = 5.0  # seconds: such an entry runs once
MOST_TORCH_FLOP = 2e12  # of the torch backend's attention, which launches for every pair of tiles
MOST_FP32_FLOP = 20e12  # of attention in fp32
FRAME_KEYS = 60  # of real videos, no multiple of a tile of keys

# Multiply-adds x 2 that each operator cannot avoid, of the shape of a case: causal attention has half the scores.
FLOP: dict[str, Callable[[Any], float]] = {
    "frame_mass": lambda shape: shape.replay_flop,
    "frame_attention": lambda shape: shape.attention_flop / 2,
    "token_logprobs fwd": lambda shape: shape.flop,
    "token_logprobs fwd+bwd": lambda shape: 4 * shape.flop,
    "linear_weighted_surrogate": lambda shape: 3 * shape.flop,
}
# Sequences x query heads x rows x keys, by which a backend may be chosen (APPO_BACKEND_ORDER).
SCORES: dict[str, Callable[[Any], int]] = {
    "frame_mass": lambda shape: shape.batch * shape.heads * shape.rows * shape.keys,
    "frame_attention": lambda shape: shape.batch * shape.heads * shape.keys**2,
}


class Timing(NamedTuple):
    """Medians of one run, in seconds, and how many there were."""

    gpu: float
    host: float
    runs: int


class Machine(Protocol):
    """The parts of a GPU that measuring needs; the tests put another thing in its place."""

    name: str
    device: str

    def seconds(self, entry: harness.Entry, budget: float) -> Timing: ...

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product."""
        ...


class Gpu:
    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("benchmarks.gpu: torch sees no CUDA device. `python -m benchmarks` measures on a CPU.")
        self.name = torch.cuda.get_device_name()
        self.flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, entry: harness.Entry, budget: float) -> Timing:
        first = self._once(entry)  # compiles
        if first[1] > LONG_RUN or first[0] > LONG_RUN:
            first = self._once(entry)
            return Timing(*first, 1)
        times: list[tuple[float, float]] = []
        while not times or (sum(map(max, times)) < budget and len(times) < 200):
            times.append(self._once(entry))
        gpu, host = (statistics.median(values) for values in zip(*times, strict=True))
        return Timing(gpu, host, len(times))

    def _once(self, entry: harness.Entry) -> tuple[float, float]:
        entry.before()
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        begin = time.perf_counter()
        result = entry.run()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3, host

    def rate(self, dtype: torch.dtype) -> float:
        size = 8192 if dtype != torch.float32 else 4096
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        product = harness.Entry("product", "bound", lambda: a @ a)
        return 2.0 * size**3 / self.seconds(product, 0.5).gpu


def measure(case: harness.Case, shape: Any, machine: Machine, rates: dict[str, float], budget: float) -> list[Row]:
    case.verify()
    with mock.patch.dict(os.environ, {"APPO_CHECK_VALUES": "0"}):
        timed = [(c, machine.seconds(c, budget)) for c in case.entries]
    bound = next((timing.gpu for c, timing in timed if c.role == "bound"), None)
    flop = FLOP[case.op](shape) if case.op in FLOP else None
    return [
        Row(
            machine.name, case.op, case.shape, case.dtype, c.name, c.role, 1e3 * timing.gpu, 1e3 * timing.host,
            timing.runs, None if bound is None else timing.gpu / bound,
            None if flop is None or c.role == "peer" else flop / timing.gpu / rates[case.dtype],
            SCORES[case.op](shape) if case.op in SCORES else 0,
        )
        for c, timing in timed
    ]  # fmt: skip


def leave_out(case: harness.Case, shape: Any) -> None:
    """Entries that would take minutes are named instead."""
    flop = getattr(shape, "attention_flop", 0.0)
    for entry in list(case.entries):
        if case.device == "cuda" and entry.name.startswith("ours, torch") and flop > MOST_TORCH_FLOP:
            case.entries.remove(entry)
            case.skipped[entry.name] = "launches for every pair of tiles: minutes at this size"


def backward_case(shape: Any, dtype: torch.dtype, device: str) -> harness.Case:
    """The gradients of frame_attention, through out and mass, beside those of torch's attention without the mass."""
    work = inputs_attention.attention_inputs(shape, dtype, device)
    inputs = [t.detach().requires_grad_() for t in (work.query, work.key, work.value)]
    last = torch.arange(shape.keys, dtype=torch.int32, device=device).expand(shape.batch, -1)
    usable, skipped = harness.own_backends("frame_attention", device, dtype, shape.head_dim, True)
    usable = usable if device == "cuda" else ["torch"]

    def ours(backend: str) -> list[torch.Tensor]:
        result = frame_attention(
            *inputs, work.frame_ids, num_frames=shape.frames, last_key=last, backend=backend
        )  # fmt: skip
        return [result.out, result.mass]

    def theirs() -> list[torch.Tensor]:
        key, value = (inputs_attention.repeated(work, t) for t in inputs[1:])
        return [torch.nn.functional.scaled_dot_product_attention(inputs[0], key, value, is_causal=True)]

    def entry(name: str, role: str, forward: Callable[[], list[torch.Tensor]]) -> harness.Entry:
        made: list[Any] = []

        def before() -> None:
            if not made:
                results = forward()
                made.extend([results, [torch.ones_like(result) for result in results]])

        return harness.Entry(
            name, role, lambda: torch.autograd.grad(made[0], inputs, made[1], retain_graph=True), before
        )

    entries = [entry(f"ours, {name}", "ours", partial(ours, name)) for name in usable]
    entries.append(entry("bound: torch's attention, no mass", "bound", theirs))

    def verify() -> None:
        """Every backend's gradients against torch's attention, on the part without the mass."""
        (out,) = theirs()
        expected = torch.autograd.grad(out.float().sum(), inputs)
        for name in usable:
            got = torch.autograd.grad(ours(name)[0].float().sum(), inputs)
            for a, b in zip(got, expected, strict=True):
                error = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12))
                if not error < 0.05:
                    raise AssertionError(f"frame_attention backward, {name}: {error:.3f} from torch's attention")

    return harness.Case(
        "frame_attention backward",
        shape.name,
        dtype_name(dtype),
        shape.describe(),
        device,
        verify,
        entries,
        skipped,
    )


def attention_peers(case: harness.Case, shape: Any, dtype: torch.dtype, device: str) -> None:
    """Adds attention kernels that give no mass: FlexAttention, and flash-attn where it is installed."""
    if device != "cuda":
        case.skipped["FlexAttention, no mass"] = "compiled for a GPU only"
        return
    work = inputs_attention.attention_inputs(shape, dtype, device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, keys = work.query.shape[2], work.key.shape[2]
    torch._dynamo.reset()  # beyond eight shapes of one function it would run uncompiled
    mask = create_block_mask(
        lambda b, h, q, k: k <= q + keys - rows, None, None, rows, keys, device=device, _compile=True
    )
    flex = torch.compile(partial(flex_attention, block_mask=mask, enable_gqa=True))
    run = partial(flex, work.query, work.key, work.value)
    case.entries.append(harness.Entry("FlexAttention, no mass", "peer", run))
    if reason := inputs_vocabulary.installed("flash_attn"):
        case.skipped["flash-attn, no mass"] = reason
    elif dtype == torch.float32:
        case.skipped["flash-attn, no mass"] = "takes half precision only"
    else:
        from flash_attn import flash_attn_func

        operands = [t.transpose(1, 2).contiguous() for t in (work.query, work.key, work.value)]
        run = partial(flash_attn_func, *operands, causal=True)
        case.entries.append(harness.Entry("flash-attn, no mass", "peer", run))


def cases(operators: Sequence[str], names: Sequence[str] | None, device: str, shapes: Any) -> Iterator[tuple[Any, Any]]:
    """(shape, function that makes the case) of every case; large inputs are not made before their turn."""
    for operator in operators:
        module = importlib.import_module(f"benchmarks.{OPERATORS[operator]}")
        known = module.SHAPES()
        chosen = list(shapes[operator] if shapes else [known[n] for n in names or module.DEFAULT if n in known])
        if operator in ("frame_mass", "frame_attention") and not names:
            odd = replace(chosen[0], name=f"{chosen[0].name.split('/')[0]}/of {FRAME_KEYS}", frame_keys=FRAME_KEYS)
            chosen.append(odd)
        for shape in chosen:
            for case in module.cases([shape], device):
                if operator == "frame_attention":
                    attention_peers(case, shape, getattr(torch, case.dtype), device)
                yield shape, case
            if operator == "frame_attention" and getattr(shape, "attention_flop", 0.0) <= MOST_TORCH_FLOP:
                dtype = torch.bfloat16 if device == "cuda" else torch.float32
                yield shape, backward_case(shape, dtype, device)


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None, shapes: Any = None) -> list[Row]:
    """``machine`` and ``shapes`` (operator -> list of shapes) are for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; default: all")
    parser.add_argument("--shapes", nargs="*", help="names of shapes, see `python -m benchmarks --list`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this one")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each entry")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further case is begun")
    parser.add_argument("--again", action="store_true", help="also cases whose times are there already")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if unknown := set(options.operators) - set(OPERATORS):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(OPERATORS)}")
    deadline = time.monotonic() + 60 * options.minutes
    machine = machine or Gpu()
    report = Report(options.out, machine.name, device=machine.device, again=options.again)
    rates = {dtype_name(d): machine.rate(d) for d in (torch.float32, torch.bfloat16)}
    failed: list[str] = []
    for shape, case in cases(options.operators or list(OPERATORS), options.shapes, machine.device, shapes):
        if options.dtype not in (None, case.dtype) or report.has((case.op, case.shape, case.dtype)):
            continue
        too_long = case.dtype == "float32" and getattr(shape, "attention_flop", 0.0) > MOST_FP32_FLOP
        if machine.device == "cuda" and too_long:
            report.left_out[case.title] = "minutes in fp32"
            continue
        if time.monotonic() > deadline:
            report.left_out[f"{case.title}, and what follows"] = f"{options.minutes:g} minutes were over; run again"
            break
        leave_out(case, shape)
        print(f"\n{case.title}: {case.work}", flush=True)
        try:
            found = measure(case, shape, machine, rates, options.seconds)
        except Exception as error:  # one case that fails does not cost the others; the exit status tells
            traceback.print_exc()
            failed.append(case.title)
            report.left_out[case.title] = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        else:
            report.add(found)
            print(table(found), flush=True)
        for name, reason in case.skipped.items():
            report.left_out[f"{case.title}, {name}"] = reason
            print(f"  {name:38s} not run: {reason}")
        del case
        gc.collect()
    print("\nwritten:", *report.finish())
    if failed:
        raise SystemExit(f"benchmarks.gpu: {len(failed)} cases failed: {'; '.join(failed)}")
    return report.rows


if __name__ == "__main__":
    main()
