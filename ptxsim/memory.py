"""Global and shared memory: flat bytes, with every access checked for bounds and alignment."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ptxsim.values import UNSIGNED, Array

GLOBAL_BASE = 1 << 40
SHARED_BASE = 1 << 60  # where the shared window lies in generic addresses
GAP = 512  # bytes between two global allocations; also their alignment
LARGE, PAGE = 1 << 28, 1 << 12


@dataclass(frozen=True)
class Pointer:
    """A pointer argument into the middle of an array: byte ``offset`` of ``array``."""

    array: Array
    offset: int = 0


class _Memory:
    def __init__(self, size: int, fill: int) -> None:
        self.bytes = np.full(-(-size // 256) * 256, fill, np.uint8)

    def _load(self, offsets: Array, size: int, count: int) -> Array:
        """``count`` elements of ``size`` bytes at each byte offset -> (threads, count), unsigned."""
        return self.bytes.view(UNSIGNED[size * 8]).reshape(-1, count)[offsets // (size * count)]

    def _store(self, offsets: Array, values: Array) -> None:
        count = values.shape[1]
        self.bytes.view(values.dtype).reshape(-1, count)[offsets // (values.itemsize * count)] = values


def _check_alignment(offsets: Array, size: int, space: str) -> None:
    wrong = offsets % size != 0
    if wrong.any():
        raise IndexError(f"misaligned {size}-byte access to {space} memory at {int(offsets[wrong][0]):#x}")


def _same(a: Array, b: Array) -> bool:
    """Whether two arrays are the same memory: two views of one buffer must be one allocation."""
    return a.ctypes.data == b.ctypes.data and a.nbytes == b.nbytes


class GlobalMemory(_Memory):
    """A heap of the arrays passed to the kernel, with unmapped gaps between them.

    Arrays of LARGE bytes or more lie behind the others, and of these only the pages that a kernel touches are copied:
    an array with strides beyond 31 bits costs what is used of it.
    """

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays: list[Array] = []
        starts, ends, position = [], [], GAP
        for array in sorted(arrays, key=lambda array: array.nbytes >= LARGE):
            if any(_same(array, known) for known in self.arrays):
                continue
            if not array.flags.c_contiguous:
                raise ValueError("arrays must be contiguous; pass the whole storage and a Pointer into it")
            unit = PAGE if array.nbytes >= LARGE else GAP
            position = -(-position // unit) * unit
            self.arrays.append(array)
            starts.append(position)
            ends.append(position + array.nbytes)
            position = ends[-1] + GAP
        self.starts, self.ends = np.array(starts, np.int64), np.array(ends, np.int64)
        small = [array.nbytes < LARGE for array in self.arrays]
        self.whole = sum(small)  # how many arrays are copied whole
        self.border = -(-(ends[self.whole - 1] if self.whole else 0) // PAGE) * PAGE
        super().__init__(self.border, 0xFF)
        self.frames = np.full(max(0, position - self.border) // PAGE + 1, -1, np.int64)  # page -> where it is in bytes
        for array, start, end in self._copied_whole():
            self.bytes[start:end] = array.reshape(-1).view(np.uint8)

    def _copied_whole(self) -> Iterator[tuple[Array, int, int]]:
        return zip(self.arrays[: self.whole], self.starts, self.ends, strict=False)

    def address(self, pointer: Pointer) -> int:
        index = next(i for i, array in enumerate(self.arrays) if _same(array, pointer.array))
        return GLOBAL_BASE + int(self.starts[index]) + pointer.offset

    def copy_back(self) -> None:
        for array, start, end in self._copied_whole():
            array.reshape(-1).view(np.uint8)[:] = self.bytes[start:end]
        for page in np.nonzero(self.frames >= 0)[0]:
            part, place = self._page(int(page)), int(self.frames[page])
            part[:] = self.bytes[place : place + part.size]

    def _page(self, page: int) -> Array:
        """The bytes of a large array that lie on ``page``."""
        start = self.border + page * PAGE
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = start - int(self.starts[index])
        part: Array = self.arrays[index].reshape(-1).view(np.uint8)[offset : offset + PAGE]
        return part

    def _offsets(self, addresses: Array, size: int) -> Array:
        _check_alignment(addresses, size, "global")
        offsets = addresses - GLOBAL_BASE
        array = np.searchsorted(self.starts, offsets, side="right") - 1
        wrong = (array < 0) | (offsets + size > self.ends[array])
        if wrong.any():
            first = int(offsets[wrong][0])
            raise IndexError(f"global memory out of bounds: {size} bytes at {first:#x}, {self._nearest(first)}")
        return offsets if self.whole == len(self.arrays) else self._in_frames(offsets)

    def _in_frames(self, offsets: Array) -> Array:
        """Places of offsets in ``bytes``; pages that are touched for the first time are copied."""
        far = offsets >= self.border
        pages = np.where(far, offsets - self.border, 0) // PAGE
        for page in np.unique(pages[far]):
            if self.frames[page] < 0:
                self.frames[page] = self.bytes.size
                part = self._page(int(page))
                self.bytes = np.concatenate([self.bytes, part, np.full(PAGE - part.size, 0xFF, np.uint8)])
        return np.where(far, self.frames[pages] + (offsets - self.border) % PAGE, offsets)

    def _nearest(self, offset: int) -> str:
        distances = np.maximum(self.starts - offset, offset - self.ends + 1)
        index = int(np.argmin(distances))
        array = self.arrays[index]
        return f"{int(distances[index])} bytes outside array {index} {array.dtype}{array.shape}"

    def load(self, addresses: Array, size: int, count: int) -> Array:
        return self._load(self._offsets(addresses, size * count), size, count)

    def store(self, addresses: Array, values: Array) -> None:
        self._store(self._offsets(addresses, values.itemsize * values.shape[1]), values)

    def add(self, addresses: Array, values: Array) -> None:
        """Atomic addition; returns nothing, lanes in order."""
        offsets = self._offsets(addresses, values.itemsize) // values.itemsize
        np.add.at(self.bytes.view(values.dtype), offsets, values)


class SharedMemory(_Memory):
    """The shared memories of all blocks; bytes nobody wrote are 0xff, so floats there are NaN."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // 256) * 256
        super().__init__(blocks * self.stride, 0xFF)

    def offsets(self, block: Array, addresses: Array, size: int) -> Array:
        wrong = (addresses < 0) | (addresses + size > self.size)
        if wrong.any():
            raise IndexError(
                f"shared memory out of bounds: {size} bytes at {int(addresses[wrong][0])} of {self.size} bytes"
            )
        _check_alignment(addresses, size, "shared")
        return block * self.stride + addresses

    def load(self, block: Array, addresses: Array, size: int, count: int) -> Array:
        return self._load(self.offsets(block, addresses, size * count), size, count)

    def store(self, block: Array, addresses: Array, values: Array) -> Array:
        """Returns where in ``bytes`` the values are."""
        offsets = self.offsets(block, addresses, values.itemsize * values.shape[1])
        self._store(offsets, values)
        return offsets
