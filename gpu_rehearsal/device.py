"""``rehearse``: torch.cuda, Triton's launches and the CUDA library of a GPU that is not there."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from gpu_rehearsal import tensors
from gpu_rehearsal.recording import MIXED, SYNC, Recording

# An H100, whose architecture has tilings of its own.
PROPERTIES = types.SimpleNamespace(
    name="a pretended NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    L2_cache_size=50 << 20,
)  # fmt: skip


class _Any:
    """torch.cuda's objects that code only passes around: streams, events, contexts."""

    cuda_stream = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> "_Any":
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def record(self, stream: Any = None) -> None:
        return None

    def wait_stream(self, stream: Any) -> None:
        return None

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        tensors.recording().note(SYNC, "synchronize")


@contextlib.contextmanager
def rehearse(recording: Recording | None = None) -> Iterator[Recording]:
    """A pretended H100 for torch, Triton and the CUDA kernels of ``appo_kernels``; what happens is recorded."""
    import triton
    from torch._library.custom_ops import OPDEFS

    from appo_kernels import cuda_library, dispatch

    found = recording or Recording()
    tensors._operators.update({name: made._init_fn for name, made in OPDEFS.items() if name.startswith("appo::")})

    def wait(device: Any = None) -> None:
        found.note(SYNC, "torch.cuda.synchronize")

    def launch_triton(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        shape = grid(named) if callable(grid) else grid
        _check_arguments(found, self.fn.__name__, arguments)
        found.launch(self.fn.__name__, shape, arguments, options)

    def launch_cuda(op: str, launcher: str, params: Any, device: Any) -> None:
        found.launch(launcher, (1,), (), {"op": op})

    make_generator, make_autocast = torch.Generator, torch.amp.autocast_mode.autocast.__init__

    def autocast(self: Any, device_type: str, *arguments: Any, **options: Any) -> None:
        # C++ chooses by the device that it knows.
        make_autocast(self, "cpu" if device_type == "cuda" else device_type, *arguments, **options)

    cuda = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "is_initialized": lambda: True, "init": lambda: None,
        "get_device_capability": lambda device=None: (9, 0), "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name, "synchronize": wait, "empty_cache": lambda: None,
        "current_stream": lambda device=None: _Any(), "device": _Any, "Event": _Any, "Stream": _Any, "stream": _Any,
        "set_device": lambda device: None, "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0, "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30), "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None, "is_bf16_supported": lambda *arguments: True, "_sleep": lambda cycles: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }  # fmt: skip

    def on_host(ask: Any) -> Any:
        return lambda *kinds: ask(*("cpu" if kind == "cuda" else kind for kind in kinds))

    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(triton.runtime.jit.JITFunction, "run", launch_triton))
        stack.enter_context(mock.patch.object(cuda_library, "call", launch_cuda))
        stack.enter_context(mock.patch.object(cuda_library, "native", lambda: object()))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device=None: make_generator("cpu")))
        stack.enter_context(mock.patch.object(torch.amp.autocast_mode.autocast, "__init__", autocast))
        for asks in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, asks, on_host(getattr(torch, asks))))
        for has in ("is_flash_attention_available", "is_built"):
            stack.enter_context(mock.patch.object(torch.backends.cuda, has, lambda: True))
        health = "_accelerator_graph_capture_health_check"
        if hasattr(torch.optim.Optimizer, health):
            stack.enter_context(mock.patch.object(torch.optim.Optimizer, health, lambda self: None))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        for cached in (dispatch._automatic, dispatch.why_not):
            clear = getattr(cached, "cache_clear", None)
            if clear is not None:
                clear()
                stack.callback(clear)
        tensors._active.append(found)
        stack.callback(tensors._active.pop)
        stack.enter_context(tensors.Names())
        stack.enter_context(tensors.Operations())
        yield found


def _check_arguments(found: Recording, kernel: str, arguments: Any) -> None:
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and not isinstance(value, tensors.GpuTensor):
            found.note(MIXED, f"{kernel}, argument {i}, is on the host")
