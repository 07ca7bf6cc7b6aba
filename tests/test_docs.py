"""What the documents say of the code holds: places, settings, examples, names."""

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import appo_kernels
from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.records import Record
from appo.rollout import rewards as built_in
from appo.rollout.registry import REWARDS, get_reward
from appo.rollout.rewards import UNREADABLE
from appo_kernels import dispatch
from appo_kernels.doctor import operators
from benchmarks import readme

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
PLACE = re.compile(r"`([\w./-]+\.(?:py|cu|cuh|h|cpp)):([A-Za-z_][\w.]*)")
NAME_OF_A_FILE = re.compile(r"`((?:appo|appo_kernels|csrc|ptxsim|tests|benchmarks|examples|docs)/[\w./-]+\.\w+)[`:]")


def tracked_files() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if names.returncode:
        pytest.skip(f"not a git checkout: {names.stderr.strip()}")
    return [ROOT / name for name in names.stdout.splitlines() if (ROOT / name).is_file()]


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods ("Class.method") and module constants of a Python file; words of any other file."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\w+", text))
    names = set()
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            inner = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            names |= {f"{node.name}.{child.name}" for child in inner}
    return names


# Every document there is.
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_place_that_a_document_names_exists(document):
    text = document.read_text()
    wrong = [name for name in NAME_OF_A_FILE.findall(text) if not (ROOT / name).exists()]
    assert not wrong, f"{document.name} names files that do not exist"
    for file, name in PLACE.findall(text):
        assert (ROOT / file).is_file(), f"{document.name}: {file}:{name}: no such file"
        assert name in defined_names(ROOT / file), f"{document.name}: {file}:{name}: no such name there"


def test_the_method_names_a_function_beside_every_equation():
    text = (ROOT / "docs/method.md").read_text()
    numbers = [int(number) for number in re.findall(r"^    \((\d+)\) ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)), "equations are numbered in order"
    cited = {int(n) for n in re.findall(r"\((\d+)\)", re.sub(r"^    \(\d+\) ", "", text, flags=re.MULTILINE))}
    assert cited <= set(numbers), "only numbers of equations are cited"
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        assert PLACE.search(section) or not re.search(r"^    \(\d+\) ", section, re.MULTILINE), section[:40]


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_code_cites_only_documents_and_equations_that_exist():
    equations = re.findall(r"^    \((\d+)\) ", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    sections = re.findall(r"^## (\d+)\.", (ROOT / "docs/method.md").read_text(), re.MULTILINE)
    for path in tracked_files():
        if path.suffix not in (".py", ".cu", ".cuh", ".h", ".yaml", ".md"):
            continue
        text = path.read_text()
        for name in re.findall(r"\bdocs/\w+\.md\b", text):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} cites {name}"
        for numbers in re.findall(r"docs/method\.md,? eqs?\. ([\d, ]*\d)", text):
            assert set(re.findall(r"\d+", numbers)) <= set(equations), f"{path.relative_to(ROOT)}: equations {numbers}"
        for number in re.findall(r"docs/method\.md,? sections? (\d+)", text):
            assert number in sections, f"{path.relative_to(ROOT)}: section {number}"


def test_nothing_refers_to_a_document_that_users_do_not_have():
    hidden = "".join(("SP", "EC"))  # so that this file does not contain the word
    for path in tracked_files():
        if path.suffix in (".png", ".svg") or path.name == "LICENSE":
            continue
        text = path.read_text(errors="replace")
        assert not re.search(rf"\b{hidden}\b|\bSpecification: section", text), path.relative_to(ROOT)


def settings_table() -> dict[str, str]:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
    return dict(rows)


def test_the_table_of_settings_is_the_configuration():
    written, defaults = settings_table(), APPOConfig()
    fields = [field.name for field in dataclasses.fields(APPOConfig)]
    assert sorted(written) == sorted(fields), "docs/training.md has one row for every field of APPOConfig"
    for name in fields:
        value = APPOConfig.from_dict({name: yaml.safe_load(written[name])})
        assert getattr(value, name) == getattr(defaults, name), f"docs/training.md: default of `{name}`"


def test_allowed_values_are_those_of_the_configuration():
    text = (ROOT / "docs/training.md").read_text()
    choices = {f.name: f.metadata["constraint"].choices for f in dataclasses.fields(APPOConfig)}
    assert sum(bool(allowed) for allowed in choices.values()) >= 12
    for name, allowed in choices.items():
        if not allowed:
            continue
        row = re.search(rf"^\| `{name}` \| .*$", text, re.MULTILINE)
        assert row, name
        values = {value.strip() for value in row[0].split("|")[3].split(",")}
        assert values == set(allowed), f"docs/training.md: values of `{name}`"


def test_the_released_presets_values_stand_in_the_table():
    text, released, paper = (ROOT / "docs/training.md").read_text(), APPOConfig.released(), APPOConfig.paper()
    for field in dataclasses.fields(APPOConfig):
        value = getattr(released, field.name)
        if value == getattr(paper, field.name):
            continue
        row = re.search(rf"^\| `{field.name}` \| .*$", text, re.MULTILINE)
        assert row and "released: " in row[0], field.name
        said = row[0].split("released: ")[1]
        expected = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        assert said.startswith(expected), f"docs/training.md: `{field.name}`: {expected}"


def test_the_records_shown_are_read(tmp_path):
    shown = re.search(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    assert shown
    file = tmp_path / "records.json"
    file.write_text(shown[1])
    first, second = load_records(file)
    assert (first.answer, first.kind, first.duration) == ("B", "multiple choice", 12.0)
    assert (second.answer, second.time_spans, second.asks_time) == ("A", ((3.5, 6.0),), True)
    assert len(json.loads(shown[1])) == 2


def test_rewards_are_named_in_the_document():
    written = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/data.md").read_text(), re.MULTILINE))
    ours = {name for name, reward in REWARDS.items() if reward.__module__ == built_in.__name__}
    assert written == ours


def test_the_reward_of_ones_own_works(tmp_path):
    text = (ROOT / "docs/data.md").read_text()
    shown = re.search(r"## A reward of your own\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert shown
    (tmp_path / "my.py").write_text(shown[1])
    records = [Record("1", "q", "A", "free-form") for _ in range(3)]
    records.append(Record("1", "q", "A", "multiple choice", options=("A. x", "B. y")))
    reward = get_reward(f"{tmp_path}/my.py:brief")
    texts = ["<answer>a b</answer>", "<answer>a b c d</answer>", "no tags", "<answer>A</answer>"]
    assert reward(texts, records) == [1.0, 0.0, UNREADABLE, None]


def test_every_module_named_in_a_docstring_exists():
    """Dotted names of our packages in the text of modules lead to a module or to something in it."""
    for path in tracked_files():
        if path.suffix != ".py" or path.parts[len(ROOT.parts)] not in ("appo", "appo_kernels", "examples"):
            continue
        for name in re.findall(r"`(appo(?:_kernels)?(?:\.[a-z_]+)+)", path.read_text()):
            assert importlib.util.find_spec(name.rpartition(".")[0]) is not None, f"{path.relative_to(ROOT)}: {name}"


def test_readmes_figures_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert readme.written(text) == text, "run `python -m benchmarks.readme --write`"


def test_the_diagram_is_what_its_script_draws():
    specification = importlib.util.spec_from_file_location("idea", ROOT / "docs/images/idea.py")
    assert specification and specification.loader
    idea = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(idea)
    assert idea.draw() == idea.FILE.read_text(), "run `python docs/images/idea.py`"


def test_the_first_screen_has_what_a_newcomer_asks():
    """What it is, what is not proved, how to install and the code, before line 50."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:50])
    for words in ("no GPU", "no better than GRPO", "pip install", "record_frame_mass", "linear_weighted_surrogate"):
        assert words in screen
    assert "| operator |" in screen


def layout_patterns() -> dict[str, set[str]]:
    """CONTRIBUTING's layout: folder -> names and patterns of its files."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Layout")[1].split("\n## ")[0]
    found: dict[str, set[str]] = {}
    parents: dict[int, str] = {}
    for line in re.findall(r"^    ( *)(\S.*)$", text, re.MULTILINE):
        depth, words = len(line[0]), line[1]
        if depth > 8:
            continue  # a description goes on
        above = "".join(parents[d] for d in sorted(parents) if d < depth)
        parents = {d: name for d, name in parents.items() if d < depth}
        folders = re.match(r"([\w<>]+/)+", words)
        if folders:
            parents[depth] = above = above + folders[0]
            parents = {0: above} if depth == 0 else {**parents, depth: folders[0]}
        for name in re.findall(r"[\w*<>]+(?:\.(?:py|js|css)|/(?=[,\s]))", words):
            found.setdefault(above, set()).add(name)
    return found


def test_the_layout_lists_every_module():
    """By name or by pattern, under its folder; and every name and pattern is that of some file."""
    patterns = layout_patterns()
    used = set()
    for path in tracked_files():
        place = path.relative_to(ROOT)
        folder = "appo_kernels/ops/<op>/" if place.parts[:2] == ("appo_kernels", "ops") else f"{place.parent}/"
        listed = place.parts[0] in ("appo", "appo_kernels", "benchmarks") or folder in ("tests/", "tests/kernels/")
        if not listed or place.suffix not in (".py", ".js", ".css") or place.name.startswith(("__", "conftest")):
            continue
        hits = {name for name in patterns.get(folder, ()) if fnmatch(place.name, re.sub(r"<\w+>", "*", name))}
        assert hits, f"CONTRIBUTING's layout: list {place.name} under {folder}, by its name or a pattern"
        used |= {(folder, name) for name in hits}
    python = {(folder, name) for folder, names in patterns.items() for name in names if not name.endswith("/")}
    unused = {(folder, name) for folder, name in python - used if folder.startswith(("appo", "benchmarks"))}
    assert not unused, f"CONTRIBUTING's layout lists what does not exist: {sorted(unused)}"


def test_the_table_of_operators_and_backends_is_that_of_the_code():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`\w+`.*?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    public = {name for name in appo_kernels.__all__ if name.islower() and callable(getattr(appo_kernels, name))}
    assert public <= named | {"group_divergence_from_logits", "merge_attention"}, "every public operator has a row"
    for row in rows:
        op = re.findall(r"`(\w+)`", row[0])[0]
        folder = next(name for name in operators() if op.endswith(name))
        for backend, cell in zip(("torch", "triton", "cuda"), row[1:], strict=True):
            assert (cell == "none") == (dispatch.implementation(folder, backend) is None), f"{op}, {backend}: {cell}"
            previous = ""
            for name in re.findall(r"`([\w/.]+)`", cell):
                if name.startswith("csrc/"):
                    assert list(ROOT.glob(f"{name}.*")), name
                    continue
                path = name if "/" in name else f"{previous}/{name}"
                previous = path.rpartition("/")[0]
                assert (ROOT / "appo_kernels" / path).is_file(), f"{op}, {backend}: {name}"


def test_nothing_in_tests_has_the_name_of_a_package():
    """`tests` is on the path: a folder "vllm" there would be taken for vLLM by whoever asks whether it is installed."""
    import sys

    names = {path.stem for path in (ROOT / "tests").iterdir() if not path.name.startswith(("_", "."))}
    packages = {"vllm", "trl", "verl", "sglang", "datasets", "transformers", "peft", "swift", "ray", "deepspeed"}
    assert not names & (packages | set(sys.stdlib_module_names))


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name alone: of two with one name it runs the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_no_module_has_a_name_of_the_standard_library():
    packages = ("appo", "appo_kernels", "benchmarks", "ptxsim", "cudasim", "gpu_rehearsal")
    names = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert not [str(path) for path in names if path.stem in {*sys.stdlib_module_names, "pipes"}]
