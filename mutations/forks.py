"""pytest runs in children of a process that has imported what is heavy and never changes: torch, triton, pytest.

As a program it is that process: it reads requests, a line of JSON each (arguments of pytest, seconds, where the output
goes), from standard input, and answers with the exit status, null where the time was up.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Server:
    """Runs pytest in ``folder``, whose packages come first, with more in its environment."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        # No .pyc: a change that keeps a file's size, within a second, would not be seen.
        own = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.output = folder / f"output-{'-'.join(environment) or 'plain'}.txt"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=os.environ | own | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], limit: float) -> tuple[int | None, str]:
        """Exit status of ``pytest arguments``, None where ``limit`` seconds were not enough, and what it printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, limit, str(self.output)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs pytest ended with {self.process.wait()}")
        return json.loads(answer), self.output.read_text(errors="replace")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def _serve() -> None:
    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401
    import triton  # noqa: F401

    child = 0

    def stop(*_: Any) -> None:
        if child:
            os.killpg(child, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    for line in sys.stdin:
        arguments, limit, output = json.loads(line)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()  # a group with its own children, so that all can be stopped
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            status = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(int(status))
        print(json.dumps(_wait(child, limit)), flush=True)
        child = 0


def _wait(child: int, limit: float) -> int | None:
    """Its exit status, negative for a signal; None where it had to be stopped."""
    end, pause = time.monotonic() + limit, 0.01
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)


if __name__ == "__main__":
    _serve()
