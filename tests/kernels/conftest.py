"""Where there is a C++ compiler, every operator's tests also run with backend "cuda", on the emulated GPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "emulation"))

import library

if library.compiler() is not None:
    os.environ["APPO_EMULATION_LIBRARY"] = str(library.build())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[Any]:
    """A named backend may refuse what it does not take, fp64 for one: that is its contract, and skips the test."""
    try:
        return (yield)
    except ValueError as error:
        backend = getattr(pyfuncitem, "callspec", None) and pyfuncitem.callspec.params.get("backend")
        if backend in ("cuda", "triton") and f"expected one that can serve this call, got '{backend}'" in str(error):
            pytest.skip(str(error))
        raise
