"""Paths that records name: of files on this machine, and under the data root."""

import re
from pathlib import Path

LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, on every common file system

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")


def why_not_path(text: str, root: Path | None) -> str | None:
    """The path that is expected instead of ``text``; None where it will do. root: the folder it must lie in, if any."""
    if _URL.match(text):
        return "the path of a local file (fetch it first)"
    if "\0" in text:
        return "a path without NUL characters"
    if 4 * len(text) > LONGEST_NAME and (  # a character has at most 4 bytes
        _bytes(text) > LONGEST_PATH or max(map(_bytes, re.split(r"[/\\]", text))) > LONGEST_NAME
    ):
        return f"a path of at most {LONGEST_PATH} bytes, {LONGEST_NAME} a name"
    if root is not None and _leaves(root, text):
        return f"a path under the data root {str(root)!r} (or `allow_outside: true`)"
    return None


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _leaves(root: Path, text: str) -> bool:
    """Whether a path points outside ``root`` by what is written in it; links are looked at when it is opened."""
    if _ABSOLUTE.match(text):
        roots = (root.absolute(), root.resolve())
        return ".." in text or not any(Path(text).is_relative_to(folder) for folder in roots)
    if ".." not in text:
        return False
    depth = 0
    for part in text.replace("\\", "/").split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return False
