"""The peak of a process's memory: its own, in bytes, on every system."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from appo import process_memory
from appo.process_memory import STATUS, peak_resident_bytes, resident_bytes

CHILD = """
from appo.process_memory import peak_resident_bytes
before = peak_resident_bytes()
b"x" * (96 << 20)
print(before, peak_resident_bytes())
"""
# Starts the child while it has 512 MiB of its own, which ru_maxrss of the child would begin with.
PARENT = """
import subprocess, sys
ballast = b"x" * (512 << 20)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


@pytest.mark.skipif(not STATUS.is_file(), reason="needs /proc")
def test_the_peak_is_the_process_s_own() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert before < 96 << 20
    assert 90 << 20 < after - before < 128 << 20


@pytest.mark.skipif(not STATUS.is_file(), reason="needs /proc")
def test_the_peak_is_at_least_what_there_is_now() -> None:
    assert 0 < resident_bytes("VmRSS") <= peak_resident_bytes()
    with pytest.raises(OSError, match="expected a line VmNone"):
        resident_bytes("VmNone")


# getrusage counts in bytes on macOS alone.
@pytest.mark.parametrize(("platform", "factor"), [("darwin", 1), ("freebsd14", 1024)])
def test_units_without_proc(platform: str, factor: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 << 20))
    assert peak_resident_bytes() == (3 << 20) * factor
