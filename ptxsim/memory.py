"""Global and shared memory: flat bytes, with every access checked for bounds and alignment."""

from dataclasses import dataclass

import numpy as np

from ptxsim.values import UNSIGNED, Array

GLOBAL_BASE = 1 << 40
SHARED_BASE = 1 << 60  # where the shared window lies in generic addresses
GAP = 512  # bytes between two global allocations; also their alignment


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
    """A heap of the arrays passed to the kernel, with unmapped gaps between them."""

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays: list[Array] = []
        starts, ends, position = [], [], GAP
        for array in arrays:
            if any(_same(array, known) for known in self.arrays):
                continue
            if not array.flags.c_contiguous:
                raise ValueError("arrays must be contiguous; pass the whole storage and a Pointer into it")
            self.arrays.append(array)
            starts.append(position)
            ends.append(position + array.nbytes)
            position = -(-ends[-1] // GAP) * GAP + GAP
        self.starts, self.ends = np.array(starts, np.int64), np.array(ends, np.int64)
        super().__init__(position, 0xFF)
        for array, start, end in zip(self.arrays, starts, ends, strict=True):
            self.bytes[start:end] = array.reshape(-1).view(np.uint8)

    def address(self, pointer: Pointer) -> int:
        index = next(i for i, array in enumerate(self.arrays) if _same(array, pointer.array))
        return GLOBAL_BASE + int(self.starts[index]) + pointer.offset

    def copy_back(self) -> None:
        for array, start, end in zip(self.arrays, self.starts, self.ends, strict=True):
            array.reshape(-1).view(np.uint8)[:] = self.bytes[start:end]

    def _offsets(self, addresses: Array, size: int) -> Array:
        _check_alignment(addresses, size, "global")
        offsets = addresses - GLOBAL_BASE
        array = np.searchsorted(self.starts, offsets, side="right") - 1
        wrong = (array < 0) | (offsets + size > self.ends[array])
        if wrong.any():
            first = int(offsets[wrong][0])
            raise IndexError(f"global memory out of bounds: {size} bytes at {first:#x}, {self._nearest(first)}")
        return offsets

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

    def _offsets(self, block: Array, addresses: Array, size: int) -> Array:
        wrong = (addresses < 0) | (addresses + size > self.size)
        if wrong.any():
            raise IndexError(
                f"shared memory out of bounds: {size} bytes at {int(addresses[wrong][0])} of {self.size} bytes"
            )
        _check_alignment(addresses, size, "shared")
        return block * self.stride + addresses

    def load(self, block: Array, addresses: Array, size: int, count: int) -> Array:
        return self._load(self._offsets(block, addresses, size * count), size, count)

    def store(self, block: Array, addresses: Array, values: Array) -> None:
        self._store(self._offsets(block, addresses, values.itemsize * values.shape[1]), values)
