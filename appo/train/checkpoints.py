"""Checkpoints of a run: `checkpoints/step-000050/`, written under another name and renamed when complete.

What is trained (with LoRA the adapters alone) and the optimizer's state are in torch's distributed format: each process
writes what it holds, and any number of processes reads it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

STATE = "trainer_state.json"
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: Optimizer,
    folder: Path,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Save what is trained, the optimizer's state and ``state`` with its "step"; keep the newest ``keep`` checkpoints.

    All processes call it.
    """
    step = state["step"]
    target = folder / f"step-{step:06d}"
    partial = folder / f".partial-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    dcp.save(_states(policy, optimizer), checkpoint_id=partial, no_dist=not dist.is_initialized())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps(state, indent=2))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        for old in existing(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def load_newest(policy: nn.Module, optimizer: Optimizer, folder: Path) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint and return its state; None where there is none. All processes call it."""
    found = existing(folder)
    if not found:
        return None
    states = _states(policy, optimizer)
    dcp.load(states, checkpoint_id=found[-1], no_dist=not dist.is_initialized())
    set_state_dict(
        policy, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=OPTIONS
    )
    state: dict[str, Any] = json.loads((found[-1] / STATE).read_text())
    return state


def _states(policy: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state}
