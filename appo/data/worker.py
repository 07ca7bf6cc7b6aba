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
    """The helper process crashed, or was stopped at the time limit (``expired``); the next request starts a new one."""

    def __init__(self, text: str, *, expired: bool) -> None:
        super().__init__(text)
        self.expired = expired


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
            process, expired = self._running(), threading.Event()

            def expire() -> None:
                expired.set()
                process.kill()

            timer = threading.Timer(seconds, expire)
            timer.daemon = True
            timer.start()
            try:
                assert process.stdin is not None and process.stdout is not None
                pickle.dump(request, process.stdin)
                process.stdin.flush()
                return pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                process.kill()
                crash = f"crashed (exit status {process.wait()}, {type(error).__name__})"
                text = f"stopped after {seconds:.3g} s" if expired.is_set() else crash
                raise WorkerError(text, expired=expired.is_set()) from error
            finally:
                timer.cancel()
                if sys.exc_info()[0] is not None:  # an interrupted exchange would leave its answer to the next one
                    self.stop()

    def alive(self) -> bool:
        """Whether this process has started one that still runs."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def stop(self) -> None:
        """End the process; another request starts a new one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # that of a fork's parent is not the fork's
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what is left of a request that the process did not read
                    pipe.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        process = self._process
        if process is None or not self.alive():
            self.stop()
            process = self._process = subprocess.Popen(
                command(self.module), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
        return process
