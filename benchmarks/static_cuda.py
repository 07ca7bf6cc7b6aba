"""What the CUDA kernels cost before they run: python -m benchmarks.static_cuda [--arch 80 90a] [--head-dim 64 128].

Compiles each kernel by itself with nvcc and prints registers and spills, as ``benchmarks.static`` does for Triton.
Needs nvcc and no GPU. Exits with 1 when a kernel spills.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import sass

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
FORWARD_PARAMS, BACKWARD_PARAMS = "AttentionForwardParams", "AttentionBackwardParams"
HEAD_DIMS, GRAD_HEAD_DIMS = (64, 80, 96, 128, 256), (64, 128)


@dataclass(frozen=True)
class Kernel:
    name: str
    header: str
    instance: str  # template arguments and all, T for the element type
    params: str


@dataclass(frozen=True)
class Facts:
    kernel: str
    arch: str
    registers: int
    spills: int


def kernels(head_dim: int) -> list[Kernel]:
    found = [
        Kernel(
            f"attention forward d={head_dim}",
            "attention_forward.cuh",
            f"attention_forward<T, {head_dim}, true>",
            FORWARD_PARAMS,
        ),
        Kernel(
            f"mass in one pass d={head_dim}",
            "attention_forward.cuh",
            f"attention_forward<T, {head_dim}, false>",
            FORWARD_PARAMS,
        ),
        Kernel(f"mass replay d={head_dim}", "frame_mass.cuh", f"frame_mass_replay<T, {head_dim}>", "FrameMassParams"),
    ]
    if head_dim in GRAD_HEAD_DIMS:
        for part in ("rows", "keys"):
            instance = f"attention_backward_{part}<T, {head_dim}, true>"
            found.append(
                Kernel(f"attention backward, {part} d={head_dim}", "attention_backward.cuh", instance, BACKWARD_PARAMS)
            )
    return found


ROW_KERNELS = [
    Kernel("surrogate rows", "weighted_surrogate.cuh", "surrogate_rows<T>", "SurrogateParams"),
    Kernel("surrogate gradient", "weighted_surrogate.cuh", "surrogate_gradient<T>", "SurrogateParams"),
    Kernel("divergence", "group_divergence.cuh", "divergence_chunks<T>", "DivergenceParams"),
]


def compiled(kernel: Kernel, arch: str, folder: Path, element: str = "__nv_bfloat16") -> Path:
    """A cubin that holds this kernel alone."""
    source = folder / "kernel.cu"
    source.write_text(
        f'#include "{kernel.header}"\nusing T = {element};\n'
        f"template __global__ void appo::{kernel.instance}(const __grid_constant__ appo::{kernel.params});\n"
    )
    target = folder / "kernel.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{SOURCES}", "-cubin", "-o", str(target)]
    # As the build does: one front end for all architectures.
    command += ["-gencode", f"arch=compute_80,code=sm_{arch}", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc could not compile {kernel.name} for sm_{arch}:\n{result.stderr}")
    return target


def facts(kernel: Kernel, arch: str) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        cubin = compiled(kernel, arch, Path(folder))
        code = sass.read(cubin)
        return Facts(kernel.name, arch, code.registers, code.spills)


def table(rows: list[Facts]) -> str:
    head = ["kernel (bf16)", "sm", "registers", "spills"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.kernel, row.arch, row.registers, row.spills]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90a", "100a"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS), choices=HEAD_DIMS)
    options = parser.parse_args()
    wanted = [k for d in options.head_dim for k in kernels(d)] + ROW_KERNELS
    rows = [facts(kernel, arch) for arch in options.arch for kernel in wanted]
    print(table(rows))
    spilling = [f"{row.kernel} sm_{row.arch}: {row.spills} instructions spill registers" for row in rows if row.spills]
    print(*spilling, sep="\n", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
