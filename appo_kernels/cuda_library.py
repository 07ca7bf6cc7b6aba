"""The shared library of CUDA kernels: found, loaded with ctypes, called with the operator's name on every error.

The library has a C interface (``csrc/launch.h``): a launcher takes a pointer to its params struct, its size and
a stream. It knows nothing of torch, so one build serves every torch and Python version.

``APPO_EMULATION_LIBRARY`` names a build of the same sources for the CPU (``python -m cudasim``): backend "cuda" then
serves CPU tensors too, thread by thread on an emulated GPU. That is for testing, not for use: it is very slow.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from appo_kernels import cuda_constants, dispatch
from appo_kernels.cuda_constants import ELEMENTS
from appo_kernels.dtypes import dtype_name

FILE_NAME = "libappo_cuda.so"
DECISION_NAME = "cuda_build.txt"
LEAST_CAPABILITY = (8, 0)
LOGITS = tuple(ELEMENTS)


class CudaKernelError(RuntimeError):
    """A launch that failed: the operator, the launcher and CUDA's text."""


def path() -> Path | None:
    """The file of the library for NVIDIA GPUs, or None where it was not built."""
    return _installed(FILE_NAME)


def build_decision() -> str | None:
    """The decision of the install on the CUDA kernels, with its reason, one line; None where nothing was installed."""
    file = _installed(DECISION_NAME)
    return None if file is None else file.read_text().strip()


def _installed(name: str) -> Path | None:
    spec = importlib.util.find_spec("appo_kernels")
    # An editable install has two directories of the package: the sources, and what was built.
    for folder in (spec and spec.submodule_search_locations) or ():
        candidate = Path(folder) / name
        if candidate.exists():
            return candidate
    return None


def emulation_path() -> str | None:
    return os.environ.get("APPO_EMULATION_LIBRARY") or None


def _open(file: str | Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.appo_built_for.restype = ctypes.c_char_p
    library.appo_error_text.restype = ctypes.c_char_p
    library.appo_error_text.argtypes = [ctypes.c_int]
    cuda_constants.check(library, file)
    return library


@functools.cache
def emulation(file: str) -> ctypes.CDLL:
    return _open(file)


@functools.cache
def native() -> ctypes.CDLL | None:
    file = path()
    return None if file is None else _open(file)


def built_for() -> str | None:
    """Architectures in the library for NVIDIA GPUs, such as "sm_80 sm_90a compute_80"; None where it was not built."""
    library = native()
    return None if library is None else str(library.appo_built_for().decode())


def why_not(
    problem: dispatch.Problem,
    dtypes: Collection[torch.dtype],
    head_dims: Collection[int] = (),
    grad_head_dims: Collection[int] = (),
) -> str | None:
    """The reason that CUDA kernels cannot serve it: device, library, dtype or head size; None when they can."""
    if problem.device.type == "cpu":
        if emulation_path() is None:
            return "its kernels run on NVIDIA GPUs and these are CPU tensors"
    elif problem.device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on NVIDIA GPUs and these tensors are on {problem.device}"
    elif native() is None:
        return "the CUDA kernels were not built; install again with nvcc on PATH"
    else:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < LEAST_CAPABILITY:
            return f"it needs compute capability 8.0 or later and {problem.device} has {capability[0]}.{capability[1]}"
    if problem.dtype not in dtypes:
        names = ", ".join(dtype_name(d) for d in dtypes)
        return f"it takes {names}, not {dtype_name(problem.dtype)}"
    if head_dims and problem.head_dim not in head_dims:
        return f"it is built for head sizes {', '.join(map(str, head_dims))}, not {problem.head_dim}"
    if grad_head_dims and problem.needs_grad and problem.head_dim not in grad_head_dims:
        return f"its backward is built for head sizes {', '.join(map(str, grad_head_dims))}, not {problem.head_dim}"
    return None


def _library(device: torch.device) -> ctypes.CDLL:
    file = emulation_path()
    library = emulation(file) if device.type == "cpu" and file else native()
    assert library is not None, "unsupported() is asked first"
    return library


def call(op: str, launcher: str, params: ctypes.Structure, device: torch.device) -> None:
    """Run ``launcher`` with ``params`` on the current stream of ``device``.

    Raises CudaKernelError with the name of the operator and CUDA's text when the launch fails.
    """
    library = _library(device)
    function = getattr(library, launcher)
    pointer = ctypes.byref(params)
    size = ctypes.c_size_t(ctypes.sizeof(params))
    if device.type == "cuda":
        with torch.cuda.device(device):
            error = function(pointer, size, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    else:
        error = function(pointer, size, None)
    if error:
        text = library.appo_error_text(error).decode()
        raise CudaKernelError(f"{op}: {launcher} failed: {text} (CUDA error {error})")


def next_best(op: str, tensor: Tensor) -> ModuleType:
    """Fallback module for operators without a CUDA kernel: Triton on GPUs if it can serve the dtype, or torch."""
    problem = dispatch.Problem(op, tensor.device, tensor.dtype)
    on_gpu = tensor.device.type == "cuda" and dispatch.why_not(problem, "triton") is None
    module = dispatch.implementation(op, "triton" if on_gpu else "torch")
    assert module is not None
    return module


def pointer(tensor: Tensor | None) -> int | None:
    """The address for a params struct; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


class Params(ctypes.Structure):
    """A params struct; ``_fields_`` repeat those of the header of the same stem in csrc/, in order."""

    def __init__(self, **values: object) -> None:
        names = [field[0] for field in self._fields_]
        missing = set(names) - set(values)
        if missing:
            raise TypeError(f"{type(self).__name__} lacks {', '.join(sorted(missing))}")
        super().__init__(**{k: pointer(v) if isinstance(v, Tensor) else v for k, v in values.items()})
