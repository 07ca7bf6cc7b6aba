"""Static cost of the Triton kernels: python -m benchmarks.inspection.static [--arch 80 90 100] [--markdown FILE].

Compiles each kernel with its default configuration and prints registers, spills, shared memory, blocks per
multiprocessor and the instructions of its main loop (of all of it where it has no loop). Needs no GPU, and about half
an hour of one core for everything. These are facts about the code, not measured times.
Exits with 1 when a kernel spills, exceeds the shared memory of its architecture, or when the frame mass costs the main
loop of attention more than it may.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.ops.frame_attention import triton as frame_attention
from appo_kernels.ops.frame_mass import triton as frame_mass
from appo_kernels.ops.group_divergence import group_divergence_from_logits
from appo_kernels.ops.weighted_surrogate.kinds import Options
from appo_kernels.ops.weighted_surrogate.triton import terms
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state
from benchmarks.inspection import sass
from ptxsim import triton_device

ARCHITECTURES = (80, 90, 100)
# Head sizes of Qwen2.5-VL and Qwen3-VL (128), of small models (64), padded ones (80, 96), the smallest and the largest.
HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RESULT = Path(__file__).parents[1] / "results" / "static.md"
# Main-loop instructions of attention with the mass against without it, by architecture.
MASS_BUDGET = {80: 1.05, 90: 1.05, 100: 1.055}
HEADS, KEY_HEADS, ROWS, KEYS, FRAMES = 28, 4, 64, 256, 2
VOCABULARY, GROUP = 8192, 8  # two blocks of columns at least; the responses of a group


@dataclass(frozen=True)
class Entry:
    kernel: str
    dtype: str
    head_dim: int | None  # None: a kernel on logits
    arch: int
    tile: str
    warps: int
    shared_bytes: int
    code: sass.Code

    def faults(self) -> list[str]:
        head_dim = "" if self.head_dim is None else f" d={self.head_dim}"
        name = f"{self.kernel} {self.dtype}{head_dim} sm_{self.arch}"
        limit, found = sass.LIMITS[self.arch][0], []
        if self.code.spills:
            found.append(f"{name}: {self.code.spills} instructions spill registers")
        if self.shared_bytes > limit:
            found.append(f"{name}: {self.shared_bytes} bytes of shared memory, the limit is {limit}")
        if not self.code.occupancy(self.arch, 32 * self.warps, self.shared_bytes):
            found.append(f"{name}: no block fits a multiprocessor")
        return found


def attention_entries(head_dim: int, dtype: str, arch: int, *, gradients: bool = True) -> Iterator[Entry]:
    """Attention and frame mass at causal bounds: forward with and without mass, replay, gradients."""
    with triton_device.simulated(arch=arch, execute=False) as device:
        query, out, grad_out, grad_query = torch.zeros(4, 1, HEADS, ROWS, head_dim, dtype=DTYPES[dtype])
        key, value, grad_key, grad_value = torch.zeros(4, 1, KEY_HEADS, KEYS, head_dim, dtype=DTYPES[dtype])
        lse, mass = torch.zeros(1, HEADS, ROWS), torch.zeros(1, 1, ROWS, FRAMES)
        ids = (torch.arange(KEYS) // (KEYS // FRAMES))[None].int()
        last = (torch.arange(ROWS) + KEYS - ROWS)[None].int()
        layout = AttentionLayout(ids, None, last, None, None, 0.1)
        frame_attention.forward(query, key, value, layout, out, lse, mass, per_head=False)
        without_frames = layout._replace(frame_ids=torch.full_like(ids, -1))
        frame_attention.forward(query, key, value, without_frames, out, lse, mass[..., :0], per_head=False)
        frame_mass.forward(query, key, layout, lse, mass, None, False)
        frame_mass.forward(query, key, layout, None, mass, lse, False)
        if gradients:
            frame_attention.backward(
                query, key, value, layout, out, lse, Upstream(grad_out, lse, mass),
                Gradients(grad_query, grad_key, grad_value), per_head=False,
            )  # fmt: skip
    seen = set()
    for launch in device.launches:
        name = _label(launch)
        if name in seen or "BN" not in launch.constants:  # the rest only combines sums
            continue
        seen.add(name)
        yield _entry(launch, name, dtype, head_dim, arch, f"{launch.constants['BM']}x{launch.constants['BN']}")


def logits_entries(arch: int) -> Iterator[Entry]:
    """The passes over logits: fp32 tiles, plain and with bias and soft cap, and bf16 logits as a model gives them."""
    rows = torch.zeros(GROUP, dtype=torch.int64)
    zeros, bias = torch.zeros(GROUP), torch.zeros(VOCABULARY, dtype=torch.bfloat16)
    with triton_device.simulated(arch=arch, execute=False) as device:
        for dtype, head in (
            (torch.float32, {}),
            (torch.float32, {"bias": bias, "softcap": 30.0}),
            (torch.bfloat16, {}),
        ):
            logits = torch.zeros(GROUP, VOCABULARY, dtype=dtype)
            fold(logits, rows, new_state(GROUP, zeros), **head)
            gradient(logits, rows, *[zeros] * 4, logits, **head)
        gradient(logits.float(), rows, *[zeros] * 4, logits)
        for level in ("token", "sequence"):
            options = Options(0.2, 0.28, None, 0.0, level)
            state, table = new_state(GROUP, zeros), torch.zeros(7, GROUP)
            totals = {"loss": zeros[0], "metrics": torch.zeros(10), "rows": torch.zeros(4, GROUP)}
            terms(state, table, options, tokens=GROUP, **totals)
        slots = torch.zeros(1, GROUP, GROUP, dtype=torch.int64)
        for kind in ("kl", "k3"):
            for held in (logits.float(), logits):
                group_divergence_from_logits(
                    held.expand(GROUP, -1, -1), torch.zeros(GROUP, GROUP), slots, kind=kind, backend="triton"
                )
    for launch in device.launches:
        flags, types = launch.constants, [name.removeprefix("*") for name in launch.dtypes]
        if launch.name == "sums_kernel":
            continue
        name = launch.name.removesuffix("_kernel")
        if name == "slots":
            name += " of " + ("kl" if flags["KL"] else "k3")
        elif name == "gradient" and types[0] != types[1]:
            name += f" to {types[1]}"
        elif name == "terms":
            name += " of responses" if flags["SEQUENCE"] else ""
        name += " with bias and cap" if flags.get("BIAS") else ""
        yield _entry(launch, name, types[0], None, arch, f"{flags.get('GP', 1)}x{flags['BLOCK']}")


def _entry(launch: triton_device.Launch, name: str, dtype: str, head_dim: int | None, arch: int, tile: str) -> Entry:
    return Entry(name, dtype, head_dim, arch, tile, launch.num_warps, launch.shared_bytes, sass.read(launch.cubin))


def _label(launch: triton_device.Launch) -> str:
    flags = launch.constants
    if launch.name == "online_kernel":
        return "online" + (" attention" if flags["VALUE"] else " lse") + (" + mass" if flags["MASS"] else "")
    if launch.name == "mass_from_lse_kernel":
        return "replay" if flags["LARGE"] else "replay of small frames"
    return launch.name.removesuffix("_kernel")


def mass_overhead(entries: list[Entry]) -> Iterator[tuple[Entry, float, list[str]]]:
    """Attention with the mass against without: the entry, the ratio of main-loop instructions, what is over budget."""
    plain = {(e.dtype, e.head_dim, e.arch): e.code.loop for e in entries if e.kernel == "online attention"}
    for entry in entries:
        if entry.kernel != "online attention + mass":
            continue
        loop, base = entry.code.loop, plain[entry.dtype, entry.head_dim, entry.arch]
        ratio = loop["all"] / base["all"]
        name = f"frame mass in the main loop, {entry.dtype} d={entry.head_dim} sm_{entry.arch}"
        over = [f"{name}: {loop[k]} {k} for {base[k]}" for k in ("tensor", "shuffle", "exp") if loop[k] > base[k]]
        if ratio > MASS_BUDGET[entry.arch]:
            over.append(f"{name}: {ratio:.3f} of the instructions, at most {MASS_BUDGET[entry.arch]} allowed")
        yield entry, ratio, over


def table(entries: list[Entry]) -> str:
    head = "kernel|type|d|sm|tile|warps|registers|spills|shared KiB|blocks/SM|loop|tensor|exp|shuffle|fp32|load|store"
    lines = [f"| {' | '.join(head.split('|'))} |", "|" + "---|" * (head.count("|") + 1)]
    for e in entries:
        loop = e.code.loop
        cells = [
            e.kernel, e.dtype, e.head_dim or "", e.arch, e.tile, e.warps, e.code.registers, e.code.spills,
            f"{e.shared_bytes / 1024:.0f}", e.code.occupancy(e.arch, 32 * e.warps, e.shared_bytes),
            *(loop[k] for k in ("all", "tensor", "exp", "shuffle", "fp32", "load", "store")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--markdown", type=Path, help=f"write the table to this file as well, such as {RESULT.name}")
    options = parser.parse_args()
    entries = [
        entry
        for arch in options.arch
        for dtype in options.dtype
        for head_dim in options.head_dim
        for entry in attention_entries(head_dim, dtype, arch)
    ]
    entries += [entry for arch in options.arch for entry in logits_entries(arch)]
    lines = [table(entries), ""]
    faults = [fault for entry in entries for fault in entry.faults()]
    for entry, ratio, over in mass_overhead(entries):
        lines.append(
            f"- {entry.dtype}, d = {entry.head_dim}, sm_{entry.arch}: the mass takes the main loop of attention to "
            f"{ratio:.3f} of its instructions"
        )
        faults += over
    heading = (
        "# Static figures of the Triton kernels\n\n"
        f"`python -m benchmarks.inspection.static`, Triton {triton.__version__}.\n\n"
        "Counts are those of the main loop, of the whole kernel where it has none."
    )
    return sass.report("\n".join(lines), heading, options.markdown, faults)


if __name__ == "__main__":
    sys.exit(main())
