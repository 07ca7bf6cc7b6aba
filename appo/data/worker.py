"""A helper process that answers one request at a time and is killed when an answer takes too long."""

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# The process imports what this one would, as processes that multiprocessing spawns do.
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main()"


def serve(answer: Callable[..., Any]) -> None:
    """Answer requests, tuples of arguments, until there are no more: the ``main`` of such a process.

    What libraries print is no answer: results have a descriptor of their own, and stdout is stderr.
    """
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(*request), results, protocol=5)
        results.flush()


def command(module: str) -> list[str]:
    """The command line of a process that runs ``main`` of a module of ours."""
    return [sys.executable, "-u", "-c", START.format(module), json.dumps(sys.path)]


class WorkerError(RuntimeError):
    """The helper process crashed or was stopped at the time limit; the next request starts a new one."""


class Worker:
    """Runs ``main`` of a module in a process of its own; requests and answers are pickles on its stdin and stdout.

    One worker serves all threads of a process, in turn. A fork starts its own at its first request.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to ``request``. Raises WorkerError after ``seconds``, or where the process dies of it."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(seconds, process.kill)
            timer.daemon = True
            timer.start()
            try:
                pickle.dump(request, process.stdin)
                process.stdin.flush()
                return pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                raise WorkerError(f"no answer within {seconds:g} s, or a crash ({type(error).__name__})") from error
            finally:
                timer.cancel()
                if sys.exc_info()[0] is not None:  # an interrupted exchange would leave its answer to the next one
                    self.stop()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process = subprocess.Popen(
                command(self.module), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
        return self._process

    def stop(self) -> None:
        """End the process; another request starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what is left of a request that the process did not read
                    pipe.close()
