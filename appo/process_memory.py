"""Memory of this process, without a package for it."""

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")  # on Linux


def resident_bytes(name: str) -> int:
    """Bytes of this process on Linux: name "VmRSS", its resident set now, or "VmHWM", the largest it has had.

    Raises OSError where there is no such line.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{STATUS}: expected a line {name}, found none")


def peak_resident_bytes() -> int:
    """Bytes of the largest resident set that this process has had."""
    if STATUS.is_file():  # there ru_maxrss starts with the peak of the process that started this one
        return resident_bytes("VmHWM")
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kibibytes elsewhere
