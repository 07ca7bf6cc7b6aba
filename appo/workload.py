"""The work of a training step and the machine it runs on, as `appo plan` is told of them."""

from dataclasses import dataclass

from appo.constraints import ConfigError, check_fields, setting


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
    freeze_vision: bool = setting(True)
    share_prompt: bool = setting(False)  # a group behind one prompt, in a packed row without a mask
    lora_rank: int = setting(0, at_least=0)  # adapters on query, key, value and output; 0: all weights are trained
    foreach: bool = setting(True)  # how AdamW runs on a GPU: one more copy of the gradients during its step

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prompts % self.gpus:
            raise ConfigError(
                f"`prompts`: expected a multiple of the {self.gpus} GPUs, as the trainer does, got {self.prompts}. "
                "Change either."
            )

    @property
    def width(self) -> int:
        """Bytes of a number of the forward."""
        return 2 if self.mixed else 4

    @property
    def prompts_per_gpu(self) -> int:
        return self.prompts // self.gpus


@dataclass(frozen=True)
class Machine:
    """A GPU as the user states it. memory: GiB; rate: TFLOP/s that products reach; bandwidth: TB/s that reads reach."""

    memory: float = setting(80.0, above=0, at_most=1e6)
    rate: float = setting(400.0, above=0, at_most=1e9)
    bandwidth: float = setting(2.5, above=0, at_most=1e6)

    def __post_init__(self) -> None:
        check_fields(self)
