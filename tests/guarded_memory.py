"""Tensors whose memory ends where a page begins that nobody may touch."""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cudasim.player import GuardedPages


@contextlib.contextmanager
def copies(values: Sequence[Any]) -> Iterator[Callable[[Any], Any]]:
    """Inside the block, a function from each tensor among ``values`` to its copy, and from others to themselves.

    What shares memory shares it in the copies. At the end what they hold is copied back.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in values if isinstance(t, torch.Tensor)}
    pages = {at: GuardedPages(s.nbytes(), at_end=True, alignment=1) for at, s in storages.items() if s.nbytes()}
    for at, page in pages.items():
        ctypes.memmove(page.address, at, storages[at].nbytes())

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() not in pages:
            return value
        page, size = pages[value.untyped_storage().data_ptr()], value.untyped_storage().nbytes()
        held = torch.frombuffer((ctypes.c_char * size).from_address(page.address), dtype=torch.uint8)
        tensor = torch.empty(0, dtype=value.dtype)
        return tensor.set_(held.untyped_storage(), value.storage_offset(), value.shape, value.stride())

    yield copy
    for at, page in pages.items():
        ctypes.memmove(at, page.address, storages[at].nbytes())
        page.free()
