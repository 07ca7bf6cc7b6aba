"""The end of a command whose reader has gone: `python -m appo_kernels.doctor | head`."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

CLOSED_PIPE = 141  # 128 + SIGPIPE: the status that shells give to a command that wrote to a closed pipe


@contextmanager
def quiet_on_closed_pipe() -> Iterator[None]:
    """End with status 141 and without a word where standard output or error has lost its reader.

    SIGPIPE stays ignored, as Python has it: the signal would end a training run before it can save its last step.
    Also a decorator of a ``main``. A broken pipe of another kind (a socket, a worker process) stays an error.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # the rest of the buffer is to meet the closed pipe here, not when Python shuts down
    except BrokenPipeError:
        if not (_has_no_reader(sys.stdout) or _has_no_reader(sys.stderr)):
            raise
        _end()
    except SystemExit as exit:
        # click and rich catch the error themselves, and leave with status 1.
        if not isinstance(exit.__context__, BrokenPipeError):
            raise
        _end()


def _has_no_reader(stream: TextIO | None) -> bool:
    if stream is None or stream.closed or not hasattr(select, "poll"):  # Windows has neither poll nor SIGPIPE
        return False
    try:
        descriptor = stream.fileno()
    except OSError:  # a stream of a test or a notebook
        return False
    watched = select.poll()
    watched.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))


def _end() -> None:
    """Leave; what is buffered still goes nowhere, so that Python has nothing to complain of when it flushes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if _has_no_reader(stream):
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
    sys.exit(CLOSED_PIPE)
