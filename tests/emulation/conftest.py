"""Backend "cuda" on the emulated GPU, for every test here."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels"), str(HERE.parents[1])]

import library  # noqa: E402

if library.compiler() is not None:
    os.environ["APPO_EMULATION_LIBRARY"] = str(library.build())


@pytest.fixture(scope="session")
def emulator() -> library.Emulator:
    return library.emulator()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if library.compiler() is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip("the emulation needs a C++ compiler: install g++ or set CXX"))
