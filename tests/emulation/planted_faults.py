"""Faults planted in a copy of csrc/: what is changed, and by what it must be caught.

Each is a mistake that one makes when writing such a kernel. The text to be replaced must occur exactly once in its
file, so a fault that no longer applies fails its test.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from cudasim import SOURCES

FORWARD, TILES = "attention_forward.cuh", "attention_tiles.cuh"
ROWS, KEYS = "attention_backward_rows.cuh", "attention_backward_keys.cuh"


@dataclass(frozen=True)
class Fault:
    name: str
    operator: str  # which recorded calls are played
    file: str
    old: str
    new: str
    caught_by: str  # "result" | "schedule" | "message" | "counters" | "address" | "race" | "ptx"
    message: str = ""  # what the emulated GPU says, for "message"

    @property
    def slow(self) -> bool:
        """One of each kind is for every change; the sanitizers need builds that take several times longer."""
        return self.caught_by in ("address", "race") or self.name in LATER


FAULTS = [
    Fault(
        "missing barrier before a stage is read",
        "frame_attention", FORWARD,
        "    __syncthreads();\n    start_stage(index", "    start_stage(index",
        "schedule",
    ),
    Fault(
        "wait that lets one group too many be in flight",
        "frame_attention", FORWARD,
        "kStages - 2>();\n    __syncthreads();\n    start", "kStages - 1>();\n    __syncthreads();\n    start",
        "result",
    ),
    Fault(
        "stage overwritten while it is read",
        "frame_attention", FORWARD,
        "start_stage(index + kStages - 1, free_stage);", "start_stage(index + kStages - 1, stage);",
        "result",
    ),
    Fault(
        "missing __syncwarp between the writes and reads of a staging area",
        "frame_attention", TILES,
        "  __syncwarp();\n  constexpr int kChunks", "  constexpr int kChunks",
        "schedule",
    ),
    Fault(
        "off by one at the last key",
        "frame_attention", "visibility.cuh",
        "min(v.last_key[index], keys - 1) : keys - 1", "min(v.last_key[index], keys - 1) : keys",
        "result",
    ),
    Fault(
        "row read beyond the end of a matrix",
        "frame_attention", TILES,
        "i * kStep < left);", "i * kStep <= left);",
        "address",
    ),
    Fault(
        "every lane of a quad writes the frame sum",
        "frame_attention", FORWARD,
        "if (threadIdx.x % 4 != 0 || half >= existing", "if (half >= existing",
        "result",
    ),
    Fault(
        "forgotten correction of a carried sum",
        "frame_attention", FORWARD,
        "      carried.total[half] *= correction;\n", "",
        "result",
    ),
    Fault(
        "tiles without permuted chunks",
        "frame_attention", TILES,
        "(chunk ^ fold(row))", "chunk",
        "counters",
    ),
    Fault(
        "query buffers of two heads for three stages",
        "frame_mass", "frame_mass.cuh",
        "load_tile<D, kRows>(query_tiles + ahead.head % kStages", "load_tile<D, kRows>(query_tiles + ahead.head % 2",
        "result",
    ),
    Fault(
        "missing barrier before the sums of warps are read",
        "surrogate", "weighted_surrogate.cuh",
        "  __syncthreads();\n  if (threadIdx.x != 0) return;", "  if (threadIdx.x != 0) return;",
        "result",
    ),
    Fault(
        "16-byte loads of a row that starts anywhere",
        "surrogate", "logit_rows.cuh",
        "return min(head, length);", "return 0 * min(head, length);",
        "message", "misaligned address in load of 16 bytes",
    ),
    Fault(
        "elements after the last whole vector forgotten",
        "surrogate", "logit_rows.cuh",
        "if (tail + thread < length) {", "if (tail + thread < length - 1) {",
        "result",
    ),
    Fault(
        "threads without work leave before the reduction",
        "divergence", "logit_rows.cuh",
        "  x = warp_sum(x);\n", "  if (threadIdx.x == 40) return 0.f;\n  x = warp_sum(x);\n",
        "message", "deadlock",
    ),
    Fault(
        "missing barrier before a stage of the pass over keys is read",
        "backward", KEYS,
        "advance(at)) {\n    platform::wait_for_copies<kStages - 2>();\n    __syncthreads();\n",
        "advance(at)) {\n    platform::wait_for_copies<kStages - 2>();\n",
        "schedule",
    ),
    Fault(
        "too weak a wait in the pass over rows",
        "backward", ROWS,
        "kStages - 2>();\n      __syncthreads();\n      start_stage();",
        "kStages - 1>();\n      __syncthreads();\n      start_stage();",
        "result",
    ),
    Fault(
        "a lane's dot read by another without a barrier",
        "backward", ROWS,
        "    if constexpr (kWithValue) __syncwarp();  // a row's `dots`", "    // a row's `dots`",
        "race",
    ),
    Fault(
        "one thread too many in the mean over heads",
        "frame_attention", "head_mean.cu",
        "if (element >= elements) return;", "if (element > elements) return;",
        "address",
    ),
    Fault(
        "race on a stage",
        "frame_attention", FORWARD,
        "    __syncthreads();\n    start_stage(index", "    start_stage(index",
        "race",
    ),
]  # fmt: skip
# Faults of the inline assembly, which the emulation never runs: only executing the PTX can catch them.
PTX_FAULTS = [
    Fault(
        "operands of mma in the wrong order",
        "frame_attention",
        "platform.h",
        """f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}""",
        """f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}""",
        "ptx",
    ),
    Fault(
        "operands of mma in the wrong order, fp16",
        "frame_attention in fp16",
        "platform.h",
        """f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}""",
        """f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}""",
        "ptx",
    ),
    Fault(
        "halves of a packed pair exchanged",
        "frame_attention",
        "platform.h",
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));',
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(low), "f"(high));',
        "ptx",
    ),
    Fault(
        "wait for one group of copies too few",
        "frame_attention",
        "platform.h",
        '"n"(kGroupsLeft)',
        '"n"(kGroupsLeft + 1)',
        "ptx",
    ),
]


def planted(fault: Fault | None, folder: Path, element: str = "__nv_bfloat16") -> Path:
    """A copy of csrc/ in ``folder``, with the fault.

    Attention is built for one element type and head size: enough to show a fault, and compiled in a fifth of the time.
    """
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    launch = sources / "attention_launch.h"
    text = launch.read_text()
    begin, end = text.index("#define APPO_FOR_ELEMENT"), text.index("namespace appo {")
    number = {"__nv_bfloat16": "kBfloat16", "__half": "kFloat16"}[element]
    only = (
        "#define APPO_FOR_HEAD_DIM(function, params, stream) \\\n"
        f"  ((params).head_dim == 64 && (params).element == appo::{number} \\\n"
        f"       ? function<{element}, 64>(params, stream) : cudaErrorInvalidValue)\n\n"
    )
    launch.write_text(text[:begin] + only + text[end:])
    if fault is not None:
        file = sources / fault.file
        text = file.read_text()
        assert text.count(fault.old) == 1, (
            f"{fault.name}: its text occurs {text.count(fault.old)} times in {fault.file}"
        )
        file.write_text(text.replace(fault.old, fault.new))
    return sources


LATER = (
    "too weak a wait in the pass over rows",
    "tiles without permuted chunks",
    "stage overwritten while it is read",
    "missing __syncwarp between the writes and reads of a staging area",
    "every lane of a quad writes the frame sum",
    "forgotten correction of a carried sum",
    "query buffers of two heads for three stages",
)
