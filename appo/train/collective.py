"""Steps that several processes take together, so that an error of one is an error of all and none waits for ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """The result of ``function`` in the main process, in every process; its exception likewise."""
    result: list = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = function()
        except Exception as error:
            result[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    found: T = result[0]
    return found


def total_of(value: float, accelerator: Accelerator) -> float:
    """The sum of every process's ``value``."""
    return float(accelerator.reduce(torch.tensor([float(value)], device=accelerator.device), "sum"))


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Entered by every process. When the body fails in one, all raise: that one its own error, the others which."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if accelerator.num_processes > 1:
        reports = gather_object([None if failed is None else f"{type(failed).__name__}: {failed}"])
        for rank, report in enumerate(reports):
            if report is not None and failed is None:
                failed = RuntimeError(f"process {rank}: {report}")
    if failed is not None:
        failed.of_all = True  # type: ignore[attr-defined]
        raise failed


def is_of_all(accelerator: Accelerator, error: BaseException) -> bool:
    """Whether every process has raised: there is one, or the error came out of `together`."""
    return accelerator.num_processes == 1 or getattr(error, "of_all", False)
