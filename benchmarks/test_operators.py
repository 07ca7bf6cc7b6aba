"""The operator benchmarks under pytest-benchmark: python -m pytest benchmarks

Same cases as `python -m benchmarks`, which lets entries take turns and is what the documentation quotes; this is
for the tools around pytest-benchmark (--benchmark-compare, --benchmark-json, histograms).
"""

import importlib
from typing import Any

import pytest
import torch

from appo_kernels import dispatch
from benchmarks.__main__ import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", dispatch.MODULES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(operator: str, backend: str, benchmark: Any) -> None:
    """Verifies every entry of the operator's first case, then times our own."""
    module = importlib.import_module(f"benchmarks.{OPERATORS[operator]}")
    shape = module.SHAPES()[module.DEFAULT[0]]
    case = next(iter(module.cases([shape if DEVICE == "cuda" else shape.on_cpu()], DEVICE)))
    name = f"ours, {backend}"
    ours = next((entry for entry in case.entries if entry.name.startswith(name)), None)
    if ours is None:
        pytest.skip(case.skipped[name])
    case.verify()
    benchmark.group = case.title
    benchmark.pedantic(ours.run, setup=ours.before, rounds=3, warmup_rounds=1)
