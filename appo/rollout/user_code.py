"""Functions of a user's Python file, named "FILE.py:NAME": loading them, and what is said where they fail."""

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from appo.constraints import suggestion

# What such functions are called with, by what they are for.
ARGUMENTS = {"reward": ("text", "record"), "told": ("text", "record"), "method": ("group", "divergence", "config")}
# What somebody who passes a class may be looking for.
FOR_A_CLASS = {"method": " A subclass of Trainer is started from Python (docs/own_method.md)."}


class UserCodeError(ValueError):
    """A file of the user's that cannot be used: the message names file and function, and what went wrong in it."""


def user_function(name: str, what: str) -> Callable[..., Any]:
    """The function NAME of a user's file "FILE.py:NAME", which is run: name only files that you trust.

    Raises UserCodeError naming ``what`` it is for, of `ARGUMENTS`, and what is wrong with the file, the name or the
    arguments that it takes.
    """
    file, _, function = name.rpartition(":")
    module, wanted = user_module(str(Path(file).resolve()), what), ", ".join(ARGUMENTS[what])
    if not hasattr(module, function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        there = f"it has {', '.join(own)}" if own else "it has none"
        raise UserCodeError(f"{what} {file}: no function `{function}` in it; {there}.{suggestion(function, own)}")
    found = getattr(module, function)
    if inspect.isclass(found):
        remedy = FOR_A_CLASS.get(what, "")
        raise UserCodeError(f"{what} {name}: expected a function of ({wanted}), got the class {function}.{remedy}")
    if not callable(found):
        raise UserCodeError(f"{what} {name}: expected a function of ({wanted}), got {found!r}. Define it there.")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some callables of C have none
        return cast(Callable[..., Any], found)
    try:
        signature.bind(*ARGUMENTS[what])
    except TypeError as error:
        raise UserCodeError(f"{what} {name}: expected a function of ({wanted}), got one of {signature}.") from error
    return cast(Callable[..., Any], found)


@functools.cache
def user_module(file: str, what: str) -> ModuleType:
    """A user's Python file, run once. Raises UserCodeError naming ``what`` it is for and what is wrong with it."""
    if not Path(file).is_file():
        raise UserCodeError(f"{what} {file}: no such file. Relative paths start from the working directory.")
    specification = importlib.util.spec_from_file_location(f"appo_{what}_{Path(file).stem}_{abs(hash(file))}", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses of the file look themselves up
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise UserCodeError(f"{what} {file}: cannot be loaded: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def user_errors(place: str, name: str) -> Iterator[None]:
    """Whatever a function of a user's file raises, as one UserCodeError: ``place``, the error, the line of the file.

    name: "FILE.py:NAME", as of `user_function`.
    """
    try:
        yield
    except Exception as error:
        file = str(Path(name.rpartition(":")[0]).resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        raise UserCodeError(f"{place}: {type(error).__name__}: {error}{where}") from error
