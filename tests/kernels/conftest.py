"""Where there is a C++ compiler, every operator's tests also run with backend "cuda", on the emulated GPU."""

from collections.abc import Iterator
from typing import Any

import backend_contract
import pytest

import cudasim
from appo_kernels import dispatch


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The emulated GPU, built when the first test with backend "cuda" on the CPU begins."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend") != "cuda" or parameters.get("device") == "cuda":
        yield
    else:
        with cudasim.serving():
            yield


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[Any]:
    """A named backend may refuse what it is not made for, fp64 for one, and the test is skipped; other refusals fail.

    That it is served at all is for ``tests/emulation/test_contract.py``: a backend that refuses everything is not even
    a parameter here.
    """
    backend = getattr(pyfuncitem, "callspec", None) and pyfuncitem.callspec.params.get("backend")
    if backend not in ("cuda", "triton"):
        return (yield)
    refused: list[dispatch.Problem] = []
    ask = dispatch.why_not

    def why_not(problem: dispatch.Problem, asked: str) -> str | None:
        reason = ask(problem, asked)
        if reason is not None and asked == backend:
            refused.append(problem)
        return reason

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "why_not", why_not)
        try:
            return (yield)
        except ValueError as error:
            if f"expected one that can serve this call, got '{backend}'" not in str(error):
                raise
            unexpected = [problem for problem in refused if not backend_contract.may_refuse(problem, backend)]
            if unexpected or not refused:
                pytest.fail(f"{backend} refused what it is made for: {unexpected}: {error}")
            pytest.skip(str(error))
