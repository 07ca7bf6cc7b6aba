"""Mutants are what they say, of every kernel, the same each time; and they are run in a copy."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mutations import cpp_source, suites, triton_source
from mutations.mutant import Mutant
from mutations.results import Results, explained, report
from mutations.suites import ROOT, Suite
from mutations.workbench import Outcome, Workbench

CPP = """
// a < b in a comment
__global__ void kernel(const Params p) {
  const T* row = p.rows + b * p.row_stride_b + h * p.row_stride_h;
  if (i >= p.count) return;
  total += row[i];
  __syncthreads();
}
"""
CPP_CHANGES = {
    ("stride", "b * p.row_stride_h + h * p.row_stride_h"),
    ("stride", "b * p.row_stride_b + h * p.row_stride_b"),
    ("sign", "p.rows - b * p.row_stride_b"),
    ("bound", "if (i > p.count) return;"),
    ("guard dropped", "  ;\n  total"),
    ("assigned, not accumulated", "total = row[i];"),
    ("barrier removed", "row[i];\n  ;\n}"),
}
TRITON = '''
@triton.jit
def kernel(p, stride_xb, stride_xr, n, BLOCK: tl.constexpr):
    """x < n in a docstring"""
    i = tl.arange(0, BLOCK)
    x = tl.load(p + i * stride_xb, mask=(i < n) & (i >= 0), other=0.0).to(tl.float32)
    total = 0.0
    for k in range(n):
        total += tl.sum(tl.exp2(x), 0)
    tl.store(p, total, mask=n > 0)


def host(a, b):
    return a < b
'''
TRITON_CHANGES = {
    ("stride", "(p + i * (stride_xr)"),
    ("mask dropped", "tl.load((p + i * stride_xb))).to"),
    ("condition", "mask=((i < n)), other"),
    ("bound", "mask=((i <= n)) &"),
    ("other value", "other=(1))"),
    ("cast dropped", "other=0.0))\n"),
    ("loop bound", "range(n - 1)"),
    ("loop bound", "range(1, n)"),
    ("assigned, not accumulated", "total = tl.sum"),
    ("another function", "(tl.exp)(x)"),
    ("statement dropped", "    pass\n"),
}


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        (list(cpp_source.mutants("kernel.cuh", CPP)), CPP_CHANGES),
        (list(triton_source.mutants("kernel.py", TRITON)), TRITON_CHANGES),
    ],
    ids=["C++", "Triton"],
)
def test_changes(found: list[Mutant], changes: set[tuple[str, str]]) -> None:
    for operator, text in changes:
        assert any(m.operator == operator and text in m.mutated for m in found), (operator, text)
    for mutant in found:
        assert mutant.function == "kernel" and mutant.mutated != mutant.source
        assert "a < b in a comment" in mutant.mutated or "x < n in a docstring" in mutant.mutated
        assert "return a < b" in mutant.mutated or mutant.file.endswith(".cuh")


def kernels() -> Iterator[tuple[str, str]]:
    """(file, function) of every Triton kernel and device function, (file, "") of files of csrc/ with device code."""
    for path in (ROOT / "appo_kernels").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                yield str(path.relative_to(ROOT)), node.name
    for path in (ROOT / "csrc").glob("*.cu*"):
        if path.name != "dtypes.cuh" and re.search("__(device|global)__", path.read_text()):
            yield str(path.relative_to(ROOT)), ""


def test_every_kernel_has_mutants() -> None:
    found = {file: {m.function for m in suites.candidates(file)} for file in suites.SUITES}
    for file, function in kernels():
        assert file in found, f"{file} has kernels: name its tests in mutations/suites.py"
        assert not function or function in found[file], (file, function)


def test_the_plan() -> None:
    first, again, other = suites.plan(suites.NUMBER, 0), suites.plan(suites.NUMBER, 0), suites.plan(suites.NUMBER, 1)
    assert len(first) >= 150 and [m.key for m in first] == [m.key for m in again] != [m.key for m in other]
    assert {m.file for m in first} == set(suites.SUITES) and len({m.key for m in first}) == len(first)
    for mutant in (*first, *other):
        assert mutant.mutated.count("\n") == mutant.source.count("\n"), mutant  # what is behind keeps its place
        if mutant.file.endswith(".py"):
            ast.parse(mutant.mutated)


def test_tests_of_kernels_exist() -> None:
    for tests in suites.SUITES.values():
        for suite in tests:
            assert all((ROOT / name.partition("::")[0]).exists() for name in suite.tests), suite


def test_explained_survivors_are_mutants() -> None:
    """A survivor's entry goes where the line it explains goes."""
    reasons = explained()
    known = {m.key for file in {key[0] for key in reasons} for m in suites.candidates(file)}
    assert all(reasons.values()) and not set(reasons) - known


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one kernel and one test."""
    root = tmp_path / "tree"
    for name in ("appo_kernels", "tests"):
        (root / name).mkdir(parents=True)
    (root / "appo_kernels" / "__init__.py").write_text("")
    (root / "appo_kernels" / "kernel.py").write_text(
        "def double(x):\n    while x < 0:\n        x = -x\n    return x * 2\n"
    )
    test = "from appo_kernels.kernel import double\n\ndef test_double():\n    assert double(-3) == 6\n"
    (root / "tests" / "test_kernel.py").write_text(test)
    return root


def test_mutants_are_run_in_a_copy(tree: Path, tmp_path: Path) -> None:
    file = tree / "appo_kernels" / "kernel.py"
    source = file.read_text()

    def mutant(text: str, replacement: str) -> Mutant:
        start = source.index(text)
        return Mutant("appo_kernels/kernel.py", "double", "a fault", start, start + len(text), replacement, source)

    tests = (Suite(("tests/test_kernel.py",)),)
    results = Results(tmp_path / "results.csv")
    wrong, same, endless = mutant("x * 2", "x * 3"), mutant("x * 2", "2 * x"), mutant("-x", "+x")
    (tmp_path / "copy").mkdir()
    with Workbench(tmp_path / "copy", tree) as bench:
        for one, expected in ((wrong, "caught"), (same, "survived"), (endless, "time limit"), (wrong, "caught")):
            outcome = bench.run(one, tests, limit=1 if one is endless else 60)
            assert outcome.result == expected, outcome
            results.add(one, outcome)
        bench.check(tests, limit=60)
        (tree / "tests" / "test_kernel.py").write_text("def test_double():\n    assert False\n")
    assert file.read_text() == source
    known = Results(results.path)
    assert [known.of(m).result for m in (wrong, same, endless)] == ["caught", "survived", "time limit"]  # type: ignore[union-attr]
    (tmp_path / "other").mkdir()
    with Workbench(tmp_path / "other", tree) as bench, pytest.raises(RuntimeError, match="fails without a fault"):
        bench.check(tests, limit=60)


def test_report() -> None:
    mutants = [m for m in triton_source.mutants("kernel.py", TRITON) if m.operator == "loop bound"]
    outcomes = [Outcome("caught", 1.0, "a test"), Outcome("survived", 1.0, "")]
    text, good = report(zip(mutants, outcomes, strict=True), {})
    assert not good and "caught: 50.0%" in text and f"survived: {mutants[1]}" in text
    text, good = report(zip(mutants, outcomes, strict=True), {mutants[1].key: "the first term is 0"})
    assert good and "of those that make a difference: 100.0%" in text and "survived:" not in text
