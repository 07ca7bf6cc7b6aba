"""Begins of the records of a large file, kept once all are checked, so that it is not checked again.

The entry in the cache belongs to the file as it is, to the data root and to this version of the code that checks.
"""

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from appo.data.cache import cache_path
from appo.data.rows import Rows
from appo.data.span_rows import SpanRows

CODE = Path(__file__).parent


@contextmanager
def one_process(rows: Rows, root: Path, allow_outside: bool) -> Iterator[None]:
    """Of processes that load a large file at the same time one checks it, and the others find what it kept."""
    place = _place(rows, root, allow_outside)
    if place is None:
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        yield


def restore(rows: Rows, root: Path, allow_outside: bool) -> str | None:
    """Give ``rows`` the places that an earlier load found, and return its notice; None where there was none."""
    place = _place(rows, root, allow_outside)
    if place is None or not isinstance(rows, SpanRows) or not place.is_file():
        return None
    try:
        with np.load(place) as kept:
            parts = [array("q", kept[name].astype(np.int64).tobytes()) for name in ("starts", "sizes", "indices")]
            notice = str(kept["notice"])
    except (OSError, ValueError, KeyError):  # half written, or of another program: found again
        return None
    rows.starts, rows.sizes, rows.indices = parts
    return notice


def keep(rows: Rows, root: Path, allow_outside: bool, notice: str) -> None:
    """Keep the places of a file whose records are all right, and ``notice``, what there was to say of it."""
    place = _place(rows, root, allow_outside)
    if place is None or not isinstance(rows, SpanRows):
        return
    starts, sizes, indices = (np.frombuffer(getattr(rows, name), np.int64) for name in ("starts", "sizes", "indices"))
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{id(rows)}.npz")
    np.savez(partial, notice=np.array(notice), starts=starts, sizes=sizes, indices=indices)
    partial.replace(place)


def _place(rows: Rows, root: Path, allow_outside: bool) -> Path | None:
    if not isinstance(rows, SpanRows) or rows.text or not rows.large:
        return None
    files = sorted(CODE.glob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    where = hashlib.sha256(f"{root.resolve()}\0{allow_outside}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_path(rows.path, f"-{code}-{where}.npz")
