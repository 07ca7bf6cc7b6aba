"""A helper process that answers one request at a time and is killed when an answer takes too long."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """The helper process crashed or was stopped at the time limit; the next request starts a new one."""


class Worker:
    """Runs ``script`` in a process of its own; requests and answers are pickles on its stdin and stdout.

    One worker serves all threads of a process, in turn. A fork starts its own at its first request.
    """

    def __init__(self, script: Path) -> None:
        self.script = script
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
                    self._stop()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
