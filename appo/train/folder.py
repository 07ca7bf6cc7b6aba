"""The folder of a run: one run at a time in it, and the same settings when it goes on."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from appo.config import APPOConfig, ConfigError
from appo.train import checkpoints
from appo.train.collective import from_main

# What may be another when a run goes on: how far and where it runs, how its work is divided, and what is kept of it.
FREE = {
    "output", "max_steps", "resume", "on_broken", "max_skipped", "data_root", "eval_data", "eval_every", "eval_batch",
    "eval_samples", "save_every", "keep_checkpoints", "sample_every", "tensorboard", "decode_timeout", "micro_groups",
    "rollout_tokens", "gradient_checkpointing", "checkpoint_every", "checkpoint_offload", "share_prompt",
    "attn_implementation", "micro_tokens", "shard",
    "shard_group", "offload", "save_best", "trackers", "project",
    "heads_every", "eval_looking", "frame_cache", "frame_cache_gib", "prompt_cache_gib", "allow_outside", "engine_urls",
    "engine_token", "engine_timeout", "engine_retries", "vllm_python", "vllm_arguments", "weight_transfer", "liger",
}  # fmt: skip
PATHS = ("model", "data")


@contextmanager
def locked(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """Keep other runs out of ``output`` until left, or until the process is gone, however it ends.

    Raises ConfigError in every process when another run is in there, or no folder can be made of it.
    """
    lock = FileLock(output / ".lock")
    from_main(accelerator, lambda: _acquire(lock, output))
    try:
        yield
    finally:
        lock.release()


def check_goes_on(config: APPOConfig) -> None:
    """Raise ConfigError where another run is in ``output``, or one of other settings is to go on there; before anything
    is loaded."""
    output = Path(config.output)
    check_same_settings(config, output)
    if os.environ.get("RANK", "0") == "0" and (output / ".lock").is_file():
        lock = FileLock(output / ".lock")
        _acquire(lock, output)
        lock.release()


def _acquire(lock: FileLock, output: Path) -> None:
    holder = output / ".lock-holder"
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout as error:
        raise ConfigError(
            f"`output`: another run is in {output} ({_read(holder)}). Wait for it, or choose another folder."
        ) from error
    except OSError as error:
        raise ConfigError(f"`output`: {output}: cannot be written to: {error.strerror or error}.") from error


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else "unknown process"


def check_same_settings(config: APPOConfig, output: Path) -> None:
    """Raise ConfigError when a run that has a checkpoint in ``output`` was of settings that do not fit ``config``.

    ``resume: force`` goes on all the same.
    """
    path = output / "config.yaml"
    if config.resume == "force" or not path.is_file() or not checkpoints.named(output / "checkpoints"):
        return
    try:
        before = APPOConfig.load(path).to_dict()
    except ConfigError as error:
        raise ConfigError(
            f"`output`: {output} holds a run whose settings cannot be read ({error}). Go on all the same with "
            "resume=force, or choose another folder."
        ) from error
    now = config.to_dict()
    changed = [
        f"{name} = {before[name]!r}, now {value!r}"
        for name, value in now.items()
        if name not in FREE and not _same(name, before[name], value)
    ]
    if changed:
        raise ConfigError(
            f"`output`: {output} holds a run with other settings: {'; '.join(changed)}. Choose another folder, or go "
            "on with the new ones with resume=force."
        )


def _same(name: str, before: Any, now: Any) -> bool:
    if name in PATHS and isinstance(before, str) and isinstance(now, str) and Path(before).exists():
        return Path(before).resolve() == Path(now).resolve()
    return bool(before == now)
