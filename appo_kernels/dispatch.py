"""Dispatch: the implementation that serves a call.

Every operator lives in ``appo_kernels/ops/<op>/`` and has one module per backend: ``streaming.py`` (torch),
``triton.py`` and ``cuda.py``. A backend module says in ``unsupported(problem)`` why it cannot serve a call (None: it
can). A module that does not exist is a backend the operator does not have.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from appo_kernels import backend_order

logger = logging.getLogger("appo_kernels")

# Modules of the backends. The order in which "auto" asks is of `appo_kernels.backend_order`.
MODULES = {"cuda": "cuda", "triton": "triton", "torch": "streaming"}
CHOICES = ("auto", "torch", "triton", "cuda")


@dataclass(frozen=True)
class Problem:
    """A call, as a backend sees it when asked whether it supports it."""

    op: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0  # d for the attention operators, 0 for the others
    needs_grad: bool = False
    scores: int = 0  # of an attention call, rounded up to a power of two; 0 where not known


@functools.cache
def implementation(op: str, backend: str) -> ModuleType | None:
    """The module of one backend of one operator, or None where the operator has no such backend."""
    name = f"appo_kernels.ops.{op}.{MODULES[backend]}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def backend_module(op: str, backend: str) -> ModuleType:
    """The module of a backend that ``resolve`` returned."""
    module = implementation(op, backend)
    if module is None:
        raise ValueError(f'{op}: `backend`: expected one that the operator has, got {backend!r}. Pass "auto".')
    return module


def out_variant(name: str, *, mutates: Sequence[str]) -> Callable[[Callable[..., None]], Any]:
    """Decorator that registers a function which only writes into the buffers ``mutates`` as custom operator ``name``.

    What it writes into was allocated by its caller, so the fake, which compilers trace, has nothing to do.
    """

    def register(function: Callable[..., None]) -> Any:
        operator = torch.library.custom_op(f"appo::{name}", function, mutates_args=tuple(mutates))
        operator.register_fake(lambda *operands: None)
        return operator

    return register


def why_not(problem: Problem, backend: str) -> str | None:
    """The reason that ``backend`` cannot serve ``problem``; None when it can."""
    module = implementation(problem.op, backend)
    if module is None:
        return f"{problem.op} has no {backend} implementation"
    return module.unsupported(problem)


@functools.cache
def _automatic(problem: Problem) -> str:
    refused: list[str] = []
    for backend in backend_order.order(problem.op, problem.dtype, problem.device, problem.scores):
        reason = why_not(problem, backend)
        if reason is None and backend != "torch" and problem.device.type == "cpu":
            reason = "on the CPU it is only emulated, for tests; name it to have that"
        if reason is None:
            why = "; ".join(refused) or "first choice"
            logger.debug("%s: backend %s for %s (%s)", problem.op, backend, problem, why)
            return backend
        refused.append(f"not {backend}: {reason}")
    raise ValueError(f"{problem.op}: no backend can serve {problem}: {'; '.join(refused)}")


def constant(size: int) -> int:
    """``size`` as a plain int: torch.compile with dynamic shapes compiles again for another one."""
    if not torch.compiler.is_compiling():
        return size
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return int(guard_scalar(size))


def scores(query: torch.Tensor, key: torch.Tensor) -> int:
    """Sequences x query heads x rows x keys, rounded up to a power of two; 0 while compiling, for any size."""
    if torch.compiler.is_compiling():
        return 0
    count = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return 1 << max(0, count - 1).bit_length()


def resolve(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 0,
    needs_grad: bool = False,
    *,
    function: str | None = None,
    scores: int = 0,
) -> str:
    """The backend that serves this call: the named one, or the fastest that can when ``backend`` is "auto".

    ``APPO_BACKEND`` replaces "auto" (not an explicit name). Raises ValueError when a named backend cannot serve the
    call, saying why and which ones can. function: the public one, where its name is not the operator's. scores: as
    `scores` counts them, of attention; APPO_BACKEND_ORDER may choose by them (`appo_kernels.backend_order`).
    """
    return _resolve(op, function or op, backend, device, dtype, constant(head_dim), needs_grad, scores)


# Python constants in, a Python constant out: torch.compile evaluates it while tracing and keeps the answer.
@torch.compiler.assume_constant_result
def _resolve(
    op: str,
    function: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    scores: int,
) -> str:
    if isinstance(backend, str) and backend == "auto":
        backend = os.environ.get("APPO_BACKEND", "auto")
    if not isinstance(backend, str) or backend not in CHOICES:
        raise ValueError(
            f"{function}: `backend`: expected one of {', '.join(CHOICES)}, got {backend!r}. "
            "Pass one of these, or set APPO_BACKEND to one."
        )
    problem = Problem(op, device, dtype, head_dim, needs_grad, scores)
    if backend == "auto":
        return _automatic(problem)
    reason = why_not(problem, backend)
    if reason is not None:
        others = [name for name in MODULES if why_not(problem, name) is None]
        raise ValueError(
            f"{function}: `backend`: expected one that can serve this call, got {backend!r}: {reason}. "
            f'Here {", ".join(others) or "none"} can; pass that or "auto".'
        )
    return backend
