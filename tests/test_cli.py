"""The command line: what is wrong is said in one line, before any work, with an exit code that says whose fault."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from page_inputs import write_small_run
from typer.testing import CliRunner

from appo.cli import app

CLIP = "tests/none.mp4"


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and what was printed."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


def refused(*arguments: object) -> str:
    code, printed = run(*arguments)
    assert code == 2, printed
    assert printed.startswith("appo: ") and printed.count("\n") == 1, printed
    return printed


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clip is made, no model and no record read: what is refused is refused before."""

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("work was done before the error")

    # The modules that import the last two come first.
    for name in (
        "appo.demo.run_demo",
        "appo.reports.inspect_clip.examine",
        "appo.reports.run_report.read_runs",
        "appo.train.setup.load_model",
        "appo.data.load.load_records",
    ):
        monkeypatch.setattr(name, fail)


def hostile_places(folder: Path) -> list[tuple[Path, str]]:
    """Places where no folder can be made, and what the message says of them."""
    (folder / "file").write_text("x")
    return [
        (folder / "file", "expected a folder, got the file"),
        (folder / "file" / "below", "is a file"),
        (Path("/proc/appo"), "expected a place that can be written"),
        (folder / ("x" * 300), "File name too long"),
        (Path(""), "expected a"),
    ]


@pytest.mark.usefixtures("nothing_is_loaded")
def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("model: some/model\ndata: train.json\n")
    for place, named in hostile_places(tmp_path):
        if str(place) != ".":
            assert named in refused("demo", "--output", place)
            assert named in refused("inspect", "--model", "m", "--video", CLIP, "--question", "?", "--output", place)
            assert named in refused("train", settings, f"output={place}")
    assert "`output`: expected text that is not empty" in refused("train", settings, "output=")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file").write_text("x")
    for suffix, command in ((".html", ["report", tmp_path]), (".jsonl", ["eval", "--model", "m", "--data", "d.json"])):
        for place, named in (
            ("page.png", f"expected a file that ends in {suffix}"),
            ("page", f"expected a file that ends in {suffix}"),
            (f"folder{suffix}", "expected a file, got the folder"),
            (f"file/x{suffix}", "is a file"),
        ):
            assert named in refused(*command, "--output", tmp_path / place)
        assert "expected a place that can be written" in refused(*command, "--output", f"/proc/appo/x{suffix}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_places_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "expected a place that can be written" in refused("demo", "--output", tmp_path / "demo")


# Settings and texts that no command can use.
@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "tests"], "no such file"),
        (["eval", "--model", "", "--data", "d.json"], "`model`: expected a value"),
        (["eval", "--model", "m", "--data", "d.json", "fps=.inf"], "`fps`: expected a number"),
        (["eval", "--model", "m", "--data", "d.json", "nonsense"], "expected key=value"),
        (["inspect", "--model", "m", "--video", CLIP, "--question", " "], "`question`: expected text"),
    ],
)
def test_values_that_cannot_be_used(arguments: list[str], named: str) -> None:
    assert named in refused(*arguments)


# Options whose range the parser knows.
@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--steps", "0"],
        ["demo", "--steps", "-3"],
        ["demo", "--seed", "-1"],
        ["eval", "--model", "m", "--data", "d", "--limit", "0"],
        ["plan", "--model", "Qwen2.5-VL-7B", "--frames", "many"],
        ["report"],
        ["nonsense"],
    ],
)
def test_options_out_of_range(arguments: list[str]) -> None:
    code, printed = run(*arguments)
    assert code == 2 and "Traceback" not in printed


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        '[{"problem": "?", "problem_type": "free-form", "solution": "a", "options": []}]'
    )
    (tmp_path / "empty").mkdir()
    for model, named in (
        (tmp_path / "none", "expected a folder that exists or a hub name"),
        (tmp_path / "data.json", "expected a folder, got the file"),
        ("a/b/c", "expected a folder that exists or a hub name"),
        (tmp_path / "empty", "cannot be loaded"),
    ):
        assert named in refused("inspect", "--model", model, "--video", __file__, "--question", "?")


def test_run_folders_that_are_none(tmp_path: Path) -> None:
    assert "expected a run folder" in refused("report", tmp_path)
    assert "no such folder" in refused("report", tmp_path / "gone", "--output", tmp_path / "x.html")


def test_a_report_says_where_it_is(tmp_path: Path) -> None:
    folder = write_small_run(tmp_path / "run", steps=2)
    code, printed = run("report", folder)
    assert (code, printed.strip()) == (0, str(folder / "report.html"))


def test_ctrl_c_in_any_command_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("appo.demo.run_demo", interrupt)
    assert run("demo", "--output", tmp_path) == (130, "appo: interrupted\n")
    monkeypatch.setattr("appo.reports.run_report.read_runs", interrupt)
    assert run("report", tmp_path) == (130, "appo: interrupted\n")


def test_ctrl_c_while_a_file_of_records_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("appo.data.check.check_file", interrupt)
    code, printed = run("data", "check", tmp_path / "train.json")
    assert (code, printed.strip()) == (130, "appo: interrupted")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("appo.demo.run_demo", fill)
    assert run("demo", "--output", tmp_path) == (1, f"appo: {tmp_path / 'x'}: No space left on device\n")


def test_a_signal_reaches_the_process(tmp_path: Path) -> None:
    """A real Ctrl-C in a process of its own."""
    code = (
        "import signal, sys; import appo.reports.run_report as r\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may have it ignored\n"
        "r.read_runs = lambda runs: signal.raise_signal(signal.SIGINT)\n"
        f"sys.argv = ['appo', 'report', {str(tmp_path)!r}]\n"
        "from appo.cli import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert (found.returncode, found.stderr) == (128 + signal.SIGINT, "appo: interrupted\n")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_reward_of_the_users_is_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def brief(text): return 1.0")
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: m\ndata: train.json\noutput: {tmp_path}/run\nrewards: {{{tmp_path}/my.py:brief: 1.0}}\n"
    )
    assert "expected a function of (text, record), got one of (text)" in refused("train", settings)
