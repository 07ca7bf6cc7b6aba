"""Commands whose output nobody reads any more end at once, quietly, with the status that shells give for SIGPIPE."""

import subprocess
import sys

import pytest


def closed(*command: str, lines: int = 0) -> tuple[int, str]:
    """Status and errors of a Python command whose output is read for so many lines, as `| head -n LINES` reads it."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(), errors


# Print and typer's echo, click's help and rich's console: each meets the closed pipe in code of its own.
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "appo_kernels.doctor"),
        ("-m", "appo", "--help"),
        ("-m", "appo", "plan", "--model", "Qwen2.5-VL-7B"),
    ],
    ids=lambda command: command[-1],
)
def test_a_command_without_a_reader_ends_quietly(command: tuple[str, ...]) -> None:
    assert closed(*command) == (141, "")


SCRIPTS = {
    "print": "while True: print('line')",
    "flush": "print('line')",  # less than a buffer: written when the command ends
    "rich": "from rich.console import Console\n    while True: Console().print('line')",
    "typer": "import typer\n    def run():\n        while True: typer.echo('line')\n    typer.run(run)",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_reader_that_stops_ends_the_writer(name: str) -> None:
    script = (
        f"from appo_kernels.closed_pipe import quiet_on_closed_pipe\nwith quiet_on_closed_pipe():\n    {SCRIPTS[name]}"
    )
    assert closed("-c", script, lines=0 if name == "flush" else 3) == (141, "")


def test_other_broken_pipes_and_exits_stay_what_they_are() -> None:
    head = "import sys\nfrom appo_kernels.closed_pipe import quiet_on_closed_pipe\nwith quiet_on_closed_pipe():\n    "
    for body, status, last in (
        ("raise BrokenPipeError('of a worker')", 1, "BrokenPipeError: of a worker"),
        ("sys.exit('appo: no such file')", 1, "appo: no such file"),
        ("sys.exit(3)", 3, ""),
        ("print('all of it')", 0, ""),
    ):
        done = subprocess.run([sys.executable, "-c", head + body], capture_output=True, text=True)
        assert (done.returncode, done.stderr.strip().splitlines()[-1:]) == (status, [last] if last else [])
        assert done.stdout == ("all of it\n" if "print" in body else "")
