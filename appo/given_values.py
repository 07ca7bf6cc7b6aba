"""Settings as they are given, a mapping and `key=value` overrides, made into values of named and typed fields."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from appo.constraints import ConfigError, suggestion
from appo.yaml_files import parse_overrides, parse_value

FEW = 12  # fields that an error names all of
_NUMBER_AS_TEXT = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*", re.ASCII)


class Given(NamedTuple):
    """Values of fields, and the entries of mappings that were given by themselves: (field, entry, value)."""

    values: dict[str, Any]
    entries: list[tuple[str, str, Any]]


def given_values(
    values: Mapping[str, Any], overrides: list[str], types: Mapping[str, str], also: str | None = None
) -> Given:
    """``values`` with the overrides applied.

    types: the annotation of every field as text. also: a name that is no field and is taken as it is. Numbers written
    as text are taken where a number with a fraction is meant: YAML 1.1 reads 1e-6 as text. Raises ConfigError.
    """
    found = dict(values)
    entries: list[tuple[str, str, Any]] = []
    for (name, *inner), text in parse_overrides(overrides):
        _check_name(name, (*types, also) if also else types)
        kind = types.get(name, "str")
        if not inner:
            found[name] = _override(name, text, kind)
            entries = [entry for entry in entries if entry[0] != name]
        elif kind.startswith("dict"):
            key = ".".join(inner)
            entries.append((name, key, _parsed(f"{name}.{key}", text)))
        else:
            raise ConfigError(f"`{'.'.join((name, *inner))}`: `{name}` is {kind} and has no such part.")
    for name, value in found.items():
        if name == also:
            continue
        _check_name(name, types)
        if types[name].startswith("float") and isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value):
            found[name] = float(value)
    return Given(found, entries)


def _parsed(name: str, text: str) -> Any:
    try:
        return parse_value(text)
    except ConfigError as error:
        raise ConfigError(f"`{name}`: {error}") from error


def _override(name: str, text: str, kind: str) -> Any:
    """The value of a `key=value` item: text is taken as it is written, so that model=123 names a folder "123"."""
    value = _parsed(name, text)
    if kind.startswith("str") and not (value is None and (kind.endswith("| None") or text)):
        return value if isinstance(value, str) else text
    return value


def _check_name(name: Any, known: Collection[str]) -> None:
    if name not in known:
        names = f" Expected one of {', '.join(known)}." if len(known) <= FEW else ""
        raise ConfigError(f"`{name}`: no such field.{suggestion(name, known) or names}")
