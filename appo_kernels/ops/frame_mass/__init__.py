"""Attention probability that query rows spend on each video frame."""

from appo_kernels.ops.frame_mass.op import frame_mass

__all__ = ["frame_mass"]
