"""The tags of a response: <think>, <answer>, and the spans of time in <time>."""

import math
import re
from collections.abc import Sequence

Interval = tuple[float, float]  # start and end, seconds

_TAG = re.compile(r"</?(?:think|answer|time)>")
_SECONDS = re.compile(r"\d+(?:\.\d+)?|\.\d+", re.ASCII)


def tagged(text: str, tag: str) -> str | None:
    """The text of the one ``<tag>...</tag>`` of ``text``; None where there is none, or more than one."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() if start <= end else None


def sections(completion: str) -> list[str]:
    """The names of the tags that ``completion`` is made of, in order; empty unless each is opened, closed and free of
    other tags, with nothing but space outside."""
    names, place, inside = [], 0, ""
    for tag in _TAG.finditer(completion):
        closing, name = tag[0][1] == "/", tag[0].strip("</>")
        if closing != (inside == name) or (not closing and (inside or completion[place : tag.start()].strip())):
            return []
        if closing:
            names.append(name)
        inside, place = "" if closing else name, tag.end()
    return names if not inside and not completion[place:].strip() else []


def time_spans(completion: str) -> list[Interval] | None:
    """The (start, end) seconds of "<time>8.4 to 12.5, 25 to 30.2</time>"; None where any of it is not of this form."""
    found = []
    for part in (tagged(completion, "time") or "").split(","):
        words = part.split()
        if words.count("to") != 1:
            return None
        middle = words.index("to")
        start, end = _seconds(words[:middle]), _seconds(words[middle + 1 :])
        if start is None or end is None or not start <= end < math.inf:
            return None
        found.append((start, end))
    return found


def _seconds(words: list[str]) -> float | None:
    """8.4 of ["8.4"], ["8.4s"] or ["8.4", "s"]."""
    text = words[0].removesuffix("s") if words[1:] in ([], ["s"]) and words else ""
    return float(text) if _SECONDS.fullmatch(text) else None


def interval_iou(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Intersection over union of two sets of intervals in continuous time; overlaps within a set count once."""
    first, second = _union(first), _union(second)
    overlap = sum(max(0.0, min(b, d) - max(a, c)) for a, b in first for c, d in second)
    total = sum(b - a for a, b in [*first, *second]) - overlap
    return overlap / total if total > 0 else 0.0


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
