"""Tensors of more than 2^31 elements in sparse files, of which only what is written takes room."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

INTEGERS = {torch.bfloat16: np.int16, torch.float32: np.int32}


class SparseFiles:
    """Makes such tensors in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """(size,)"""
        path = self.folder / str(len(list(self.folder.iterdir())))
        return torch.from_numpy(np.memmap(path, INTEGERS[dtype], "w+", shape=(size,))).view(dtype)

    def contiguous(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros of more than 2^31 elements."""
        assert math.prod(shape) > 1 << 31
        return self.zeros(math.prod(shape), dtype).view(*shape)

    def spread(self, tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
        """A tensor like the given one, with elements further apart."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        assert size > 1 << 31
        return self.zeros(size, tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
