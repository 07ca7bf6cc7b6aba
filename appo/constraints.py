"""Allowed values of settings, declared beside each field of a dataclass and checked for all fields alike."""

import difflib
import math
import numbers
import os
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, NoReturn, cast, get_args, get_origin, get_type_hints

# No setting counts anything that needs more; larger numbers would fail where torch and C take them.
LARGEST_INT = 2**31 - 1
LONGEST_TEXT = 4096
SHOWN = 80


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the field, what was expected and what came."""


@dataclass(frozen=True)
class Constraint:
    """The values that a field takes beside its type. Numbers are always finite; ints lie within 31 bits.

    not_empty: a text or a container that may not be empty. each: the constraint of a container's values.
    hint: one sentence on what to do instead.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    not_empty: bool = False
    each: "Constraint | None" = None
    hint: str = ""

    def expected(self) -> str:
        """The range in words; empty where every number of the type will do."""
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)

    def holds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any = MISSING, *, factory: Any = MISSING, **constraint: Any) -> Any:
    """A dataclass field with its default and the arguments of its ``Constraint``."""
    metadata = {"constraint": Constraint(**constraint)}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass against its annotation and constraint, and store the value in its own type.

    An int is taken for a float, a path for text, and a number of numpy for one of Python. Raises ConfigError.
    """
    hints = get_type_hints(type(settings))
    for one in fields(settings):
        value = checked(one.name, getattr(settings, one.name), hints[one.name], constraint_of(one))
        object.__setattr__(settings, one.name, value)


def annotations(settings: Any) -> dict[str, str]:
    """The annotation of every field of a dataclass, as text."""
    return {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(settings)}


def constraint_of(one: Field[Any]) -> Constraint:
    return one.metadata.get("constraint", Constraint())


def checked(name: str, value: Any, annotation: Any, constraint: Constraint) -> Any:
    """``value`` in the annotated type. Raises ConfigError naming ``name``, what was expected and what came."""
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if get_origin(kind) is dict:
        return dict(_checked_items(name, value, get_args(kind)[1], constraint))
    if get_origin(kind) is list:
        return _checked_list(name, value, get_args(kind)[0], constraint)
    if is_dataclass(kind):  # checked by itself
        return value
    if kind is str:
        return _checked_text(name, value, constraint)
    if kind is bool:
        if not isinstance(value, bool):
            _fail(name, "bool (true or false)", value, constraint.hint)
        return value
    return _checked_number(name, value, kind, constraint)


def _checked_number(name: str, value: Any, kind: type, constraint: Constraint) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        _fail(
            name, kind.__name__, value, constraint.hint or ("Leave out the quotes." if _is_quoted_number(value) else "")
        )
    limits, given = constraint.expected(), cast(Any, value)
    if kind is int:
        if not constraint.holds(given):
            _fail(name, limits, value, constraint.hint)
        if abs(given) > LARGEST_INT:
            _fail(name, f"at most {LARGEST_INT:,}", value, constraint.hint)
        return int(given)
    try:
        number = float(given)
    except OverflowError:  # an int beyond the floats
        number = math.inf
    if not math.isfinite(number) or not constraint.holds(number):
        _fail(name, f"a number {limits}" if limits else "a finite number", value, constraint.hint)
    return number


def _is_quoted_number(value: Any) -> bool:
    return isinstance(value, str) and value.strip().replace(".", "", 1).lstrip("+-").isdecimal()


def _checked_text(name: str, value: Any, constraint: Constraint) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if constraint.choices:
        if not isinstance(value, str) or value not in constraint.choices:
            _fail(name, f"one of {', '.join(constraint.choices)}", value, constraint.hint)
        return value
    if not isinstance(value, str):
        hint = constraint.hint or ("Put it in quotes." if isinstance(value, (int, float)) else "")
        _fail(name, "str", value, hint)
    if constraint.not_empty and not value.strip():
        _fail(name, "text that is not empty", value, constraint.hint)
    if len(value) > LONGEST_TEXT:
        _fail(name, f"at most {LONGEST_TEXT:,} characters", value, constraint.hint)
    # Cc: control characters, Cs: halves of surrogate pairs, which no file holds.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        _fail(name, "text without control characters", value, constraint.hint)
    if "${" in value:
        _fail(name, "a plain value (${...} is not resolved)", value, "Write the value itself.")
    return value


def _checked_items(name: str, value: Any, kind: Any, constraint: Constraint) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or (constraint.not_empty and not value):
        expected = "at least one `name: value`" if constraint.not_empty else "`name: value` pairs"
        _fail(name, expected, value, constraint.hint)
    for key, item in value.items():
        if not isinstance(key, str) or not key:
            _fail(name, "names that are text", key, constraint.hint)
        yield key, checked(f"{name}.{key}", item, kind, constraint.each or Constraint())


def _checked_list(name: str, value: Any, kind: Any, constraint: Constraint) -> list[Any]:
    if not isinstance(value, (list, tuple)) or (constraint.not_empty and not value):
        _fail(name, "a list that is not empty" if constraint.not_empty else "a list", value, constraint.hint)
    each = constraint.each or Constraint()
    return [checked(f"{name}[{index}]", item, kind, each) for index, item in enumerate(value)]


def _fail(name: str, expected: str, value: Any, hint: str) -> NoReturn:
    raise ConfigError(f"`{name}`: expected {expected}, got {shown(value)}.{' ' + hint if hint else ''}")


def shown(value: Any) -> str:
    """A value as an error shows it: one short line, whatever it is."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and abs(value) > 10**SHOWN:  # Python refuses to print thousands of digits
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    if len(text) > SHOWN:
        text = text[:SHOWN] + "..."
    kind = "" if isinstance(value, (str, bool, int, float, list, dict)) else f" ({type(value).__name__})"
    return text + kind


def suggestion(name: Any, known: Collection[str]) -> str:
    """The end of an error about an unknown name: the known one nearest to it, if any is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""
