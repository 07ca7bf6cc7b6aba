"""Fused operators for attention statistics and policy optimisation: Triton, CUDA and a fast PyTorch path."""

__version__ = "0.1.0"
