"""A copy of the tree in which one kernel at a time is changed and its tests are run."""

import hashlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations.forks import Server
from mutations.mutant import Mutant
from mutations.suites import ROOT, Suite

COPIED = (
    "appo", "appo_kernels", "benchmarks", "csrc", "cudasim", "gpu_rehearsal", "ptxsim", "tests", "pyproject.toml",
)  # fmt: skip
# An installed package of the tree's own may come with a finder that is asked before sys.path is.
FIRST_IN_PYTHON = '''"""Packages of this copy come from it, whatever is installed."""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "appo" not in getattr(f, "known_source_files", ())]
'''
CHECK_COPY = (
    "import sys; sys.path.insert(0, sys.argv[1]); import sitecustomize, appo_kernels; print(appo_kernels.__file__)"
)
# What pytest ends with: all passed; a test failed; interrupted, here by an import that fails.
PASSED, FAILED, INTERRUPTED = 0, 1, 2
INVALID = ("CompilationError", ": error: ")  # of Triton and of C++ compilers


@dataclass(frozen=True)
class Outcome:
    """``result``: "caught", "time limit" (caught too), "survived", or "invalid" (it does not compile)."""

    result: str
    seconds: float
    told: str  # the test that failed


class Workbench:
    """One copy in ``folder``; ``run`` one after the other."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder = folder.resolve()
        self.servers: dict[tuple[tuple[str, str], ...], Server] = {}
        found = hashlib.sha256()
        for name in COPIED:
            source, target = root / name, self.folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".*_cache"))
                for path in sorted(p for p in target.rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")):
                    found.update(path.read_bytes())
            elif source.exists():
                shutil.copy2(source, target)
        self.state = found.hexdigest()[:16]
        """A digest of the sources as they were copied."""
        (self.folder / "sitecustomize.py").write_text(FIRST_IN_PYTHON)
        check = [sys.executable, "-c", CHECK_COPY, str(self.folder)]
        used = subprocess.run(check, cwd=self.folder, capture_output=True, text=True).stdout
        if not used.startswith(str(self.folder)):
            raise RuntimeError(f"appo_kernels comes from {used!r}, not from the copy in {self.folder}")

    def __enter__(self) -> "Workbench":
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self.servers.values():
            server.close()

    def run(self, mutant: Mutant | None, suites: tuple[Suite, ...], limit: float) -> Outcome:
        """The outcome of ``suites`` with the change; None: without one. limit: seconds of all together."""
        began = time.monotonic()
        file = self.folder / mutant.file if mutant else None
        if mutant and file:
            if file.read_text() != mutant.source:
                raise RuntimeError(f"{file} is not what the mutants were made from")
            file.write_text(mutant.mutated)
        try:
            for suite in suites:
                left = limit - (time.monotonic() - began)
                status, output = self._server(suite).run(suite.arguments(), max(left, 1.0))
                if status is None:
                    return Outcome("time limit", time.monotonic() - began, str(suite))
                if status not in (PASSED, FAILED, INTERRUPTED) and status > 0:
                    raise RuntimeError(f"pytest ended with {status}: {suite}\n{output[-4000:]}")
                if status != PASSED:
                    result = "invalid" if any(text in output for text in INVALID) else "caught"
                    return Outcome(result, time.monotonic() - began, _first_failure(output) or str(suite))
            return Outcome("survived", time.monotonic() - began, "")
        finally:
            if mutant and file:
                file.write_text(mutant.source)

    def _server(self, suite: Suite) -> Server:
        if suite.environment not in self.servers:
            self.servers[suite.environment] = Server(self.folder, dict(suite.environment))
        return self.servers[suite.environment]


def _first_failure(output: str) -> str:
    failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failures[0].split(" - ")[0].split(" ", 1)[1] if failures else ""
