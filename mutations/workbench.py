"""A copy of the tree in which one kernel at a time is changed and its tests are run."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
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
        self.servers: dict[Any, Server] = {}
        self.passed: set[Suite] = set()
        for name in COPIED:
            source, target = root / name, self.folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", ".*_cache"))
            elif source.exists():
                shutil.copy2(source, target)
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

    def run(self, mutant: Mutant | None, suites: Sequence[Suite], limit: float) -> Outcome:
        """The outcome of ``suites`` with the change; None: without one. limit: CPU seconds of a test."""
        began = time.monotonic()
        with self._changed({mutant.file: (mutant.source, mutant.mutated)} if mutant else {}):
            for suite in suites:
                with self._changed(self._fewer_head_dims(suite.head_dims) if suite.head_dims else {}):
                    status, output = self._server(suite).run(suite.arguments(), limit)
                if status is None:
                    return Outcome("time limit", time.monotonic() - began, str(suite))
                if status not in (PASSED, FAILED, INTERRUPTED) and status > 0:
                    raise RuntimeError(f"pytest ended with {status}: {suite}\n{output[-4000:]}")
                if status != PASSED:
                    result = "invalid" if any(text in output for text in INVALID) else "caught"
                    return Outcome(result, time.monotonic() - began, _first_failure(output) or str(suite))
                self.passed.add(suite)
        return Outcome("survived", time.monotonic() - began, "")

    def check(self, suites: Iterable[Suite], limit: float) -> None:
        """Run those of ``suites`` without a change that no mutant has passed: what fails then catches nothing."""
        for suite in set(suites) - self.passed:
            outcome = self.run(None, (suite,), limit)
            if outcome.result != "survived":
                raise RuntimeError(f"{suite} fails without a fault: {outcome.result}: {outcome.told}")

    @contextlib.contextmanager
    def _changed(self, texts: dict[str, tuple[str, str]]) -> Iterator[None]:
        """Inside the block, files of the copy have other texts: name to the old one and the new one."""
        for name, (old, _) in texts.items():
            if (self.folder / name).read_text() != old:
                raise RuntimeError(f"{self.folder / name} is not what the mutants were made from")
        try:
            for name, (_, new) in texts.items():
                (self.folder / name).write_text(new)
            yield
        finally:
            for name, (old, _) in texts.items():
                (self.folder / name).write_text(old)

    def _fewer_head_dims(self, head_dims: tuple[int, ...]) -> dict[str, tuple[str, str]]:
        """Attention built for these alone, forward and backward, and what Python knows of it."""
        made = " ".join(f"X({D}, __VA_ARGS__)" for D in head_dims)
        rules = {
            "csrc/head_dims.h": (r"(#define APPO_(?:GRAD_)?HEAD_DIMS\(X, \.\.\.\))(?:.*\\\n)*.*", rf"\1 {made}"),
            "appo_kernels/cuda_constants.py": (r"^(HEAD_DIMS, GRAD_HEAD_DIMS =) .*", rf"\1 {head_dims}, {head_dims}"),
        }
        texts = {}
        for name, (pattern, replacement) in rules.items():
            old = (self.folder / name).read_text()
            new, count = re.subn(pattern, replacement, old, flags=re.MULTILINE)
            if not count:
                raise RuntimeError(f"{name}: {pattern} is not in it")
            texts[name] = old, new
        return texts

    def _server(self, suite: Suite) -> Server:
        key = suite.environment, suite.head_dims
        if key not in self.servers:
            name = "-".join(map(str, (*dict(suite.environment), *(suite.head_dims or ()))))
            warm = suite.head_dims is not None  # csrc/ changes, and no file of Python
            self.servers[key] = Server(self.folder, dict(suite.environment), warm=warm, name=name)
        return self.servers[key]


def _first_failure(output: str) -> str:
    failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failures[0].split(" - ")[0].split(" ", 1)[1] if failures else ""
