"""APPOConfig: one flat set of fields, from presets, a YAML file and `key=value` overrides."""

import contextlib
import difflib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

CHOICES = {
    "method": ("appo", "grpo"),
    "strategy": ("hard", "soft", "all", "contrast", "released-hard", "released-soft"),
    "mass_reduction": ("mean", "sum"),
    "divergence": ("kl", "k3"),
    "average": ("frames", "member"),
    "level": ("token", "sequence"),
    "aggregation": ("dapo", "grpo", "bnpo", "dr_grpo"),
    "advantage_scale": ("group", "none"),
    "dtype": ("float32", "bfloat16", "float16"),
    "share_prompt": ("auto", "on", "off"),
    "video_decoder": ("auto", "pyav", "decord"),
    "lr_schedule": ("constant", "cosine", "linear"),
}

AT_LEAST = {
    0: ("overlong_buffer", "eval_samples", "lora_rank", "eval_every", "save_every", "sample_every", "warmup_steps"),
    1: ("prompts_per_step", "max_new_tokens", "max_pixels", "layers", "top_tokens", "top_frames", "slot_tokens")
    + (
        "max_steps",
        "updates_per_step",
        "micro_groups",
        "max_sampling_rounds",
        "min_groups",
        "keep_checkpoints",
        "eval_batch",
    ),
    2: ("group_size", "max_frames"),
}


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the field, what was expected and what came."""


@dataclass
class APPOConfig:
    """Every setting of a training run (docs/training.md). Lengths in tokens, times in seconds, sizes in pixels."""

    # What to train, on what, and where results go.
    model: str = ""  # a folder or hub name that transformers can load
    data: str = ""  # records, .json or .jsonl (docs/data.md)
    data_root: str | None = None  # media paths are relative to it (default: the folder of `data`)
    eval_data: str | None = None
    output: str = "runs/appo"
    seed: int = 0

    # Video (docs/training.md).
    fps: float = 1.0
    max_frames: int = 16  # video frames before temporal merging
    max_pixels: int = 64 * 28 * 28  # of one frame
    decode_timeout: float = 60.0
    video_decoder: str = "auto"  # PyAV, then decord; or one of them
    instructions: bool = True  # tell the model in words how to format its answer; off for one that was taught

    # Rollouts.
    group_size: int = 8  # G
    prompts_per_step: int = 16  # over all processes
    max_new_tokens: int = 384
    temperature: float = 1.0
    top_p: float = 1.0
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})  # name: weight in the sum

    rewards_lenient: bool = False  # read answers as models write them: "**B**", "\\boxed{B}", "00:13 - 00:29"

    # Dynamic sampling and overlong shaping (DAPO).
    dynamic_sampling: bool = False  # replace groups whose rewards are all equal by new prompts
    max_sampling_rounds: int = 4
    min_groups: int = 1  # with fewer informative groups no update is made: few tokens never take a full step
    overlong_buffer: int = 0  # soft punishment over the last tokens before max_new_tokens; 0: off

    # Attention-guided weights (docs/method.md sections 3-5).
    method: str = "appo"  # "grpo": W = 1, nothing recorded
    layers: int = 3  # the last n layers are tapped
    mass_reduction: str = "mean"
    strategy: str = "hard"
    top_tokens: int = 15  # K1
    top_frames: int = 3  # K2
    slot_tokens: int = 64  # K3
    threshold: float = 0.5  # tau
    divergence: str = "kl"
    alpha: float = 1.7
    average: str = "frames"

    # Loss (docs/method.md section 6).
    eps_low: float = 0.2
    eps_high: float = 0.28
    delta: float | None = None
    beta: float = 0.0
    level: str = "token"
    aggregation: str = "dapo"
    advantage_scale: str = "group"
    entropy_coef: float = 0.0
    rollout_cap: float | None = None  # truncated importance sampling for rollouts of another engine

    # Optimisation.
    max_steps: int = 100
    updates_per_step: int = 1  # optimizer steps on one batch of rollouts, each on its own share of the groups
    micro_groups: int = 1  # groups in one forward and backward
    learning_rate: float = 1e-6
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    share_prompt: str = "auto"  # compute a group's prompt once: needs sdpa or eager attention
    gradient_checkpointing: bool = False
    freeze_vision: bool = True
    lora_rank: int = 0  # 0: full fine-tuning
    lora_alpha: int = 32
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    # Keeping track.
    eval_every: int = 0  # steps; 0: only at the end
    eval_batch: int = 32
    eval_samples: int = 0  # 0: one greedy answer; k: the mean of k answers sampled as in training
    save_every: int = 50  # steps; 0: only at the end
    keep_checkpoints: int = 3
    sample_every: int = 10  # steps between rollouts written to samples.jsonl
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"`{name}`: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for least, names in AT_LEAST.items():
            for name in names:
                if getattr(self, name) < least:
                    raise ConfigError(f"`{name}`: expected at least {least}, got {getattr(self, name)}.")
        for name in ("fps", "temperature", "learning_rate", "max_grad_norm", "decode_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}`: expected a number above 0, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"`top_p`: expected 0 < top_p <= 1, got {self.top_p}.")
        if not self.rewards:
            raise ConfigError("`rewards`: expected at least one reward with its weight, such as {accuracy: 1.0}.")
        if self.overlong_buffer > self.max_new_tokens:
            raise ConfigError(
                f"`overlong_buffer`: expected at most {self.max_new_tokens} tokens, got {self.overlong_buffer}."
            )
        if self.prompts_per_step < self.updates_per_step:
            raise ConfigError(
                f"`updates_per_step`: expected at most prompts_per_step = {self.prompts_per_step} (each update takes "
                f"whole groups), got {self.updates_per_step}."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> "APPOConfig":
        """The settings of the paper (docs/training.md)."""
        return cls(**overrides)

    @classmethod
    def released(cls, **overrides: Any) -> "APPOConfig":
        """The settings of the authors' released trainer on SEED-Bench-R1 and Video-R1 (docs/training.md)."""
        settings: dict[str, Any] = {
            "strategy": "all",
            "slot_tokens": 128,
            "divergence": "k3",
            "alpha": 0.7,  # its 1.7 is the largest weight
            "average": "member",
            "rewards": {"accuracy": 0.9, "format": 0.1},
        }
        return cls(**(settings | overrides))

    @classmethod
    def grpo(cls, **overrides: Any) -> "APPOConfig":
        """GRPO: no weights, symmetric clipping, the mean over tokens and then responses."""
        settings: dict[str, Any] = {"method": "grpo", "eps_high": 0.2, "aggregation": "grpo"}
        return cls(**(settings | overrides))

    @classmethod
    def dapo(cls, **overrides: Any) -> "APPOConfig":
        """DAPO: no weights, clip-higher, token-level loss, dynamic sampling and overlong shaping."""
        settings: dict[str, Any] = {"method": "grpo", "dynamic_sampling": True, "overlong_buffer": 96}
        settings |= overrides
        if "overlong_buffer" not in overrides:
            settings["overlong_buffer"] = min(96, settings.get("max_new_tokens", cls.max_new_tokens) // 4)
        return cls(**settings)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> "APPOConfig":
        """Read a YAML file, then apply overrides such as ``learning_rate=2e-6`` or ``rewards.format=0.1``.

        A key ``preset`` (paper, released, grpo, dapo) names the preset that the other keys change. Relative paths in
        ``data``, ``data_root``, ``eval_data`` and a ``model`` that exists as a folder are taken from the file's folder.

        Raises ConfigError naming file and field for a missing file, an unknown key or a value of the wrong type.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file. Pass the path of a YAML file with the fields of APPOConfig.")
        try:
            loaded = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides or []))
            values = OmegaConf.to_container(loaded, resolve=True)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as settings: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected `field: value` lines, got a {type(values).__name__}.")
        settings = {str(key): value for key, value in values.items()}
        overridden = {item.split("=", 1)[0] for item in overrides or []}
        for name in ("data", "data_root", "eval_data", "model"):
            value = settings.get(name)
            if isinstance(value, str) and value and name not in overridden and (path.parent / value).exists():
                settings[name] = str(path.parent / value)
        try:
            return cls.from_dict(settings)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dotlist(cls, items: list[str]) -> "APPOConfig":
        """Build a config from ``key=value`` items alone. Raises ConfigError."""
        from omegaconf import OmegaConf

        return cls.from_dict(OmegaConf.to_container(OmegaConf.from_dotlist(items)))  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "APPOConfig":
        """Build a config from plain values, checking names and types; a key ``preset`` picks the starting point."""
        values = dict(values)
        preset = values.pop("preset", "paper")
        presets = {"paper": cls.paper, "released": cls.released, "grpo": cls.grpo, "dapo": cls.dapo}
        if preset not in presets:
            raise ConfigError(f"`preset`: expected one of {', '.join(presets)}, got {preset!r}.")
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                raise ConfigError(f"`{name}`: no such field.{hint}")
            values[name] = _typed(name, value, _name_of(known[name].type))
        return presets[preset](**values)

    def loss_arguments(self) -> dict[str, Any]:
        """The settings of the loss, as the surrogates of `appo_kernels` name them."""
        names = ("eps_low", "eps_high", "delta", "beta", "level", "aggregation", "entropy_coef")
        return {name: getattr(self, name) for name in names} | {
            "rollout_cap": self.rollout_cap or 2.0,
            "max_length": self.max_new_tokens,
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> None:
        from omegaconf import OmegaConf

        OmegaConf.save(OmegaConf.create(self.to_dict()), path)


_CONTAINERS = {"dict[str, float]": dict, "list[str]": list}


def _name_of(annotation: Any) -> str:
    return annotation.__name__ if annotation in (int, float, str, bool) else str(annotation)


def _typed(name: str, value: Any, annotation: str) -> Any:
    """``value`` as the annotated type; YAML writes 1e-6 as text and 1 for 1.0, which are taken as meant."""
    if value is None and annotation.endswith("| None"):
        return None
    kind = annotation.removesuffix(" | None")
    if kind in _CONTAINERS:
        ok = isinstance(value, _CONTAINERS[kind])
    elif kind == "float":
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):  # what is no number is refused below
                value = float(value)
        ok = isinstance(value, float)
    else:
        ok = type(value) is {"int": int, "str": str, "bool": bool}[kind]
    if not ok:
        raise ConfigError(f"`{name}`: expected {annotation}, got {value!r} ({type(value).__name__}).")
    return value
