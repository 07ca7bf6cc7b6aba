"""Places that results are written to, checked before any work is done for them."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from appo.constraints import ConfigError, shown


def check_output_folder(name: str, path: str | Path) -> Path:
    """``path`` as a folder that exists or can be made, and can be written to. Raises ConfigError naming ``name``."""
    path = _usable(name, path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"`{name}`: expected a folder, got the file {path}. Pass another place.")
    _check_writable(name, path)
    return path


def check_output_file(name: str, path: str | Path, suffixes: Sequence[str]) -> Path:
    """``path`` as a file with one of ``suffixes`` that can be written. Raises ConfigError naming ``name``."""
    path = _usable(name, path)
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"`{name}`: expected a file that ends in {' or '.join(suffixes)}, got {shown(str(path))}.")
    if path.is_dir():
        raise ConfigError(f"`{name}`: expected a file, got the folder {path}. Pass the name of a file in it.")
    if not path.exists():
        _check_writable(name, path.parent)
    elif not (path.is_file() and os.access(path, os.W_OK)):
        raise ConfigError(f"`{name}`: expected a file that can be written, got {path}. Pass another place.")
    return path


def _usable(name: str, path: str | Path) -> Path:
    if not str(path).strip() or "\0" in str(path):
        raise ConfigError(f"`{name}`: expected a path, got {shown(str(path))}.")
    try:
        Path(path).exists()
    except OSError as error:  # a name longer than the file system takes
        raise ConfigError(f"`{name}`: expected a path, got {shown(str(path))}: {error.strerror}.") from error
    return Path(path)


def _check_writable(name: str, folder: Path) -> None:
    """The nearest folder that is there must take a new entry."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"`{name}`: expected a place below a folder, got {folder}, but {there} is a file.")
    try:  # permissions alone do not say it: a file system may be read-only, and root may do what others may not
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ConfigError(
            f"`{name}`: expected a place that can be written, got {folder}: {there}: {error.strerror}. Pass another."
        ) from error
