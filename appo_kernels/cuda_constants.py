"""Constants of csrc/ that Python repeats. A library whose own differ is refused when it is loaded."""

import ctypes
from pathlib import Path

import torch

from appo_kernels.dtypes import K3_CLAMP

HEAD_DIMS, GRAD_HEAD_DIMS = (64, 80, 96, 128, 256), (64, 128)  # of attention, and of its backward: csrc/head_dims.h
FRAME_TILE = 32  # keys per entry of `FrameIds.range`: csrc/frame_ids.h
KEY_TILE = 64  # keys of the largest tile of a kernel: csrc/attention_tiles.cuh
ROW_TILE = 64  # query rows of a block: csrc/attention_tiles.cuh
ROW_PADDING = 64  # rows of what the backward's two passes share: csrc/attention_backward.h
DIVERGENCE_CHUNK = 8192  # tokens of the vocabulary per block: csrc/group_divergence.h
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # numbers of dtypes: csrc/launch.h


class StaleLibraryError(RuntimeError):
    """A library that was built from other sources than this package: its file and the constants that differ."""


class _Constant(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_double))


def expected() -> dict[str, tuple[float, ...]]:
    """By name, the values that a library must have."""
    return {
        "FRAME_TILE": (FRAME_TILE,),
        "KEY_TILE": (KEY_TILE,),
        "ROW_TILE": (ROW_TILE,),
        "ROW_PADDING": (ROW_PADDING,),
        "DIVERGENCE_CHUNK": (DIVERGENCE_CHUNK,),
        "DIVERGENCE_CLAMP": (K3_CLAMP,),
        "ELEMENTS": tuple(ELEMENTS.values()),
        "HEAD_DIMS": HEAD_DIMS,
        "GRAD_HEAD_DIMS": GRAD_HEAD_DIMS,
    }


def exported(library: ctypes.CDLL) -> dict[str, tuple[float, ...]]:
    """By name, the values in ``library``; empty for one from before it exported them."""
    if not hasattr(library, "appo_constants"):
        return {}
    first = ctypes.POINTER(_Constant)()
    count = library.appo_constants(ctypes.byref(first))
    found: dict[str, tuple[float, ...]] = {}
    for i in range(count):
        name = first[i].name.decode()
        found[name] = (*found.get(name, ()), first[i].value)
    return found


def check(library: ctypes.CDLL, file: str | Path) -> None:
    """Raise StaleLibraryError if a constant is another in ``library``, or in one of the two places only."""
    ours, theirs = expected(), exported(library)
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differing:
        told = "; ".join(
            f"{name} is {_text(theirs.get(name))} there and {_text(ours.get(name))} here" for name in differing
        )
        raise StaleLibraryError(
            f"{file}: expected the CUDA kernels of this version of appo_kernels, got a build of other sources: {told}. "
            "Install again (pip install --force-reinstall --no-deps appo, or pip install -e . in a checkout)."
        )


def _text(values: tuple[float, ...] | None) -> str:
    return "missing" if values is None else " ".join(f"{value:g}" for value in values)
