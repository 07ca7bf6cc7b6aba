"""One scored group, as the picture and the page of an inspection show it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Inspection:
    """One scored group, ready to be drawn. F frames (temporal grid steps), G responses of n_i tokens each."""

    question: str
    options: tuple[str, ...]
    answer: str
    thumbnails: list[np.ndarray]  # F of (H, W, 3) uint8; several sampled frames of one frame stand above each other
    times: list[tuple[float, float]]  # F of (first, last) seconds
    selected: list[int]  # the target frames
    labelled: list[int]  # the frames that decide the question, where known
    tokens: list[list[str]]  # G of n_i
    mass: list[np.ndarray]  # G of (n_i, F)
    weights: list[np.ndarray]  # G of (n_i,)
    rewards: list[float]  # G
    accuracy: list[float]  # G

    @property
    def videos(self) -> list[int]:
        """The video that each frame belongs to, from 0; time starts anew with each."""
        begun = [i > 0 and self.times[i][0] <= self.times[i - 1][0] for i in range(len(self.times))]
        return np.cumsum(begun).tolist()

    @property
    def top_weight(self) -> float:
        """The largest finite weight, 1 where there is none."""
        finite = [weights[np.isfinite(weights)] for weights in self.weights]
        return max((float(w.max()) for w in finite if w.size), default=1.0)
