"""Backends that tests of operators run with. Without a GPU, "cuda" is served by the emulated one (``cudasim``)."""

import os
from unittest import mock

import torch

import cudasim
from appo_kernels.dispatch import Problem, why_not


def served(op: str, *, head_dim: int = 0, needs_grad: bool = True) -> list[tuple[str, str]]:
    """(backend, device) pairs that serve ``op`` in fp32 on this machine.

    Asked while tests are collected, when nothing may be compiled yet: that the emulated GPU can be built is enough.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    emulation = {} if cudasim.compiler() is None else {"APPO_EMULATION_LIBRARY": "built when a test runs"}
    with mock.patch.dict(os.environ, emulation):
        return [
            (backend, device)
            for device in devices
            for backend in ("torch", "triton", "cuda")
            if why_not(Problem(op, torch.device(device), torch.float32, head_dim, needs_grad), backend) is None
        ]
