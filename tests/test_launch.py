"""Processes of a launcher: one world of all, on CPUs too, or an error before anything is loaded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import training

from appo.config import APPOConfig, ConfigError
from appo.train import launch

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}


def form(result: Path, output: str, variables: dict[str, str]) -> None:
    """What a process that nobody told to compute on CPUs finds of the others."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update(variables)
    config = training.config(output)
    launch.check_launch(config)
    accelerator = launch.processes(config)
    ranks = torch.tensor([accelerator.process_index + 1])
    dist.all_reduce(ranks)
    result.write_text(json.dumps([accelerator.num_processes, int(ranks), accelerator.is_main_process]))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of machines without a GPU")
def test_processes_without_a_gpu_are_one_world(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [
        processes.CONTEXT.Process(target=form, args=(tmp_path / str(rank), str(tmp_path / "run"), ranks[rank]))
        for rank in range(2)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [[2, 3, True], [2, 3, False]]


def test_a_launch_that_forms_no_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in launch.TOLD:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 .* RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        launch.check_launch(APPOConfig())
    for name in launch.TOLD:
        monkeypatch.setenv(name, "0")
    launch.check_launch(APPOConfig())
    with pytest.raises(ConfigError, match="`prompts_per_step`: expected a multiple of the 2 processes, got 3"):
        launch.check_launch(APPOConfig(prompts_per_step=3))
    monkeypatch.setattr(launch, "Accelerator", lambda **_: Alone())
    with pytest.raises(ConfigError, match=r"2 processes were started .* in a group of 1"):
        launch.processes(APPOConfig())


class Alone:
    num_processes, device, is_main_process = 1, "cpu", True


def test_more_processes_of_torchrun_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "_on_cpus", lambda: False)
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", **dict.fromkeys(launch.TOLD, "0")}.items():
        monkeypatch.setenv(name, value)
    launch.check_launch(APPOConfig())  # of a launcher that shows each process its own GPU
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ConfigError, match="a process for each of the 1 GPUs that torch sees here, got 2"):
        launch.check_launch(APPOConfig())


def torchrun(*arguments: object) -> Any:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "appo", "train"]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_torchrun_without_a_gpu_trains_as_one(tmp_path: Path) -> None:
    model, processor = training.tiny()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    settings = tmp_path / "run.yaml"
    own = {name: value for name, value in training.SETTINGS.items() if name not in ("rewards", "prompts_per_step")}
    lines = {"model": "model", "data": str(training.records()[0].meta["file"]), "max_steps": 1, **own}
    settings.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in lines.items()))
    output = tmp_path / "run"
    ended = torchrun(settings, f"output={output}", "shard=fsdp", "prompts_per_step=4")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 processes compute on CPUs") == 1
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and (output / "final" / "model.safetensors").is_file()
    ended = torchrun(settings, f"output={tmp_path / 'odd'}", "prompts_per_step=3")
    assert "appo: `prompts_per_step`: expected a multiple of the 2 processes, got 3." in ended.stderr
    assert not (tmp_path / "odd").exists()
