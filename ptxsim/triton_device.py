"""The simulator as Triton's device: kernels are compiled for a GPU as always and their PTX runs on CPU tensors.

    with triton_device.simulated(arch=80, seed=0) as device:
        some_kernel[grid](tensor, ...)         # any code that launches Triton kernels on CPU tensors
    device.launches                            # what was launched, with the compiled kernels

``execute=False`` compiles and records without running: the way to look at the code for an architecture that the
simulator does not execute.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase
from triton.runtime import driver as drivers
from triton.runtime.cache import get_cache_manager

from ptxsim.machine import Statistics, launch
from ptxsim.memory import Pointer
from ptxsim.parser import Program, parse

EXECUTABLE = (80, 86, 89, 90, 100)


@dataclass(frozen=True)
class Launch:
    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    constants: dict[str, Any]  # the constexpr arguments
    dtypes: tuple[str, ...]  # types of the other arguments: "*bf16", "i32"
    ptx: Path
    cubin: Path
    statistics: Statistics | None  # None when it was not executed


@dataclass
class SimulatedDevice(DriverBase):
    """A Triton driver. ``host_memory`` tells launchers that tensors of the CPU are what it works on."""

    arch: int = 80
    seed: int | None = None
    execute: bool = True
    launches: list[Launch] = field(default_factory=list)
    host_memory: bool = True

    def __post_init__(self) -> None:
        if self.execute and self.arch not in EXECUTABLE:
            raise ValueError(
                f"arch: expected one of {EXECUTABLE}, got {self.arch}. Pass execute=False to compile only."
            )
        self.launcher_cls: Callable[..., Any] = _Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30, "multiprocessor_count": 108},
            load_binary=lambda name, binary, shared, device: (None, name, 0, 0, 1024),  # no module: nothing to unload
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"ptxsim sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the simulator has no C++ launcher")

    def get_benchmarker(self) -> Benchmarker:
        raise NotImplementedError("a simulated kernel has no time: leave autotuning off")


class _Launcher:
    """The function that Triton calls to launch one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        names = list(source.signature)
        self.constants = {
            (names[path[0]] if isinstance(path[0], int) else path[0]): value for path, value in source.constants.items()
        }
        self.types = tuple(source.signature.values())
        cache = get_cache_manager(metadata.hash)
        self.ptx, self.cubin = (Path(str(cache.get_file(f"{metadata.name}.{end}"))) for end in ("ptx", "cubin"))

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: str,
        packed: Any,
        info: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        device = drivers.active
        assert isinstance(device, SimulatedDevice)
        statistics, threads = None, 32 * self.metadata.num_warps
        if device.execute and x * y * z:
            values = [_argument(a) for a, type in zip(args, self.types, strict=True) if type != "constexpr"]
            statistics = launch(
                _program(self.ptx),
                (x, y, z),
                (threads, 1, 1),
                values,
                shared_bytes=self.metadata.shared,
                seed=device.seed,
            )
        device.launches.append(
            Launch(
                self.metadata.name,
                (x, y, z),
                self.metadata.num_warps,
                self.metadata.shared,
                self.constants,
                tuple(type for type in self.types if type != "constexpr"),
                self.ptx,
                self.cubin,
                statistics,
            )
        )


@functools.lru_cache(maxsize=64)
def _program(path: Path) -> Program:
    return parse(path.read_text())


def _argument(value: Any) -> Pointer | int | float:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"the simulator works on CPU tensors, got one on {value.device}")
        return Pointer(_storage(value), int(value.storage_offset()) * value.element_size())
    if value is None:
        return 0
    return int(value) if isinstance(value, bool) else value


def _storage(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """All bytes of the tensor's storage."""
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return flat.numpy()


@contextlib.contextmanager
def simulated(*, arch: int = 80, seed: int | None = None, execute: bool = True) -> Iterator[SimulatedDevice]:
    """Make the simulator Triton's active device inside the block."""
    device = SimulatedDevice(arch, seed, execute)
    before = drivers._active
    drivers.set_active(device)
    try:
        yield device
    finally:
        drivers._active = before


def compile_only(kernel: Any, arch: int, grid: Sequence[int], *args: Any, **options: Any) -> Launch:
    """Compile ``kernel`` for ``arch`` as a launch with these arguments would, without running it."""
    with simulated(arch=arch, execute=False) as device:
        kernel[tuple(grid)](*args, **options)
    return device.launches[-1]


__all__ = ["Launch", "SimulatedDevice", "compile_only", "simulated"]
