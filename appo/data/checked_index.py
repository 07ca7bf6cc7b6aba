"""Begins of the records of a large file, kept once all are checked, so that it is not checked again.

The entry in the cache belongs to the file as it is, to the data root and to this version of the code that checks.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from appo.data.cache import cache_path
from appo.data.opening import Source
from appo.data.rows import Rows
from appo.data.span_rows import SpanRows

CODE = Path(__file__).parent


@contextmanager
def one_process(source: Source, rows: Rows) -> Iterator[None]:
    """Of processes that load a large file at the same time one checks it, and the others find what it kept."""
    place = _place(source, rows)
    if place is None:
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        yield


def restore(source: Source, rows: Rows) -> str | None:
    """Give ``rows`` the places that an earlier load found, and return its notice; None where there was none."""
    place = _place(source, rows)
    if place is None or not place.is_file():
        return None
    try:
        with np.load(place) as kept:
            notice = str(kept["notice"])
            if isinstance(rows, SpanRows):
                rows.put(*(kept[name] for name in ("starts", "sizes", "indices")))
    except (OSError, ValueError, KeyError):  # half written, or of another program: found again
        return None
    return notice


def keep(source: Source, rows: Rows, notice: str) -> None:
    """Keep that all records of a file are right, their places, and ``notice``, what there was to say of them."""
    place = _place(source, rows)
    if place is None or (isinstance(rows, SpanRows) and not rows.placed):
        return
    names = ("starts", "sizes", "indices") if isinstance(rows, SpanRows) else ()
    parts: Any = {name: np.frombuffer(getattr(rows, name), np.int64) for name in names}
    partial = place.with_suffix(f".{id(rows)}.npz")
    np.savez(partial, notice=np.array(notice), **parts)
    partial.replace(place)


def _place(source: Source, rows: Rows) -> Path | None:
    if rows.text or not rows.large:
        return None
    state = f"{source.root.resolve()}\0{source.allow_outside}\0{rows.fingerprint()}"
    where = hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_path(source.path, f"-{_code()}-{where}.npz")


@functools.cache
def _code() -> str:
    """The state of the code that reads and checks records."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(CODE.glob("*.py")))).hexdigest()[:16]
