"""Conventions of the tests themselves: modules are found without edits of sys.path, and collecting compiles nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("appo", "appo_kernels", "benchmarks", "cudasim", "examples", "gpu_rehearsal", "ptxsim", "tests")
EDIT = re.compile(r"\bsys\.path(\[.*\])? *(\+?=[^=]|\.(append|insert|extend|pop|remove)\b)|\bsyspath_prepend\b")
# A child process takes over its parent's path.
CHILDREN = ("appo/data/worker.py",)


# A method, an operator, a slice and an assignment.
@pytest.mark.parametrize("line", ["sys.path.insert(0, x)", "sys.path += [x]", "sys.path[:0] = [x]", "sys.path = []"])
def test_edits_are_recognised(line: str) -> None:
    assert EDIT.search(line) and not EDIT.search("if sys.path == old or name in sys.path: json.dumps(sys.path)")


def test_nobody_edits_sys_path() -> None:
    edits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(__file__) and str(path.relative_to(ROOT)) not in CHILDREN
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if EDIT.search(line)
    ]
    assert not edits, "\n".join(edits)


def test_collecting_tests_compiles_nothing(tmp_path: Path) -> None:
    """The compiler of this run is a script that leaves a file behind when it is called."""
    called, compiler = tmp_path / "called", tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    compiler.chmod(0o755)
    folders = ["tests/kernels", "tests/emulation"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *folders],
        cwd=ROOT,
        env=os.environ | {"CXX": str(compiler), "APPO_EMULATION_LIBRARY": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert "[cuda-cpu" in result.stdout, "tests with the emulated GPU were not collected"
    assert not called.exists()
