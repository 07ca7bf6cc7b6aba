"""Files made once from a file of records and kept: unpacked .gz, Parquet as Arrow, where a large file's records begin.

They lie in `APPO_CACHE`, by default ~/.cache/appo, under a name that depends on the file's path, size and time, so that
all processes share one copy and a changed file makes a new one. The folder may be deleted at any time.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_path(source: Path, suffix: str) -> Path:
    """The place of a file made from ``source`` as it is now; ``suffix`` says what is made of it."""
    state = source.stat()
    state_of_file = f"{source.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{suffix}"
    folder = Path(os.environ.get("APPO_CACHE") or Path.home() / ".cache" / "appo")
    return folder / f"{hashlib.sha256(state_of_file.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}{suffix}"


def cached(source: Path, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file that one process's ``make`` writes for ``source``; it appears whole or not at all."""
    path = cache_path(source, suffix)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        if path.is_file():
            return path
        handle, partial = tempfile.mkstemp(prefix=path.stem, suffix=".partial", dir=path.parent)
        os.close(handle)
        try:
            make(Path(partial))
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    return path
