"""The places of the records of a large JSON file, found by brackets, quotes and line ends alone: no record is decoded.

Each of the stretches found is decoded afterwards by `appo.data.strict_json`, so that a file is never taken for more
than what it is: where brackets are not as a list of records has them, the answer is None.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 22  # bytes read at a time

Spans = NDArray[np.int64]

_QUOTE, _BACKSLASH, _OPEN, _CLOSE = 1, 2, 3, 4
_KIND = np.zeros(256, np.uint8)
_KIND[list(b'"')], _KIND[list(b"\\")], _KIND[list(b"[{")], _KIND[list(b"]}")] = _QUOTE, _BACKSLASH, _OPEN, _CLOSE


def lines(source: Path) -> tuple[Spans, Spans]:
    """The first byte of each line, and one beyond the last byte of the last (N + 1,); which lines begin as no record
    does, with space or a byte order mark, and may be blank (K,)."""
    found, odd, offset, count, begins = [], [], 0, 0, True
    with source.open("rb") as file:
        while data := file.read(CHUNK):
            chunk = np.frombuffer(data, np.uint8)
            starts = np.flatnonzero(chunk[:-1] == ord("\n")) + 1
            starts = np.concatenate(([0], starts)) if begins else starts
            first = chunk[starts]
            odd.append(np.flatnonzero((first <= ord(" ")) | (first == 0xEF)) + count)
            found.append(starts + offset)
            offset, count, begins = offset + len(data), count + len(starts), data.endswith(b"\n")
    ends = np.array([offset])
    return np.concatenate([*found, ends]), np.concatenate(odd) if odd else np.empty(0, np.int64)


def list_items(source: Path, longest: int) -> tuple[Spans, Spans] | None:
    """The first byte and the size of each object or list in a JSON list; None where the file is no such list, or one of
    them is longer than ``longest`` bytes."""
    starts, sizes = [], []
    with source.open("rb") as file:
        for begin, ends in _windows(file, longest) or ():
            if begin is None or (ends - begin).max() > longest:
                return None
            starts.append(begin)
            sizes.append(ends - begin)
    return (np.concatenate(starts), np.concatenate(sizes)) if starts else None


def _windows(file: BinaryIO, longest: int) -> Iterator[tuple[Spans | None, Spans]]:
    """The begins and ends of the items of each part of the file; (None, ...) where it is no list of items.

    A part begins behind the last item of the one before, so that it begins outside of strings, within the list alone.
    """
    nothing = np.empty(0, np.int64)
    offset = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(offset)
    window, first, size = file.read(CHUNK), True, CHUNK
    bracket = len(window) - len(window.lstrip(b" \t\r\n"))
    if window[bracket : bracket + 1] != b"[":
        yield None, nothing
        return
    window, offset = window[bracket + 1 :], offset + bracket + 1
    while True:
        begins, ends, close = _items(window)
        last = 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            if window[last:begin].strip(b" \t\r\n") != (b"" if first else b","):
                yield None, nothing
                return
            first, last = False, end
        if len(begins):
            yield begins + offset, ends + offset
        if close is not None:
            if window[close : close + 1] != b"]":
                yield None, nothing
                return
            rest = window[last:close] + window[close + 1 :] + file.read(longest)
            if rest.strip(b" \t\r\n") or file.read(1):
                yield None, nothing
            return
        window, offset = window[last:], offset + last
        size = CHUNK if last else 2 * size
        more = file.read(size)
        if not more or len(window) > longest:
            yield None, nothing
            return
        window += more


def _items(window: bytes) -> tuple[Spans, Spans, int | None]:
    """Begins and ends of the whole items of a window, and where the list closes, if it does."""
    kinds = _KIND[np.frombuffer(window, np.uint8)]
    places = np.flatnonzero(kinds)
    kinds = kinds[places]
    kinds[_escaped(places, kinds)] = 0
    outside = np.cumsum(kinds == _QUOTE) % 2 == 0
    brackets = outside & (kinds >= _OPEN)
    places, opens = places[brackets], kinds[brackets] == _OPEN
    depth = np.cumsum(np.where(opens, 1, -1))
    closed = np.flatnonzero(depth < 0)
    close = None
    if len(closed):
        close = int(places[closed[0]])
        places, opens, depth = places[: closed[0]], opens[: closed[0]], depth[: closed[0]]
    begins, ends = places[opens & (depth == 1)], places[~opens & (depth == 0)] + 1
    return begins[: len(ends)], ends, close


def _escaped(places: Spans, kinds: "NDArray[np.uint8]") -> Spans:
    """Those of the characters found that stand behind a backslash that is not itself behind one."""
    slashes = np.flatnonzero(kinds == _BACKSLASH)
    if not len(slashes):
        return slashes
    at = places[slashes]
    begins = np.concatenate(([True], np.diff(at) != 1))  # of a run of backslashes
    number = np.arange(len(at))
    within = number - np.maximum.accumulate(np.where(begins, number, 0))
    behind = slashes[within % 2 == 0] + 1  # the next character found, if it is the next one of the text
    behind = behind[behind < len(places)]
    return behind[places[behind] == places[behind - 1] + 1]
