"""Backend "cuda" on the emulated GPU, for every test here."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

import library

if library.compiler() is not None:
    os.environ["APPO_EMULATION_LIBRARY"] = str(library.build())


@pytest.fixture(scope="session")
def emulator() -> library.Emulator:
    return library.emulator()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if library.compiler() is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip("the emulation needs a C++ compiler: install g++ or set CXX"))
