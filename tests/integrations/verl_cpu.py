"""verl on a CPU: a platform it does not have, so that its own engine runs in one process with gloo."""

import contextlib
import os
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VERL_USE_EXTERNAL_PLUGINS", "none")  # the platform comes first

import torch
import torch.distributed
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


class PlatformCPU(PlatformCUDA):
    device_name = "cpu"
    vendor_name = "none"
    device_module = SimpleNamespace(
        **{name: lambda *_, **__: 0 for name in ("memory_allocated", "memory_reserved", "max_memory_allocated")},
        mem_get_info=lambda *_: (0, 0), current_device=lambda: "cpu", is_available=lambda: True,
        synchronize=lambda *_: None, empty_cache=lambda: None, max_memory_reserved=lambda *_: 0,
        manual_seed=lambda *_: None, device_count=lambda: 1,
    )  # fmt: skip

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def empty_cache(self) -> None:
        pass

    def synchronize(self, device_index: Any = None) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())


@contextlib.contextmanager
def process(folder: Any, rank: int = 0, world: int = 1) -> Any:
    """One of ``world`` processes that meet in a folder."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )  # fmt: skip
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
