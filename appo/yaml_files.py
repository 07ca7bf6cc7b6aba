"""Settings as YAML: one level of `name: value`, read without anything that YAML can do beyond holding values.

Values are those of YAML 1.2: `on`, `no`, `1:30` and `010` are what they look like, not true, false, 90 and 8. Tags,
anchors and aliases, names that stand twice, deep nesting and large files are refused.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from appo.constraints import ConfigError, shown

LARGEST_FILE = 256 << 10  # bytes
DEEPEST = 4
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    ("float", rf"{_NUMBER}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", [*"-+.0123456789"]),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file by name. Raises ConfigError naming the file and what in it cannot be read."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file. Pass the path of a YAML file with the fields of APPOConfig.")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise ConfigError(f"{shown(str(path))}: cannot be read: {error}") from error
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path}: expected at most {LARGEST_FILE >> 10} KiB of settings, got more. Is it the file?")
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not readable as settings: not UTF-8 text ({error.reason})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_yaml(text: str) -> dict[str, Any]:
    """The values of YAML text by name; empty text has none. Raises ConfigError."""
    values = parse_value(text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"expected `field: value` lines, got {shown(values)}.")
    for name in values:
        if not isinstance(name, str):
            raise ConfigError(f"expected names of fields as text, got {shown(name)}.")
    return values


def parse_value(text: str) -> Any:
    """One YAML value: a number, text, true, false, null, a list or a mapping. Raises ConfigError."""
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"not readable as settings: {' '.join(str(error).split())}") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text that ``parse_yaml`` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def parse_overrides(items: list[str]) -> list[tuple[list[str], str]]:
    """(path of names, text of the value) of each ``key=value`` or ``key.name=value``. Raises ConfigError."""
    found = []
    for item in items:
        name, equals, value = item.partition("=")
        path = name.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"expected key=value, such as learning_rate=2e-6, got {shown(item)}.")
        found.append((path, value))
    return found


def _check_events(text: str) -> None:
    """Refuse what a list of settings has no use for before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{place}: anchors and aliases (&name, *name) are not read. Write the value itself.")
        if getattr(event, "tag", None):
            raise ConfigError(f"{place}: tags such as {shown(event.tag)} are not read. Write the value alone.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConfigError(f"{place}: expected at most {DEEPEST} levels of lists and mappings, got more.")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1}: expected a name before `:`, got a list or mapping.")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: `{key.value}` stands twice. Keep one of them.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int:
        return int(node.value)  # YAML 1.1 reads 010 as 8

    def construct_number(self, node: Any) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


for _name, _pattern, _first in _SCALARS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
