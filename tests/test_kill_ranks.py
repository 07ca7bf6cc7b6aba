"""A process of several that is killed, in a step or while it saves: the run goes on with nothing lost."""

import json
import random
import time
from pathlib import Path

import processes
import pytest

SETTINGS = {"max_steps": 9, "save_every": 1, "max_new_tokens": 6, "prompts_per_step": 2, "group_size": 3}


def kill_one(folder: Path, shard: str, chance: random.Random) -> None:
    """Start two processes; kill one at a random moment, every other time one at which a checkpoint is half written.

    The other one has a moment to end by itself, and is killed then, as launchers do.
    """
    saves, run = chance.random() < 0.5, folder / "run"
    reached = len(lines(run)) + chance.randrange(2)
    running = processes.start_together(2, folder, run, SETTINGS | {"shard": shard})
    deadline = time.monotonic() + processes.TIME_LIMIT
    while all(process.is_alive() for process in running) and time.monotonic() < deadline:
        if len(lines(run)) >= reached and (not saves or any((run / "checkpoints").glob(".step-*"))):
            break
        time.sleep(0.002)
    time.sleep(chance.random() * (0.02 if saves else 0.2))
    running[chance.randrange(2)].kill()
    for process in running:
        process.join(5)
        process.kill()
        process.join()


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))} for record in found]


def check(tmp_path: Path, shard: str, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (expected, _) = processes.train_together(2, whole / "run", SETTINGS | {"shard": shard})
    for _ in range(kills):
        kill_one(parts, shard, chance)
    (found, _) = processes.train_together(2, parts / "run", SETTINGS | {"shard": shard})
    assert found["weights"] == expected["weights"] and lines(parts / "run") == lines(whole / "run")
    assert {path.name[:5] for path in (parts / "run" / "checkpoints").iterdir()} == {"step-"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", ["none", "fsdp"])  # 20 kills in all
def test_a_run_outlives_many_of_its_processes(tmp_path, shard):
    check(tmp_path, shard, kills=10, seed=1)
