"""Checkpoints of a run: `checkpoints/step-000050/`, written under another name and renamed when complete.

What is trained (with LoRA the adapters alone) and the optimizer's state are in torch's distributed format, which any
number of processes can read. A file beside them says how far the run was, and what each other file should be.
"""

import errno
import json
import logging
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from appo.train.collective import from_main, together

logger = logging.getLogger("appo")

STATE = "trainer_state.json"
NAME = re.compile(r"step-(\d+)")
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be loaded, or one cannot be saved: the message says which, why, and what to do."""


def save(
    accelerator: Accelerator,
    policy: nn.Module,
    optimizer: Optimizer,
    folder: Path,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Save what is trained, the optimizer's state and ``state`` with its "step"; keep the newest ``keep`` checkpoints.

    All processes call it. Raises CheckpointError, after removing what was written of it; older ones stay.
    """
    target = folder / f"step-{state['step']:06d}"
    partial = target.with_name("." + target.name)
    try:
        from_main(accelerator, lambda: _make_empty(partial))
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=OPTIONS)
        states = {"model": model_state, "optimizer": optimizer_state}
        with _alone_or_not() as alone:
            dcp.save(states, checkpoint_id=partial, no_dist=alone)
        from_main(accelerator, lambda: _complete(partial, target, state))
    except Exception as error:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: cannot be saved: {_reason(error, folder)} Older checkpoints are kept."
        ) from error
    from_main(accelerator, lambda: _remove(existing(folder)[:-keep]))
    return target


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=_step_of)


def load_newest(
    accelerator: Accelerator, policy: nn.Module, optimizer: Optimizer, folder: Path
) -> dict[str, Any] | None:
    """Restore the newest checkpoint that is whole and return its state; None where there is none at all.

    A damaged one is passed over with a warning that names it and the reason, and gets the ending .damaged. All
    processes call it. Raises CheckpointError when there are checkpoints, and none can be loaded.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(from_main(accelerator, lambda: named(folder))):
        try:
            state: dict[str, Any] = from_main(accelerator, lambda path=path: read_state(path))
        except Exception as error:
            damaged[path] = f"{path}: {_reason(error, folder)}"
            logger.warning("checkpoint passed over: %s", damaged[path])
            continue
        try:
            with together(accelerator):
                _load(policy, optimizer, path)
        except Exception as error:  # it is whole, but not of this model
            raise CheckpointError(f"{path}: cannot be loaded into this model: {_reason(error, folder)}") from error
        from_main(accelerator, lambda: _set_aside(list(damaged)))
        return state
    if damaged:
        raise CheckpointError(
            f"no checkpoint of the run can be loaded. {' '.join(damaged.values())} Remove {folder} to start from the "
            "beginning, or choose another `output`."
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The state that a checkpoint was saved with, once every file of it is found to be as it was written."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["step"] != _step_of(path):
        raise ValueError(f"{STATE} is of step {state['step']}.")
    for name, (size, checksum) in state["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing.")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {size}.")
        if _checksum(file) != checksum:
            raise ValueError(f"{name} has other contents than were written.")
    return state


def _load(policy: nn.Module, optimizer: Optimizer, path: Path) -> None:
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=OPTIONS)
    states = {"model": model_state, "optimizer": optimizer_state}
    with _alone_or_not() as alone:
        dcp.load(states, checkpoint_id=path, no_dist=alone)
    set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=OPTIONS)


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether there is one process; torch warns of it though it is told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not dist.is_initialized()


def named(folder: Path) -> list[Path]:
    """Everything that is called a checkpoint, oldest first, whole or not."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _set_aside(paths: Sequence[Path]) -> None:
    """Damaged checkpoints get another name, so that they are not counted among those to keep."""
    for path in paths:
        aside = path.with_name(path.name + ".damaged")
        _remove([aside])
        path.rename(aside)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(partial: Path, target: Path, state: dict[str, Any]) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sums = {str(path.relative_to(partial)): (path.stat().st_size, _checksum(path)) for path in files}
    (partial / STATE).write_text(json.dumps(state | {"files": sums}, indent=2), encoding="utf-8")
    put_in_place(partial, target)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a folder its name once it is on disk to the last byte, instead of what had that name before."""
    for path in [*(path for path in partial.rglob("*") if path.is_file()), partial]:
        _flush(path)
    _remove([target])
    partial.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # a folder cannot be opened there
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _reason(error: BaseException, folder: Path) -> str:
    """The cause in a sentence: that the disk is full wherever that stands in the chain of causes."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or cause in found:
            continue
        found.append(cause)
        failures = getattr(cause, "failures", None)  # of torch's CheckpointException, by process
        waiting += [cause.__cause__, cause.__context__, *(failure[0] for failure in (failures or {}).values())]
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    full = {errno.ENOSPC, errno.EDQUOT}
    if any(isinstance(cause, OSError) and cause.errno in full for cause in found):
        return f"the disk is full ({free / 2**20:.0f} MiB free). Make room, or lower `keep_checkpoints`."
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no reason given'}"
