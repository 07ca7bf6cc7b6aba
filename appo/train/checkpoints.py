"""Checkpoints of a run: `checkpoints/step-000050/`, written under another name and renamed when complete."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

STATE = "trainer_state.json"


def save(accelerator: Accelerator, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Save model, optimizer, scheduler and random states with ``state``; keep the newest ``keep`` checkpoints."""
    target = folder / f"step-{step:06d}"
    partial = folder / f".partial-{step:06d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps({"step": step} | state, indent=2))
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


def load_newest(accelerator: Accelerator, folder: Path) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint and return its state; None where there is none."""
    found = existing(folder)
    if not found:
        return None
    accelerator.load_state(str(found[-1]))
    state: dict[str, Any] = json.loads((found[-1] / STATE).read_text())
    return state
