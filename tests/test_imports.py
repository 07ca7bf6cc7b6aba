"""Imports run one way, whether at the top of a module, inside a function or for types alone."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The folders of appo/ from the floor up: none imports one of its own floor or of one above it.
FLOORS = (
    ("method", "recording"),
    ("models",),
    ("data",),
    ("rollout", "tasks"),
    ("train",),
    ("evaluation", "credit", "integrations", "planning"),
    ("reports",),
)


def named(path: Path) -> Iterator[str]:
    """All that a file imports, anywhere in it, as "package.module" and "package.module.name"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports(package: str) -> dict[str, set[str]]:
    """The modules of a package, each with those of the package that it imports."""
    paths = {path: path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / package).rglob("*.py")}
    modules = {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}
    found = {}
    for module, path in modules.items():
        known = set(named(path)) & set(modules)
        # Of `from package import module` the module, not the package.
        found[module] = {name for name in known if not any(other.startswith(f"{name}.") for other in known)} - {module}
    return found


def test_no_module_imports_itself_by_way_of_others():
    for package in ("appo", "appo_kernels"):
        TopologicalSorter(imports(package)).prepare()  # raises CycleError, which names the circle


def test_the_kernels_know_nothing_of_training():
    for path in (ROOT / "appo_kernels").rglob("*.py"):
        assert not [name for name in named(path) if name.split(".")[0] == "appo"], path


def test_an_operator_imports_no_other_operator():
    for module, imported in imports("appo_kernels").items():
        if module.startswith("appo_kernels.ops."):
            operators = {name.split(".")[2] for name in (module, *imported) if name.startswith("appo_kernels.ops.")}
            assert len(operators) == 1, f"{module} imports of {sorted(operators)}"


def test_folders_of_the_training_layer_import_downwards():
    floor = {f"appo.{folder}": level for level, folders in enumerate(FLOORS) for folder in folders}
    folders = {f"appo.{path.parent.name}" for path in (ROOT / "appo").glob("*/__init__.py")}
    assert set(floor) == folders, "a folder without a floor"
    for module, imported in imports("appo").items():
        here = ".".join(module.split(".")[:2])
        for other in imported:
            there = ".".join(other.split(".")[:2])
            if here in floor and there in floor and here != there:
                assert floor[there] < floor[here], f"{module} imports {other}"
