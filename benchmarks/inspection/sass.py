"""Contents of a compiled kernel (cubin): registers, shared memory, spills, and the instructions of its main loop.

Read with the tools that Triton ships, so it needs neither a GPU nor a CUDA toolkit.
"""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Per multiprocessor, from the CUDA programming guide: shared memory of one block and of all, threads, registers. For 80
# the block's share is that of 8.6, 8.9 and 12.x, because they run the same configurations.
LIMITS = {
    80: (99 << 10, 164 << 10, 2048, 65536),
    90: (227 << 10, 228 << 10, 2048, 65536),
    100: (227 << 10, 228 << 10, 2048, 65536),
}
BLOCK_RESERVED = 1 << 10  # shared memory that the system takes of each block

CLASSES = {
    "tensor": "HMMA IMMA DMMA QGMMA HGMMA IGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "exp": "MUFU",
    "shuffle": "SHFL",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FMNMX FMNMX3 FSETP FSEL FSET",
    "load": "LDG LDGSTS UTMALDG UBLKCP LDS LDSM LDTM",
    "store": "STG STS STSM STTM",
    "spill": "STL LDL",
}
NAMES = {name: kind for kind, names in CLASSES.items() for name in names.split()}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);")


@dataclass(frozen=True)
class Code:
    registers: int
    spills: int  # instructions that store to or load from local memory
    loop: Counter[str]  # instructions of the main loop by class; "all": their number

    def occupancy(self, arch: int, threads: int, shared_bytes: int) -> int:
        """Blocks that a multiprocessor holds at a time."""
        _, shared, most_threads, registers = LIMITS[arch]
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = registers // (per_warp * (threads // 32))
        return min(by_registers, most_threads // threads, shared // (shared_bytes + BLOCK_RESERVED))


@cache
def read(cubin: Path) -> Code:
    usage = run("cuobjdump", "-res-usage", cubin)
    match = re.search(r"REG:(\d+)", usage)
    if not match:
        raise RuntimeError(f"cuobjdump shows no register count of {cubin}: {usage}")
    instructions, labels = _disassemble(cubin)
    spills = sum(NAMES.get(base(name)) == "spill" for name, _ in instructions)
    return Code(int(match[1]), spills, _main_loop(instructions, labels))


def report(text: str, heading: str, markdown: Path | None, faults: list[str]) -> int:
    """End a command on static figures: the table printed (and written), each fault named, the exit status."""
    print(text)
    if markdown:
        markdown.write_text(f"{heading}\n\n{text}\n")
    for fault in faults:
        print("FAULT", fault, file=sys.stderr)
    return 1 if faults else 0


def run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def base(opcode: str) -> str:
    return opcode.split(".")[0]


def _disassemble(cubin: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) of each instruction of the one kernel, and label -> index of the instruction behind it."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in run("nvdisasm", "-c", cubin).splitlines():
        if match := re.match(r"\s*(\.L_x_\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := INSTRUCTION.search(line):
            instructions.append((match[2], match[3]))
    return instructions, labels


def _main_loop(instructions: list[tuple[str, str]], labels: dict[str, int]) -> Counter[str]:
    """The innermost loop with the most tensor-core (else fp32) instructions; of equals the shortest (unmasked).

    All of a kernel that has no loop.
    """
    loops = []
    for end, (opcode, operands) in enumerate(instructions):
        match = re.search(r"(\.L_x_\w+)", operands) if base(opcode) == "BRA" else None
        start = labels.get(match[1], end + 1) if match else end + 1
        if start < end:
            loops.append((start, end))
    if not loops:
        loops = [(0, len(instructions) - 1)]
    best: Counter[str] = Counter()
    for start, end in loops:
        if any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops):
            continue
        mix = Counter(NAMES.get(base(opcode), "other") for opcode, _ in instructions[start : end + 1])
        mix["all"] = end + 1 - start
        if _rank(mix) > _rank(best):
            best = mix
    return best


def _rank(mix: Counter[str]) -> tuple[int, int, int]:
    return mix["tensor"], mix["fp32"] if not mix["tensor"] else 0, -mix["all"]
