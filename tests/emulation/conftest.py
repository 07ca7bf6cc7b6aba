"""Backend "cuda" on the emulated GPU, for every test here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import cudasim

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with cudasim.serving():
        yield


@pytest.fixture(scope="session")
def emulator() -> cudasim.Emulator:
    return cudasim.emulator()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if cudasim.compiler() is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip("the emulation needs a C++ compiler: install g++ or set CXX"))
