"""Matrices in shared memory as wgmma and tcgen05 take them: described by a start, two strides and a swizzle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.parser import Operand
from ptxsim.values import Array, bf16_to_float

if TYPE_CHECKING:
    from ptxsim.machine import Machine

DEPTH = 32  # bytes of the inner dimension that one product takes
# Mode of a descriptor (its three top bits) -> bytes of a row of its layout. 1 is a layout of sm_100 for tf32 alone.
SWIZZLE = {0: 16, 2: 128, 4: 64, 6: 32}


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory. Bits: 0-13 address, 16-29 leading, 32-45 stride (bytes / 16); 61-63 the swizzle."""

    start: int
    leading: int
    stride: int
    row: int  # bytes: 16 (no swizzle), 32, 64 or 128

    @staticmethod
    def decode(bits: int, version: int = 0) -> Descriptor:
        """version: bits 46-48, 0 for wgmma and 1 for tcgen05 (PTX ISA, 9.7.15.5.1 and 9.7.16.4.1)."""
        mode = bits >> 61
        # Bits 49-51, the offset of a swizzle that starts elsewhere than usual, say nothing without a swizzle.
        if mode not in SWIZZLE or (bits >> 49 & 7 and mode):
            raise NotImplementedError(f"matrix descriptor {bits:#x}: swizzle {mode}, base offset {bits >> 49 & 7}")
        if bits >> 46 & 7 != version or bits >> 52 & 0x1FF or bits & 0xC000C000:
            raise ValueError(
                f"matrix descriptor {bits:#x}: expected {version} in bits 46-48, 0 in all that are reserved"
            )
        start, leading, stride = (16 * (bits >> shift & 0x3FFF) for shift in (0, 16, 32))
        return Descriptor(start, leading, stride, SWIZZLE[mode])

    def chunks(self, length: int, *, transposed: bool) -> Array:
        """Addresses of the 16-byte chunks of a matrix of ``length`` rows (M or N) and 32 bytes of K.

        K-major: (length, 2), a chunk holds neighbours along K. Transposed, of 16-bit elements: (16, length / 8), a
        chunk holds 8 neighbours along M or N. A layout repeats a block of 8 rows of ``row`` bytes.
        """
        if not transposed:
            line, chunk = np.arange(length)[:, None], np.arange(DEPTH // 16)
            step = self.leading if self.row == 16 else 16
            address = line % 8 * self.row + line // 8 * self.stride + chunk * step
        else:
            line, chunk, wide = np.arange(16)[:, None], np.arange(length // 8), self.row // 16
            along, down = (self.stride, self.leading) if self.row == 16 else (self.leading, self.stride)
            address = line % 8 * self.row + line // 8 * down + chunk % wide * 16 + chunk // wide * along
        address = address + self.start
        return address ^ ((address >> 7) & (self.row // 16 - 1)) << 4


@functools.lru_cache(maxsize=4096)
def _addresses(bits: int, version: int, length: int, transposed: bool) -> Array:
    return Descriptor.decode(bits, version).chunks(length, transposed=transposed)


def load(
    machine: Machine, bits: Array, warps: Array, length: int, type: str, *, transposed: bool, version: int
) -> tuple[Array, Array]:
    """The matrices that descriptors of ``warps`` name, (warps, length, k) float32, and the offsets of their chunks."""
    if transposed and type == "tf32":
        raise NotImplementedError("a transposed matrix of tf32")
    tables = np.stack([_addresses(int(each), version, length, transposed) for each in bits])  # (warps, lines, chunks)
    lines = tables.reshape(warps.size, -1)
    shape, block = lines.shape, machine.proxies.block[warps]
    offsets = machine.shared.offsets(np.repeat(block, shape[1]), lines.reshape(-1), 16).reshape(shape)
    data = machine.shared.bytes.reshape(-1, 16)[offsets // 16].reshape(*tables.shape, 16)
    matrix = values_of(data.view(np.uint32), type).reshape(warps.size, tables.shape[1], -1)
    return (matrix.swapaxes(1, 2) if transposed else matrix), offsets


def values_of(words: Array, type: str) -> Array:
    """float32 values in contiguous 32-bit words: one of tf32 in each, whose low bits are ignored, or two of 16 bits."""
    if type == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return words.view(np.float16).astype(np.float32) if type == "f16" else bf16_to_float(words.view(np.uint16))


def uniform(machine: Machine, operand: Operand, type: str, warps: Array) -> Array:
    """The value that all lanes of a warp share, of each of ``warps``."""
    values = machine.read(operand, type).reshape(-1, 32)[warps]
    if (values != values[:, :1]).any():
        raise RuntimeError("lanes of a warp disagree about an operand that they must share")
    return values[:, 0]
