"""python -m benchmarks.gpu: every operator on this machine's GPU, correctness first, then times, peers, bounds.

Prints a table per case and writes results/<GPU>.csv and results/<GPU>.png. The cases are those of `python -m
benchmarks`, with FlexAttention and flash-attn (where installed) beside frame_attention. Times are medians by CUDA
events, L2 cache flushed before each. Two bounds are given: `x bound`, the time of the vendor's kernel that does the
unavoidable part of the work (see bench_<op>.py), and the fraction of the tensor-core rate that a large matrix product
reaches on this very GPU.
"""

import argparse
import csv
import gc
import importlib
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from appo_kernels.dtypes import dtype_name
from benchmarks import harness, inputs_attention, inputs_vocabulary, plots
from benchmarks.__main__ import OPERATORS
from benchmarks.timers import CudaEvents

# Multiply-adds x 2 that each operator cannot avoid, of the shape of a case: causal attention has half the scores.
FLOP: dict[str, Callable[[Any], float]] = {
    "frame_mass": lambda shape: shape.replay_flop,
    "frame_attention": lambda shape: shape.attention_flop / 2,
    "token_logprobs fwd": lambda shape: shape.flop,
    "token_logprobs fwd+bwd": lambda shape: 4 * shape.flop,
    "linear_weighted_surrogate": lambda shape: 3 * shape.flop,
}


class Machine(Protocol):
    """The parts of a GPU that measuring needs; the tests put another thing in its place."""

    name: str
    device: str

    def seconds(self, contestant: harness.Contestant, budget: float) -> tuple[float, int]:
        """Median time of one run, and how many there were."""
        ...

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product."""
        ...


class Gpu:
    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("benchmarks.gpu: torch sees no CUDA device. `python -m benchmarks` measures on a CPU.")
        self.name = torch.cuda.get_device_name()
        self.clock = CudaEvents()

    def seconds(self, contestant: harness.Contestant, budget: float) -> tuple[float, int]:
        times: list[float] = []
        for warming in (True, False):  # the first run compiles, and finds its memory
            while not times or (not warming and sum(times) < budget and len(times) < 200):
                contestant.before()
                times.append(self.clock(contestant.run))
            if warming:
                times.clear()
        return statistics.median(times), len(times)

    def rate(self, dtype: torch.dtype) -> float:
        size = 8192 if dtype != torch.float32 else 4096
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        product = harness.Contestant("product", "bound", lambda: a @ a)
        return 2.0 * size**3 / self.seconds(product, 0.5)[0]


@dataclass
class Row:
    gpu: str
    op: str
    shape: str
    dtype: str
    name: str
    role: str
    milliseconds: float
    runs: int
    to_bound: float | None  # times the time of the vendor's kernel
    tensor_fraction: float | None  # of the rate of a large matrix product


def measure(case: harness.Case, shape: Any, machine: Machine, rates: dict[str, float], budget: float) -> list[Row]:
    case.verify()
    timed = [(c, *machine.seconds(c, budget)) for c in case.contestants]
    bound = next((seconds for c, seconds, _ in timed if c.role == "bound"), None)
    flop = FLOP[case.op](shape) if case.op in FLOP else None
    return [
        Row(
            machine.name, case.op, case.shape, case.dtype, c.name, c.role, 1e3 * seconds, runs,
            None if bound is None else seconds / bound,
            None if flop is None or c.role == "peer" else flop / seconds / rates[case.dtype],
        )
        for c, seconds, runs in timed
    ]  # fmt: skip


def attention_peers(case: harness.Case, shape: Any, dtype: torch.dtype, device: str) -> None:
    """Adds attention kernels that give no mass: FlexAttention, and flash-attn where it is installed."""
    if device != "cuda":
        case.skipped["FlexAttention, no mass"] = "compiled for a GPU only"
        return
    work = inputs_attention.attention_inputs(shape, dtype, device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, keys = work.query.shape[2], work.key.shape[2]
    mask = create_block_mask(lambda b, h, q, k: k <= q + keys - rows, None, None, rows, keys, device=device)
    flex = torch.compile(partial(flex_attention, block_mask=mask, enable_gqa=True))
    run = partial(flex, work.query, work.key, work.value)
    case.contestants.append(harness.Contestant("FlexAttention, no mass", "peer", run))
    if reason := inputs_vocabulary.installed("flash_attn"):
        case.skipped["flash-attn, no mass"] = reason
    elif dtype == torch.float32:
        case.skipped["flash-attn, no mass"] = "takes half precision only"
    else:
        from flash_attn import flash_attn_func

        operands = [t.transpose(1, 2).contiguous() for t in (work.query, work.key, work.value)]
        run = partial(flash_attn_func, *operands, causal=True)
        case.contestants.append(harness.Contestant("flash-attn, no mass", "peer", run))


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':40s} {'median':>12s} {'x bound':>8s} {'of tensor rate':>15s}"]
    for row in rows:
        ratio = "" if row.to_bound is None else f"{row.to_bound:.2f}"
        fraction = "" if row.tensor_fraction is None else f"{100 * row.tensor_fraction:.0f}%"
        lines.append(f"  {row.name:38s} {row.milliseconds:9.3f} ms {ratio:>8s} {fraction:>15s}")
    return "\n".join(lines)


def write(rows: Sequence[Row], folder: Path, name: str) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    table_path, plot_path = folder / f"{stem}.csv", folder / f"{stem}.png"
    with table_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, plot_path, name)
    return table_path, plot_path


def plot(rows: Sequence[Row], path: Path, name: str) -> None:
    """Horizontal bars of the time of each contestant, one panel per case."""
    pyplot = plots.pyplot()
    cases = list(dict.fromkeys((row.op, row.shape, row.dtype) for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(9, 0.8 + 2.2 * len(cases)), squeeze=False)
    for panel, key in zip(panels[:, 0], cases, strict=True):
        chosen = [row for row in rows if (row.op, row.shape, row.dtype) == key][::-1]
        panel.barh(
            [r.name for r in chosen], [r.milliseconds for r in chosen], color=[plots.COLOURS[r.role] for r in chosen]
        )
        panel.set_title(", ".join(key), fontsize=9, loc="left")
        panel.set_xlabel("milliseconds", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None, shapes: Any = None) -> list[Row]:
    """``machine`` and ``shapes`` (operator -> list of shapes) are for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; default: all")
    parser.add_argument("--shapes", nargs="*", help="names of shapes, see `python -m benchmarks --list`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this one")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each contestant")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the CSV file and the plot")
    options = parser.parse_args(arguments)
    if unknown := set(options.operators) - set(OPERATORS):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(OPERATORS)}")
    machine = machine or Gpu()
    rates = {dtype_name(d): machine.rate(d) for d in (torch.float32, torch.bfloat16)}
    rows: list[Row] = []
    for operator in options.operators or OPERATORS:
        module = importlib.import_module(f"benchmarks.{OPERATORS[operator]}")
        known = module.SHAPES()
        chosen = shapes[operator] if shapes else [known[n] for n in options.shapes or module.DEFAULT if n in known]
        for shape in chosen:
            for case in module.cases([shape], machine.device):
                if options.dtype not in (None, case.dtype):
                    continue
                if operator == "frame_attention":
                    attention_peers(case, shape, getattr(torch, case.dtype), machine.device)
                found = measure(case, shape, machine, rates, options.seconds)
                rows += found
                print(f"\n{case.title}: {case.work}\n{table(found)}", flush=True)
                for name, reason in case.skipped.items():
                    print(f"  {name:38s} not run: {reason}")
                del case
                gc.collect()
    if rows:
        print("\nwritten:", *write(rows, options.out, machine.name))
    return rows


if __name__ == "__main__":
    main()
