"""The processes of a run, as torchrun or accelerate started them: what they may be, and the world that they form."""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from appo.config import APPOConfig, ConfigError

logger = logging.getLogger("appo")

# Of copies (`shard: none`): buffers are never trained, and their broadcast would make a forward without gradient a
# collective, which processes make in unequal numbers.
COPIES = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
# A process may wait so long for the others: they sample, decode and evaluate unequally long.
PATIENCE = timedelta(hours=2)
# Environment of `accelerate launch` -> what its config file asks for.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)",
    "ACCELERATE_USE_FSDP": "accelerate's own FSDP plugin",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# What each of several processes is told by its launcher.
TOLD = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_launch(config: APPOConfig) -> None:
    """Raise ConfigError where processes were started in a way that does not fit; before anything is loaded."""
    for name, asked in REFUSED.items():
        if _is_set(name):
            raise ConfigError(
                f"accelerate: expected plain processes, got a launch with {asked} ({name}={os.environ[name]}). Take it "
                "out of the accelerate config (accelerate launch --multi_gpu, or torchrun), and set `shard: fsdp`."
            )

    world = _world()
    if config.shard_group and world % config.shard_group:
        raise ConfigError(
            f"`shard_group`: expected a divisor of the {world} processes, got {config.shard_group}. Change either."
        )
    _check_prompts(config, world)
    if config.offload and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "`offload`: expected a launch with torchrun, of one process too (torchrun --nproc_per_node 1 -m appo ...), "
            "got a plain one."
        )
    untold = [name for name in TOLD if name not in os.environ]
    if world > 1 and untold:
        raise ConfigError(
            f"launch: WORLD_SIZE={world} says that there are {world} processes, and {', '.join(untold)} is not set. "
            "Start them with torchrun or accelerate launch, or take WORLD_SIZE out of the environment for one process."
        )
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    # The processes of torchrun see the same GPUs; other launchers may show each its own.
    if "TORCHELASTIC_RUN_ID" in os.environ and not _on_cpus() and torch.cuda.is_available() and here > gpus:
        raise ConfigError(
            f"launch: expected at most a process for each of the {gpus} GPUs that torch sees here, got {here}. Start "
            f"{gpus}, or look at CUDA_VISIBLE_DEVICES."
        )


def processes(config: APPOConfig, trackers: Sequence[GeneralTracker] = ()) -> Accelerator:
    """The processes of this run, with its trackers; several without a GPU form a world on the CPUs.

    Raises ConfigError where they form another world than was started, or prompts cannot be dealt out evenly. Autocast
    is our own: accelerate's would widen what the policy's forward returns.
    """
    world, cpus = _world(), _on_cpus()
    group: dict[str, Any] = {"timeout": PATIENCE}
    if config.offload and torch.cuda.is_available():
        group["backend"] = "cuda:nccl,cpu:gloo"  # the optimizer's numbers are on the host
    accelerator = Accelerator(
        cpu=world > 1 and cpus,  # which accelerate does not take them for by itself: each would run alone
        mixed_precision="no",
        log_with=[*config.trackers, *trackers] or None,
        project_dir=config.output,
        kwargs_handlers=[COPIES, InitProcessGroupKwargs(**group)],
    )
    if world > 1 and accelerator.num_processes != world:
        raise ConfigError(
            f"launch: {world} processes were started (WORLD_SIZE), and this one is in a group of "
            f"{accelerator.num_processes}: accelerate formed none on {accelerator.device}. Start them with torchrun or "
            "accelerate launch; on CPUs with ACCELERATE_USE_CPU=true."
        )
    if world > 1 and cpus and not _asks_for_cpus() and accelerator.is_main_process:
        logger.warning(
            "%d processes compute on CPUs: torch sees no GPU here. Where there is one: nvidia-smi, "
            "CUDA_VISIBLE_DEVICES, python -c 'import torch; print(torch.cuda.is_available())'",
            world,
        )
    _check_prompts(config, accelerator.num_processes)
    return accelerator


def _world() -> int:
    """Processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _on_cpus() -> bool:
    """Whether several processes compute on CPUs: there is no device that they can have one each of."""
    if _asks_for_cpus():
        return True
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or device.type == "mps"


def _asks_for_cpus() -> bool:
    return _is_set("ACCELERATE_USE_CPU")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def _check_prompts(config: APPOConfig, world: int) -> None:
    if config.prompts_per_step % world:
        raise ConfigError(
            f"`prompts_per_step`: expected a multiple of the {world} processes, got {config.prompts_per_step}. Change "
            "it, or the number of processes."
        )
