"""Count sketches: gradients of any number of parameters as a few thousand numbers that keep their inner products."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 24  # numbers hashed at a time: indices take 8 bytes each
CACHED = 1 << 24  # hashes of smaller models are made once


class CountSketch:
    """A random linear map R^n -> R^size: every coordinate is added, with a random sign, into a random bucket.

    For gradients a, b: E <sketch a, sketch b> = <a, b>, with standard deviation of at most sqrt(2 / size) |a| |b|
    (Charikar, Chen and Farach-Colton 2002). Deterministic by ``seed`` and the parameters' shapes and devices.

    Args:
        parameters: those that gradients are of, in their order.
        size: buckets.
    """

    def __init__(self, parameters: Sequence[Tensor], *, size: int = 8192, seed: int = 0) -> None:
        self.parameters, self.size, self.seed = list(parameters), size, seed
        small = sum(parameter.numel() for parameter in parameters) <= CACHED
        self._hashes = [list(self._hash(index)) for index in range(len(self.parameters))] if small else None

    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """(size,) fp32 on the device of the first parameter; None counts as 0."""
        total = torch.zeros(self.size, device=self.parameters[0].device)
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            part = torch.zeros(self.size, device=gradient.device)
            flat = gradient.detach().flatten()
            hashes = self._hashes[index] if self._hashes is not None else self._hash(index)
            for start, (bucket, sign) in zip(range(0, len(flat), CHUNK), hashes, strict=True):
                part.index_add_(0, bucket, sign * flat[start : start + CHUNK].float())
            total += part.to(total.device)
        return total

    def _hash(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(bucket, sign) of each chunk of a parameter's coordinates."""
        parameter = self.parameters[index]
        generator = torch.Generator(parameter.device).manual_seed(1_000_003 * self.seed + index)
        for start in range(0, parameter.numel(), CHUNK):
            count = min(CHUNK, parameter.numel() - start)
            drawn = torch.randint(2 * self.size, (count,), generator=generator, device=parameter.device)
            yield drawn >> 1, (drawn & 1).float() * 2 - 1
