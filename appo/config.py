"""APPOConfig: one flat set of fields, from presets, a YAML file and `key=value` overrides."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appo.constraints import ConfigError as ConfigError
from appo.constraints import Constraint, annotations, check_fields, setting, shown, suggestion
from appo.given_values import given_values
from appo.presets import PRESETS, preset_settings
from appo.settings_together import check_together
from appo.yaml_files import dump_yaml, read_yaml

# The names in `choices` below are written out, because the modules that define them import torch, for which reading
# settings must not wait; tests/test_choices.py compares them.
TRACKERS = ("wandb", "trackio", "swanlab", "mlflow", "comet_ml", "aim", "clearml")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


@dataclass
class APPOConfig:
    """Every setting of a training run (docs/training.md). Lengths in tokens, times in seconds, sizes in pixels.

    Raises ConfigError, naming the field, for a value that no run can use: every field is checked against its type and
    the constraint beside it, and the fields against each other.
    """

    # What to train, on what, and where results go.
    model: str = setting("")  # a folder or hub name that transformers can load
    data: str = setting("")  # records (docs/data.md)
    data_root: str | None = setting(None, not_empty=True)  # media paths are relative to it (default: data's folder)
    eval_data: str | None = setting(None, not_empty=True)
    output: str = setting("runs/appo", not_empty=True)
    seed: int = setting(0, at_least=0)

    # Video.
    fps: float = setting(1.0, above=0, at_most=1000)
    max_frames: int = setting(16, at_least=2)  # video frames before temporal merging
    max_pixels: int = setting(64 * 28 * 28, at_least=14 * 14)  # of one frame
    decode_timeout: float = setting(60.0, above=0, at_most=86_400)
    video_decoder: str = setting("auto", choices=("auto", "pyav", "decord"))  # PyAV, then decord; or one of them
    frame_cache: str | None = setting(None, not_empty=True)  # folder in which decoded clips are kept
    frame_cache_gib: float = setting(20.0, above=0)  # of it at most
    # Decoded prompts that a process keeps; a step's own are kept in any case.
    prompt_cache_gib: float = setting(4.0, above=0)
    # Media from outside data_root: absolute paths, "..", links that leave it.
    allow_outside: bool = setting(False)
    instructions: bool = setting(True)  # tell the model in words how to format its answer; off for one that was taught

    # Rollouts.
    group_size: int = setting(8, at_least=2)  # G
    rollout_tokens: int = setting(262_144, at_least=1)  # of prompts and responses that are sampled at a time
    prompts_per_step: int = setting(16, at_least=1)  # over all processes
    max_new_tokens: int = setting(384, at_least=1)
    temperature: float = setting(1.0, at_least=0.01, at_most=100)
    top_p: float = setting(1.0, above=0, at_most=1)
    # name: weight in the sum
    rewards: dict[str, float] = setting(
        factory=lambda: {"accuracy": 1.0}, not_empty=True, hint="For example {accuracy: 0.9, format: 0.1}."
    )
    rewards_lenient: bool = setting(False)  # read answers as models write them: "**B**", "\\boxed{B}", "00:13 - 00:29"

    # The engine that samples responses (docs/engines.md).
    engine: str = setting("transformers", choices=("transformers", "vllm", "vllm-server"))
    engine_urls: list[str] = setting(factory=list, each=Constraint(not_empty=True))  # servers that run already
    engine_token: str = setting("")  # their APPO_SERVER_TOKEN
    engine_timeout: float = setting(600.0, above=0, at_most=86_400)  # seconds for a server to start, and for a request
    engine_retries: int = setting(2, at_least=0, at_most=100)  # further tries of a request that got no answer
    vllm_python: str = setting("")  # interpreter of an environment with vLLM: each process starts a server with it
    vllm_arguments: str = setting("{}")  # JSON: further arguments of vLLM's engine, such as {"tensor_parallel_size": 2}
    # How weights reach a server: files that both can read, or between GPUs (nccl: other ones, ipc: the same ones).
    weight_transfer: str = setting("file", choices=("file", "nccl", "ipc"))

    # Dynamic sampling and overlong shaping (DAPO).
    dynamic_sampling: bool = setting(False)  # replace groups whose rewards are all equal by new prompts
    max_sampling_rounds: int = setting(4, at_least=1)
    # With fewer informative groups no update is made: few tokens never take a full step.
    min_groups: int = setting(1, at_least=1)
    overlong_buffer: int = setting(0, at_least=0)  # soft punishment over the last tokens before max_new_tokens; 0: off

    # Attention-guided weights (docs/method.md sections 3-5).
    # How tokens are weighed; "grpo": W = 1.
    method: str = setting("appo")  # of `settings_together.METHODS`, or FILE.py:NAME, a rule of one's own
    layers: int = setting(3, at_least=1)  # the last n layers are recorded
    mass_reduction: str = setting("mean", choices=("mean", "sum"))
    strategy: str = setting(
        "hard", choices=("hard", "soft", "all", "contrast", "common", "peak", "released-hard", "released-soft")
    )
    top_tokens: int = setting(15, at_least=1)  # K1
    top_frames: int = setting(3, at_least=1)  # K2
    slot_tokens: int = setting(64, at_least=1)  # K3
    token_score: str = setting("mass", choices=("mass", "share"))  # by which tokens fill a frame's slots
    threshold: float = setting(0.5, at_least=0, at_most=1)  # tau
    disagreement: str = setting("divergence", choices=("divergence", "entropy", "mixture"))  # what weights are made of
    divergence: str = setting("kl", choices=("kl", "k3"))
    alpha: float = setting(1.7, at_least=0)
    average: str = setting("frames", choices=("frames", "member"))
    normalise: str | None = setting(None, choices=("mean",))  # "mean": weights of mean 1 over a response's tokens
    token_share: float = setting(0.4, above=0, at_most=1)  # of a response's tokens, the most dependent on the video
    factor_floor: float = setting(0.9, at_least=0, at_most=1)  # "vppo": of the responses' factors
    entropy_share: float = setting(1.0, above=0, at_most=1)  # of a batch's tokens, the most uncertain; others: W = 0
    # W = 0 in responses with A < 0 of a mean log-ratio, of the engine that sampled to the model, above this.
    off_policy_threshold: float | None = setting(None)

    # Loss (docs/method.md section 6, docs/losses.md).
    kind: str = setting("clip", choices=("clip", "cispo", "sapo", "dppo_tv", "gpg", "gspo_token"))
    attention_coef: float = setting(0.0, at_least=0)  # of the policy gradient on attention (RAL)
    eps_low: float = setting(0.2, at_least=0, at_most=1)
    eps_high: float = setting(0.28, at_least=0)
    delta: float | None = setting(None, above=0, hint="It caps the ratio where nothing else does; null leaves it out.")
    beta: float = setting(0.0, at_least=0)
    kl_ratio: bool = setting(False)  # multiply the KL term by the ratio (bias-corrected KL)
    level: str = setting("token", choices=("token", "sequence"))
    aggregation: str = setting("dapo", choices=("dapo", "grpo", "bnpo", "dr_grpo"))
    advantage_scale: str = setting("group", choices=("group", "none"))
    entropy_coef: float = setting(0.0)
    # Sample the next step's responses while this one updates the model: they come from weights one step old.
    asynchronous: bool = setting(False)
    # Importance sampling for rollouts whose log-probabilities are not the trainer's (docs/engines.md). auto: truncate
    # for another engine, none where the model itself samples.
    rollout_correction: str = setting("auto", choices=("auto", "none", "truncate", "clip", "mask"))
    rollout_level: str = setting("token", choices=("token", "sequence"))
    rollout_cap: float = setting(2.0, above=0)  # the largest ratio
    rollout_floor: float = setting(0.0, at_least=0)  # the smallest, of clip and mask

    # Optimisation.
    max_steps: int = setting(100, at_least=1)
    updates_per_step: int = setting(1, at_least=1)  # on one batch of rollouts, each on its own share of the groups
    micro_groups: int = setting(1, at_least=1)  # groups in one forward and backward, at most
    # Tokens in one, at most: larger groups are split by responses; 0: any number.
    micro_tokens: int = setting(0, at_least=0)
    learning_rate: float = setting(1e-6, above=0, at_most=1)
    lr_schedule: str = setting("constant", choices=("constant", "cosine", "linear"))
    warmup_steps: int = setting(0, at_least=0)
    weight_decay: float = setting(0.0, at_least=0, at_most=1)
    # AdamW, or bitsandbytes': state in 8 bits, in host memory where the GPU's is full ("paged"), or both.
    optimizer: str = setting("adamw", choices=("adamw", "adamw_8bit", "adamw_paged", "adamw_paged_8bit"))
    adam_beta2: float = setting(0.999, at_least=0, below=1)
    max_grad_norm: float = setting(1.0, above=0, hint="A large number, such as 1e9, clips nothing.")
    dtype: str = setting("bfloat16", choices=("float32", "bfloat16", "float16"))
    attn_implementation: str = setting("sdpa", choices=ATTENTION)
    liger: bool = setting(False)  # RMSNorm and SwiGLU by liger-kernel, where it is installed
    # Positions of text behind a video in Qwen2-VL and Qwen2.5-VL (docs/models.md): those the models were trained with,
    # which vLLM has too, or those of transformers >= 5.3.
    video_positions: str = setting("original", choices=("original", "transformers"))
    # Compute a group's prompt once, groups in one row without padding: needs full attention in every layer.
    share_prompt: str = setting("auto", choices=("auto", "on", "off"))
    gradient_checkpointing: bool = setting(False)  # compute a layer's activations again; its input is kept
    checkpoint_every: int = setting(1, at_least=1)  # with it: of every n-th layer; the others keep their activations
    checkpoint_offload: bool = setting(False)  # with it: these inputs wait in the host's memory
    # Over processes: "none": each holds everything (DDP); "fsdp": weights, gradients and optimizer state in shards.
    shard: str = setting("none", choices=("none", "fsdp"))
    # Of them: how many processes share one set of shards, such as the GPUs of a node, copied between nodes; 0: all.
    shard_group: int = setting(0, at_least=0)
    offload: bool = setting(False)  # shards of weights, gradients and optimizer state in the host's memory
    freeze_vision: bool = setting(True)
    lora_rank: int = setting(0, at_least=0)  # 0: full fine-tuning
    lora_alpha: int = setting(32, at_least=1)
    dora: bool = setting(False)  # adapters with a trained norm of each row (DoRA)
    lora_targets: list[str] = setting(
        factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], not_empty=True, each=Constraint(not_empty=True)
    )

    # Keeping track.
    eval_every: int = setting(0, at_least=0)  # steps; 0: only at the end
    eval_batch: int = setting(32, at_least=1)
    eval_samples: int = setting(0, at_least=0)  # 0: one greedy answer; k: the mean of k answers sampled as in training
    save_every: int = setting(50, at_least=0)  # steps; 0: only at the end
    keep_checkpoints: int = setting(3, at_least=1)
    sample_every: int = setting(10, at_least=0)  # steps between rollouts written to samples.jsonl
    heads_every: int = setting(0, at_least=0)  # steps between records of which heads look, in heads.jsonl; 0: never
    eval_looking: bool = setting(False)  # record what evaluated answers looked at: one more forward
    save_best: bool = setting(False)  # the model of the best evaluation so far, by accuracy, in best/
    tensorboard: bool = setting(True)
    # Further ones, by their names in accelerate.
    trackers: list[str] = setting(factory=list, each=Constraint(choices=TRACKERS))
    project: str = setting("appo", not_empty=True)  # in which they keep the run

    # Going on after what goes wrong.
    # A run in `output` goes on when its settings are the same; "force": whatever they are.
    resume: str = setting("same", choices=("same", "force"))
    # A record whose media cannot be read: "skip" counts and logs it, and takes another.
    on_broken: str = setting("stop", choices=("stop", "skip"))
    max_skipped: int = setting(5, at_least=1)  # updates in a row that are not finite, before the run stops

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError for the first field that cannot be used, alone or beside the others."""
        check_fields(self)
        check_together(self)

    @property
    def records_mass(self) -> bool:
        """Whether scoring records frame mass."""
        return self.method not in ("grpo", "tw-grpo") or self.attention_coef > 0

    def weighs(self, num_frames: int) -> bool:
        """Whether tokens of responses to a prompt of so many frames are weighed: TW-GRPO alone needs none."""
        return self.method == "tw-grpo" or (self.method != "grpo" and num_frames > 0)

    def corrects(self, own_engine: bool) -> bool:
        """Whether the loss corrects for the engine. own_engine: the model in training samples by itself."""
        return not own_engine if self.rollout_correction == "auto" else self.rollout_correction != "none"

    @classmethod
    def paper(cls, **overrides: Any) -> "APPOConfig":
        """The settings of the paper (docs/training.md)."""
        return cls(**overrides)

    @classmethod
    def released(cls, **overrides: Any) -> "APPOConfig":
        """The settings of the authors' released trainer on SEED-Bench-R1 and Video-R1 (docs/training.md)."""
        return cls.preset("released", **overrides)

    @classmethod
    def grpo(cls, **overrides: Any) -> "APPOConfig":
        """GRPO: no weights, symmetric clipping, the mean over tokens and then responses."""
        return cls.preset("grpo", **overrides)

    @classmethod
    def dapo(cls, **overrides: Any) -> "APPOConfig":
        """DAPO: no weights, clip-higher, token-level loss, dynamic sampling and overlong shaping."""
        return cls.preset("dapo", **overrides)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "APPOConfig":
        """The settings of a preset by its name: paper, released, grpo, dapo, or another method's, tw-grpo, top-entropy,
        vppo, pgpo or ral (docs/own_method.md)."""
        if not isinstance(name, str) or name not in PRESETS:
            hint = suggestion(name, PRESETS)
            raise ConfigError(f"`preset`: expected one of {', '.join(PRESETS)}, got {shown(name)}.{hint}")
        return cls(**preset_settings(name, overrides, longest=cls.max_new_tokens))

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> "APPOConfig":
        """Read a YAML file, then apply overrides such as ``learning_rate=2e-6`` or ``rewards.format=0.1``.

        A key ``preset`` (docs/training.md) names the preset that the other keys change. Relative paths in
        ``data``, ``data_root``, ``eval_data`` and a ``model`` that exists as a folder are taken from the file's folder.
        ``rewards.format=0.1`` changes one entry and keeps the others.

        Raises ConfigError naming file and field for a missing file, an unknown key or a value that cannot be used.
        """
        path = Path(path)
        values = read_yaml(path)
        try:
            for name in ("data", "data_root", "eval_data", "model"):
                value = values.get(name)
                if isinstance(value, str) and value and "\0" not in value and (path.parent / value).exists():
                    values[name] = str(path.parent / value)
            return cls.from_dict(values, overrides)
        except (ConfigError, OSError) as error:  # OSError: a path longer than the file system takes
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dotlist(cls, items: list[str]) -> "APPOConfig":
        """A config from ``key=value`` items alone. Raises ConfigError."""
        return cls.from_dict({}, items)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: list[str] | None = None) -> "APPOConfig":
        """A config from plain values and ``key=value`` overrides; a key ``preset`` picks the starting point.

        Raises ConfigError.
        """
        given, entries = given_values(values, overrides or [], annotations(cls), also="preset")
        config = cls.preset(given.pop("preset", "paper"), **given)
        for name, key, value in entries:
            getattr(config, name)[key] = value
        config.check()
        return config

    def clip_arguments(self) -> dict[str, Any]:
        """The settings of reading a video, as `appo.data.media.load_clip` names them."""
        return {
            "fps": self.fps, "max_frames": self.max_frames, "max_pixels": self.max_pixels,
            "decoder": self.video_decoder, "timeout": self.decode_timeout,
        }  # fmt: skip

    def slot_arguments(self) -> dict[str, Any]:
        """The settings of perception tokens, as `perception_slots` names them."""
        return {"top_tokens": self.slot_tokens, "score": self.token_score}

    def weight_arguments(self) -> dict[str, Any]:
        """The settings of token weights, as `token_weights` names them."""
        return {name: getattr(self, name) for name in ("alpha", "average", "normalise")}

    def loss_arguments(self) -> dict[str, Any]:
        """The settings of the loss, as the surrogates of `appo_kernels` name them."""
        names = (
            "kind", "eps_low", "eps_high", "delta", "beta", "kl_ratio", "level", "aggregation", "entropy_coef",
            "rollout_level", "rollout_cap", "rollout_floor",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "rollout_correction": "truncate"
            if self.rollout_correction in ("auto", "none")
            else self.rollout_correction,
            "max_length": self.max_new_tokens,
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def public(self) -> dict[str, Any]:
        """The settings that may be shown around: all but ``engine_token``, a secret."""
        return {name: value for name, value in self.to_dict().items() if name != "engine_token"}

    def save(self, path: str | Path) -> None:
        """Write a YAML file that ``load`` reads as the same settings, but for the secret ones."""
        Path(path).write_text(dump_yaml(self.public()), encoding="utf-8")
