"""pytest runs in children of a process that has imported what never changes: torch, triton, pytest and its plugins.

As a program it is that process: it reads requests, a line of JSON each (arguments of pytest, CPU seconds of a test,
where the output goes), from standard input, and answers with the exit status, null where a test went on for longer. As
``forks.py warm`` it imports the tests as well: for changes that are not of Python.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAITING = 20.0  # a child that waits for something may take so many times what its tests may compute


class Server:
    """Runs pytest in ``folder``, whose packages come first, with more in its environment."""

    def __init__(self, folder: Path, environment: dict[str, str], *, warm: bool = False, name: str = "") -> None:
        # No .pyc: a change that keeps a file's size, within a second, would not be seen.
        own = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.output = folder / f"output-{name or 'plain'}.txt"
        self.process = subprocess.Popen(
            [sys.executable, __file__, *(["warm"] if warm else [])],
            cwd=folder,
            env=os.environ | own | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], limit: float) -> tuple[int | None, str]:
        """Exit status of ``pytest arguments`` and what it printed; None where a test took ``limit`` CPU seconds."""
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


class Limit:
    """A plugin of pytest: a test that computes for too long ends the process, however busy the machine is."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def pytest_runtest_setup(self) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime + self.seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _serve(warm: bool) -> None:
    import importlib.metadata

    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401
    import triton  # noqa: F401

    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    child, collected = 0, set()

    def stop(*_: Any) -> None:
        if child:
            os.killpg(child, signal.SIGKILL)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        arguments, limit, output = json.loads(line)
        if warm and tuple(arguments) not in collected:
            collected.add(tuple(arguments))
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                pytest.main(["--collect-only", *arguments])
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()  # a group with its own children, so that all can be stopped
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            status = pytest.main(arguments, plugins=[Limit(limit)])
            sys.stdout.flush()
            os._exit(int(status))
        print(json.dumps(_wait(child, WAITING * limit)), file=answers, flush=True)
        child = 0


def _wait(child: int, limit: float) -> int | None:
    """Its exit status, negative for a signal; None where it had to be stopped."""
    end, pause = time.monotonic() + limit, 0.01
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)


if __name__ == "__main__":
    _serve("warm" in sys.argv[1:])
