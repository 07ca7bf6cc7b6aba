"""The work of a training step and the machine it runs on, as `appo plan` is told of them."""

from dataclasses import dataclass

from appo.constraints import ConfigError, check_fields, setting

# Of AdamW, for each trained parameter. What is paged may leave the GPU, and is counted all the same.
STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "adamw_paged": 8, "adamw_paged_8bit": 2}
# Fields of a `Workload` that can be changed to fit: each as an option of the command, and as a setting of a run.
NAMES = {
    "share_prompt": ("--share-prompt", "share_prompt=on"),
    "micro_groups": ("--micro-groups {}", "micro_groups={}"),
    "checkpointing": ("--gradient-checkpointing", "gradient_checkpointing=true"),
    "checkpoint_every": ("--checkpoint-every {}", "checkpoint_every={}"),
    "checkpoint_offload": ("--checkpoint-offload", "checkpoint_offload=true"),
    "micro_tokens": ("--micro-tokens {}", "micro_tokens={}"),
    "rollout_tokens": ("--rollout-tokens {}", "rollout_tokens={}"),
    "shard_group": ("--shard-group {}", "shard=fsdp shard_group={}"),
    "own_rollout": ("--other-engine", "engine=vllm-server"),
    "offload": ("--offload", "shard=fsdp offload=true"),
    "lora_rank": ("--lora-rank {}", "lora_rank={}"),
    "gpus": ("--gpus {}", "--gpus {}"),
    "prompts": ("--prompts {}", "prompts_per_step={}"),
}


@dataclass(frozen=True)
class Workload:
    """Sizes of a step. frames: temporal grid steps of a video, of frame_tokens each; text: the rest of the prompt."""

    frames: int = setting(16, at_least=1)
    frame_tokens: int = setting(64, at_least=1)
    text: int = setting(126, at_least=1)
    response: int = setting(384, at_least=1)  # N
    responses: int = setting(8, at_least=1)  # G
    prompts: int = setting(16, at_least=1)  # over all GPUs
    micro_groups: int = setting(1, at_least=1)
    micro_tokens: int = setting(0, at_least=0)  # of a micro-batch at most, a larger group is split; 0: any number
    layers: int = setting(3, at_least=1)  # recorded
    target_frames: int = setting(5, at_least=1)  # K
    slots: int = setting(64, at_least=1)  # K3
    gpus: int = setting(1, at_least=1)
    mixed: bool = setting(True)  # bf16 autocast; False: fp32
    checkpointing: bool = setting(False)
    checkpoint_every: int = setting(1, at_least=1)  # with it: of every n-th layer of the decoder, and of the tower
    checkpoint_offload: bool = setting(False)  # with it: inputs of such layers are in the host's memory
    freeze_vision: bool = setting(True)
    share_prompt: bool = setting(False)  # a group behind one prompt, in a packed row without a mask
    lora_rank: int = setting(0, at_least=0)  # adapters on query, key, value and output; 0: all weights are trained
    foreach: bool = setting(False)  # AdamW of lists of tensors: one more copy of the gradients during its step
    optimizer: str = setting("adamw", choices=tuple(STATE_BYTES))
    shard_group: int = setting(0, at_least=0)  # GPUs that share one set of shards; 0: all; 1: each holds everything
    offload: bool = setting(False)  # shards are in the host's memory
    reference: bool = setting(False)  # a KL term (beta > 0): a frozen copy of a model whose weights are all trained
    rollout_tokens: int = setting(262_144, at_least=1)  # in the cache at a time
    own_rollout: bool = setting(True)  # the model in training samples; False: another engine, elsewhere

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prompts % self.gpus:
            raise ConfigError(
                f"`prompts`: expected a multiple of the {self.gpus} GPUs, as the trainer does, got {self.prompts}. "
                "Change either."
            )
        if self.shard_group and self.gpus % self.shard_group:
            raise ConfigError(
                f"`shard_group`: expected a divisor of the {self.gpus} GPUs, got {self.shard_group}. Change either."
            )

        if not self.checkpointing and (self.checkpoint_every > 1 or self.checkpoint_offload):
            raise ConfigError(
                "`gradient_checkpointing`: expected true with checkpoint_every or checkpoint_offload, which are of the "
                "layers that it computes again, got false. Set it, or leave them out."
            )

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and optimizer state are in."""
        return self.shard_group or self.gpus

    @property
    def sharded(self) -> bool:
        return self.shards > 1 or self.offload

    @property
    def width(self) -> int:
        """Bytes of a number of the forward."""
        return 2 if self.mixed else 4

    @property
    def prompts_per_gpu(self) -> int:
        return self.prompts // self.gpus


def spelled(field: str, value: object, *, settings: bool) -> str:
    """``value`` of a field of `NAMES` as a user gives it: as an option, or as a setting."""
    return NAMES[field][settings].format(value)


@dataclass(frozen=True)
class Machine:
    """A GPU as the user states it. memory: GiB; rate: TFLOP/s that products reach; bandwidth: TB/s that reads reach."""

    memory: float = setting(80.0, above=0, at_most=1e6)
    rate: float = setting(400.0, above=0, at_most=1e9)
    bandwidth: float = setting(2.5, above=0, at_most=1e6)

    def __post_init__(self) -> None:
        check_fields(self)
