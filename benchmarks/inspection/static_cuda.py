"""Static cost of the CUDA kernels: python -m benchmarks.inspection.static_cuda [--library FILE] [--markdown FILE].

Reads the library that `pip install` built: registers, spills and shared memory of every kernel for every architecture,
and for those on bf16 the instructions of the loop over tiles (``tile_path``) and the bank conflicts that the emulation
counts. Needs g++, no GPU and no nvcc. Exits with 1 when a kernel spills or does not fit, and when attention's loop
takes more than 1.10 of the instructions of the Triton kernel's (``static.py``) for the same work on sm_80.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from appo_kernels.cuda_constants import HEAD_DIMS
from benchmarks.inspection import bank_conflicts, sass, tile_path

ROOT = Path(__file__).resolve().parents[2]
SOURCES, RESULT = ROOT / "csrc", ROOT / "benchmarks" / "results" / "static_cuda.md"
TRITON_RESULT = RESULT.with_name("static.md")
BUDGET = 1.10  # instructions of attention's loop over tiles, against Triton's for as many rows and keys
COMPARED = {"64": "sm_80", "128": "sm_80"}
ELEMENTS = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", None: ""}
MANGLED = re.compile(r"_ZN4appo\d+([a-z_]+)(?:I(13__nv_bfloat16|6__half|f)(?:Li(\d+)E)?(?:Lb([01])E)?E)?E")
SHOWN = ("sm_80", "sm_90a", "sm_100a")
# Per multiprocessor, as sass.LIMITS: shared memory of one block and of all, threads, registers.
LIMITS = {
    "sm_80": sass.LIMITS[80],
    "sm_86": (99 << 10, 100 << 10, 1536, 65536),
    "sm_89": (99 << 10, 100 << 10, 1536, 65536),
    "sm_90a": sass.LIMITS[90],
    "sm_100a": sass.LIMITS[100],
}


@dataclass(frozen=True)
class Kernel:
    name: str  # as in csrc; "mass only" for instances without values
    element: str
    head_dim: str  # "" for kernels on logits
    arch: str
    registers: int
    stack_bytes: int  # local memory of a thread; the kernels have no arrays there, so these are spilled registers
    static_shared_bytes: int  # with what the system takes on sm_90 and later
    loop: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.element, self.head_dim and f"d={self.head_dim}", self.arch)))


@dataclass(frozen=True)
class Shape:
    tile: str  # rows x keys
    threads: int
    shared_bytes: int


def kernels(library: Path, *, loops: bool = True) -> list[Kernel]:
    """Every kernel in the library, for every architecture. ``loops``: with the instructions of those on bf16."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sass.TOOLS / "cuobjdump", "-xelf", "all", library.resolve()], cwd=folder, check=True, stdout=-3)
        cubins = sorted(Path(folder).glob("*.cubin"), key=lambda path: int(path.name.split(".")[1]))
        return [kernel for cubin in cubins for kernel in _read(cubin, loops)]


def _read(cubin: Path, loops: bool) -> list[Kernel]:
    arch = cubin.name.split(".")[-2]
    paths = tile_path.read(cubin) if loops and arch in SHOWN else {}
    usage = sass.run("cuobjdump", "-res-usage", cubin)
    found = []
    for function, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        match = MANGLED.match(function)
        if not match:
            raise RuntimeError(f"{cubin.name}: expected a kernel of namespace appo, got {function}")
        name, element, head_dim, with_value = match.groups()
        mass_only = ", mass only" if with_value == "0" else ""
        loop = paths.get(function, Counter())
        numbers = int(registers), int(stack) + int(local), int(shared)
        found.append(Kernel(name + mass_only, ELEMENTS[element], head_dim or "", arch, *numbers, loop))
    return found


def shapes() -> dict[tuple[str, str], Shape]:
    """(name, head size) -> tile and launch, as the headers have them: printed by a program that includes them."""
    print_one = (
        "template <int D> void one() {\n"
        "  auto say = [](const char* name, int rows, int keys, size_t bytes) {\n"
        '    printf("%s|%d|%dx%d|%d|%zu\\n", name, D, rows, keys, kThreads, bytes);\n'
        "  };\n"
        "  using F = ForwardShape<D>; using M = ReplayShape<D>; using B = BackwardShape<D>;\n"
        '  say("attention_forward", kRows, F::kKeys, F::template shared_bytes<true>());\n'
        '  say("attention_forward, mass only", kRows, F::kKeys, F::template shared_bytes<false>());\n'
        '  say("frame_mass_replay", kRows, M::kKeys, M::shared_bytes());\n'
        '  say("attention_backward_rows", kRows, B::kStepKeys, B::template rows_shared_bytes<true>());\n'
        '  say("attention_backward_rows, mass only", kRows, B::kStepKeys, B::template rows_shared_bytes<false>());\n'
        '  say("attention_backward_keys", B::kStepRows, B::kKeys, B::template keys_shared_bytes<true>());\n'
        '  say("attention_backward_keys, mass only", B::kStepRows, B::kKeys, B::template keys_shared_bytes<false>());\n'
        "}\n"
    )
    headers = "".join(f'#include "{n}.cuh"\n' for n in ("attention_forward", "attention_backward", "frame_mass"))
    calls = "".join(f"one<{d}>();" for d in HEAD_DIMS)
    source = f"#include <cstdio>\n{headers}using namespace appo;\n{print_one}int main() {{ {calls} }}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "shapes")
        command = ["g++", "-std=c++17", "-w", f"-I{SOURCES}", "-x", "c++", "-", "-o", str(program)]
        subprocess.run(command, input=source, text=True, check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split("|") for line in lines]
    return {(name, d): Shape(tile, int(threads), int(size)) for name, d, tile, threads, size in rows}


def blocks(kernel: Kernel, shape: Shape) -> int:
    """Number of blocks that a multiprocessor holds at a time."""
    most, shared, threads, registers = LIMITS[kernel.arch]
    if shape.shared_bytes > most:
        return 0
    per_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = registers // (per_warp * (shape.threads // 32))
    return min(by_registers, threads // shape.threads, shared // (shape.shared_bytes + sass.BLOCK_RESERVED))


def conflicts() -> dict[tuple[str, str], int]:
    """(name, head size) -> bank conflicts of emulated launches."""
    return bank_conflicts.count()


def table(found: list[Kernel], launch: dict[tuple[str, str], Shape], counted: dict[tuple[str, str], int]) -> str:
    head = "kernel|type|d|sm|tile|warps|registers|spills|shared KiB|blocks/SM|loop|tensor|exp|shuffle|fp32|load|store"
    head += "|conflicts"
    lines = [f"| {' | '.join(head.split('|'))} |", "|" + "---|" * (head.count("|") + 1)]
    for kernel in found:
        key = kernel.name, kernel.head_dim
        if key not in launch or kernel.element != "bf16" or kernel.arch not in SHOWN:
            continue
        shape = launch[key]
        cells = [
            kernel.name, "bf16", kernel.head_dim, kernel.arch.removeprefix("sm_"), shape.tile, shape.threads // 32,
            kernel.registers, kernel.stack_bytes, f"{shape.shared_bytes / 1024:.0f}", blocks(kernel, shape),
            *(kernel.loop[k] for k in ("all", "tensor", "exp", "shuffle", "fp32", "load", "store")),
            counted.get(key, ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def triton_instructions(text: str, head_dim: str, arch: str, kernel: str = "online attention + mass") -> float | None:
    """Of the Triton kernel's loop in ``static.md``, for 16 rows and 64 keys of a warp."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if cells[:4] == [kernel, "bf16", head_dim, re.sub(r"\D", "", arch)]:
            rows, keys = map(int, cells[4].split("x"))
            return int(cells[10]) * (16 * int(cells[5]) / rows) * (64 / keys)
    return None


def comparison(found: list[Kernel], launch: dict[tuple[str, str], Shape]) -> tuple[list[str], list[str]]:
    """Lines on attention's loop beside Triton's, and what is over the budget."""
    lines, over = [], []
    text = TRITON_RESULT.read_text()
    for kernel in found:
        if (kernel.name, kernel.element) != ("attention_forward", "bf16") or kernel.head_dim not in COMPARED:
            continue
        theirs = triton_instructions(text, kernel.head_dim, kernel.arch)
        if not kernel.loop or theirs is None:
            continue
        keys = int(launch[kernel.name, kernel.head_dim].tile.split("x")[1])
        ours = kernel.loop["all"] * 64 / keys
        line = f"{kernel}: {ours:.0f} instructions for 16 rows and 64 keys, Triton {theirs:.0f}: {ours / theirs:.2f}"
        lines.append(f"- {line}")
        if ours / theirs > BUDGET and kernel.arch == COMPARED[kernel.head_dim]:
            over.append(f"{line}, at most {BUDGET} allowed")
    return lines, over


def faults(found: list[Kernel], launch: dict[tuple[str, str], Shape]) -> list[str]:
    wrong = [f"{k}: {k.stack_bytes} bytes of a thread's registers are spilled" for k in found if k.stack_bytes]
    for kernel in found:
        shape = launch.get((kernel.name, kernel.head_dim))
        if shape and not blocks(kernel, shape):
            wrong.append(
                f"{kernel}: {shape.shared_bytes} bytes of shared memory, {kernel.registers} registers: no block fits"
            )
    return wrong


def main() -> int:
    from appo_kernels import cuda_library

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=cuda_library.path(), help="default: the installed one")
    parser.add_argument("--markdown", type=Path, help=f"write the table to this file as well, such as {RESULT.name}")
    options = parser.parse_args()
    if options.library is None:
        parser.error("the CUDA kernels were not built; install with nvcc on PATH, or name a --library")
    found, launch = kernels(options.library), shapes()
    counted = conflicts()
    lines, over = comparison(found, launch)
    wrong = faults(found, launch) + over
    wrong += [f"{name} d={d}: {n} bank conflicts" for (name, d), n in counted.items() if n]
    archs = ", ".join(sorted({kernel.arch for kernel in found}))
    summary = f"{len(found)} kernels ({archs}), {sum(bool(k.stack_bytes) for k in found)} of them spill."
    text = "\n".join([summary, "", table(found, launch, counted), "", *lines])
    heading = "# Static figures of the CUDA kernels\n\n`python -m benchmarks.inspection.static_cuda`"
    return sass.report(text, heading, options.markdown, wrong)


if __name__ == "__main__":
    sys.exit(main())
