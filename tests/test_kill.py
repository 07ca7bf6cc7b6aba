"""Runs that are killed anywhere and started again end as those that were left alone."""

import json
import os
import random
import signal
import time

import processes
import pytest

SETTINGS = {"max_steps": 4, "save_every": 1, "max_new_tokens": 6, "prompts_per_step": 2, "group_size": 3}


def finish(folder, kills, seed):
    """Train in ``folder``, killed ``kills`` times: after a random time, by SIGKILL or SIGTERM in turn."""
    chance, codes = random.Random(seed), []
    for number in range(kills):
        process = processes.start(folder / "result", folder / "run", SETTINGS)
        reached, deadline = chance.randrange(SETTINGS["max_steps"]), time.monotonic() + processes.TIME_LIMIT
        while process.is_alive() and steps(folder / "run") < reached and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.3)
        os.kill(process.pid, (signal.SIGKILL, signal.SIGTERM)[number % 2])
        process.join(processes.TIME_LIMIT)
        codes.append(process.exitcode)
    process = processes.start(folder / "result", folder / "run", SETTINGS)
    process.join(processes.TIME_LIMIT)
    assert process.exitcode == 0
    return json.loads((folder / "result").read_text())["weights"], codes


def steps(output):
    path = output / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0


def metrics(output):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))} for record in found]


def check(tmp_path, kills, seed):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, _ = finish(tmp_path / "whole", 0, seed)
    parts, codes = finish(tmp_path / "parts", kills, seed)
    assert parts == whole and metrics(tmp_path / "parts" / "run") == metrics(tmp_path / "whole" / "run")
    # One that ended before the signal came has 0; SIGTERM before the first step, or after the last, is not waited for.
    assert set(codes[0::2]) <= {-signal.SIGKILL, 0} and set(codes[1::2]) <= {143, 0, -signal.SIGTERM}
    left = {path.name[:5] for path in (tmp_path / "parts" / "run" / "checkpoints").iterdir()}
    assert left == {"step-"}


@pytest.mark.timeout(900)
def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path):
    check(tmp_path, kills=2, seed=0)


# Of the moments of the kills; 0 is that of the short test above.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_runs_killed_many_times(tmp_path, seed):
    check(tmp_path, kills=8, seed=seed)
