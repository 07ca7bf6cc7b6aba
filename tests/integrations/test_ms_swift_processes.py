"""ms-swift with ours in two gloo processes on a CPU, a group in each: their weights, and one model."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("swift.rlhf_trainers", reason="ms-swift is not installed: `make test-integrations`")

import test_ms_swift as shared
from two_processes import run_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SCRIPT = (
    "import os, pathlib, sys, test_ms_swift_processes as own\n"
    "own.one_of_two(pathlib.Path(sys.argv[1]), os.environ['RANK'], int(sys.argv[2]))"
)


def one_of_two(folder: Path, rank: str, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            made, responses = shared.watched(
                folder, patch, per_device_train_batch_size=rows, gradient_accumulation_steps=2, ddp_backend="gloo"
            )
        except ValueError as error:
            print(error, flush=True)
            os._exit(1)  # a process of ms-swift that has met over gloo does not end by itself after an error
    model = made.accelerator.unwrap_model(made.model)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.save((responses, made.accelerator.num_processes, flat), folder / f"{rank}.pt")


def processes(folder: Path, rows: int) -> list[tuple[int, str]]:
    shared.prepare(folder)
    return run_two("-W", "ignore", "-c", SCRIPT, str(folder), str(rows), timeout=280)


def test_each_process_weighs_its_group_and_the_model_is_one(tmp_path: Path) -> None:
    ends = processes(tmp_path, 2)
    assert [status for status, _ in ends] == [0, 0], ends
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[:2] == second[:2] == (shared.G, 2)
    start = torch.cat([parameter.detach().flatten() for parameter in shared.build_tiny(0)[0].parameters()])
    assert torch.equal(first[2], second[2]) and float((first[2] - start).norm()) > 0


def test_groups_that_straddle_processes_are_refused_in_each(tmp_path: Path) -> None:
    """Two responses in each of two processes are one group of 4, which ms-swift takes."""
    for status, output in processes(tmp_path, 1):
        assert status == 1
        assert "steps_per_generation = 2 to be a multiple of num_generations = 4" in output
