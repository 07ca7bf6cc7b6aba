"""JSON as the standard has it: no NaN, no key twice, no number beyond what can be counted with, no broken text."""

import codecs
import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 100  # brackets within brackets
_RUN = re.compile(rb'"([^"\\]{1,100})"\s*:\s*(?:[\[{]\s*){50}')


class JSONError(ValueError):
    """Text that is not JSON; ``field`` is the top-level field at fault where one is known."""

    def __init__(self, what: str, field: str | None = None) -> None:
        super().__init__(what)
        self.field = field

    def at(self, place: str) -> str:
        """The message for a record at ``place``."""
        where = f"{place}: field `{self.field}`: " if self.field else f"{place}: "
        return f"{where}expected JSON, got {self}."


class _Wrong:
    """A value that JSON does not have, until the field that holds it is known."""

    def __init__(self, what: str) -> None:
        self.what = what


def loads(text: bytes) -> Any:
    """The value of one JSON text in UTF-8. Raises JSONError."""
    try:
        return check(_decoder.decode(text.removeprefix(codecs.BOM_UTF8).decode()), text)
    except (ValueError, RecursionError) as error:
        raise located(text, error) from error


def check(value: Any, text: bytes) -> Any:
    """``value``, as the decoder made it of ``text``. Raises JSONError for deep nesting and lone surrogates."""
    if text.count(b"[") + text.count(b"{") > DEEPEST:
        _check_depth(text)
    if b"\\u" in text and (b"\\ud" in text.lower()):
        for name, part in value.items() if isinstance(value, dict) else [(None, value)]:
            try:
                json.dumps([name, part], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise JSONError("half of a surrogate pair", name if name and name.isprintable() else None) from error
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise JSONError("this field twice in one object", next(n for n in names if names.count(n) > 1))
    return found


def _constant(name: str) -> NoReturn:
    raise JSONError(f"{name}, which is no number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JSONError(f"a number too large, {text[:20]}")
    return value


def _int(text: str) -> int:
    if len(text) > 4000:  # Python itself refuses 4300 digits
        raise JSONError(f"a number of {len(text):,} digits")
    return int(text)


def _check_depth(text: bytes) -> None:
    depth = 0
    for token in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            match = _RUN.search(text)
            name = match[1].decode("utf-8", "replace") if match else None
            raise JSONError(f"more than {DEEPEST} brackets within each other", name)


_decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int)


raw_decode = _decoder.raw_decode


def located(text: bytes, error: Exception) -> JSONError:
    """``error`` of decoding what ``text`` begins with, with the top-level field that holds it, where that is found."""
    if isinstance(error, RecursionError):
        match = _RUN.search(text)
        name = match[1].decode("utf-8", "replace") if match else None
        return JSONError(f"more than {DEEPEST} brackets within each other", name)
    if not isinstance(error, JSONError):
        return JSONError(f"text that does not parse: {error}")
    if error.field is not None:
        return error
    try:
        value = _lenient.raw_decode(text.decode("utf-8-sig").lstrip())[0]
    except (ValueError, RecursionError):
        return error
    for name, part in value.items() if isinstance(value, dict) else ():
        if _holds_wrong(part):
            return JSONError(str(error), name)
    return error


def _keep_float(text: str) -> Any:
    return _Wrong(text) if math.isinf(float(text)) else 0.0


def _keep_int(text: str) -> Any:
    return _Wrong(text) if len(text) > 4000 else 0


def _holds_wrong(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_wrong, value.values()))
    if isinstance(value, list):
        return any(map(_holds_wrong, value))
    return isinstance(value, _Wrong)


_lenient = json.JSONDecoder(parse_constant=_Wrong, parse_float=_keep_float, parse_int=_keep_int)


def end_of(text: str, place: int) -> int | None:
    """The end of the JSON value that begins at ``place``, whatever is in it; None where that cannot be told."""
    try:
        return _lenient.raw_decode(text, place)[1]
    except (ValueError, RecursionError):
        return None
