"""Sizes of models whose parameters are counted in transformers' own model, made without weights.

Their text models are decoders as Qwen2's, Qwen3's or Llama's, which the plan has formulas of; whether it is so is
asked: the formulas' parameters must be those of the model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from appo.constraints import ConfigError, setting
from appo.models.architectures import Architecture, Vision


@dataclass(frozen=True)
class CountedVision(Vision):
    """A tower with what leads from it to the text model. counted: its parameters."""

    counted: int = setting(0, at_least=0)

    @property
    def parameters(self) -> int:
        return self.counted


@dataclass(frozen=True)
class Seen:
    """What a family makes of frames. tower: fields of `Vision`; frame_tokens: 0: as its pixels say."""

    tower: dict[str, Any]
    frame_tokens: int = 0
    frame_text: int = 0  # tokens before each frame


def _plain(config: Any, merge: int, **frames: Any) -> Seen:
    """Of a tower that sees one frame at a time, whole."""
    tower = config.vision_config
    sizes = {
        "depth": tower.num_hidden_layers, "full_attention": tower.num_hidden_layers, "hidden": tower.hidden_size,
        "intermediate": tower.intermediate_size, "heads": tower.num_attention_heads, "patch": _first(tower.patch_size),
    }  # fmt: skip
    return Seen(sizes | {"temporal_patch": 1, "gated": False, "window": 0, "merge": merge}, **frames)


def _side(config: Any) -> int:
    """Patches along a side of a frame, all of which have one size."""
    return int(_first(config.vision_config.image_size) // _first(config.vision_config.patch_size))


def _first(value: Any) -> int:
    """A side of what is given as one number or as two."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def _internvl(config: Any) -> Seen:
    tokens = int((_side(config) * config.downsample_ratio) ** 2)
    return _plain(config, round(1 / config.downsample_ratio), frame_tokens=tokens, frame_text=6)


def _smolvlm(config: Any) -> Seen:
    tokens = (_side(config) // config.scale_factor) ** 2
    return _plain(config, config.scale_factor, frame_tokens=tokens, frame_text=10)


def _qwen(config: Any) -> Seen:
    """Of Qwen2-VL and Qwen2.5-Omni, with the towers of Qwen2-VL and Qwen2.5-VL."""
    tower = config.vision_config
    first = hasattr(tower, "embed_dim")  # Qwen2-VL, whose hidden_size is that of the text model
    hidden = tower.embed_dim if first else tower.hidden_size
    full = tower.depth if first else len(tower.fullatt_block_indexes)
    sizes = {
        "depth": tower.depth, "hidden": hidden, "heads": tower.num_heads, "gated": not first, "full_attention": full,
        "intermediate": int(hidden * tower.mlp_ratio) if first else tower.intermediate_size,
        "window": 0 if first else tower.window_size // tower.patch_size // tower.spatial_merge_size,
        "patch": tower.patch_size, "merge": tower.spatial_merge_size, "temporal_patch": tower.temporal_patch_size,
    }  # fmt: skip
    return Seen(sizes)


# By model_type.
FAMILIES: dict[str, Callable[[Any], Seen]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_omni_thinker": _qwen,
    "internvl": _internvl,
    "llava_onevision": lambda config: _plain(config, 2, frame_tokens=math.ceil(_side(config) / 2) ** 2),
    "smolvlm": _smolvlm,
    "video_llama_3": lambda config: _plain(config, 2, frame_text=8),
}


def counted_sizes(content: Mapping[str, Any], name: str) -> Architecture:
    """The sizes out of a config.json of one of `FAMILIES`. Raises ConfigError for a text model of other layers."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForImageTextToText

    rest = {key: value for key, value in content.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(content["model_type"], **rest)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        text, seen = config.get_text_config(), FAMILIES[content["model_type"]](config)
    except (StrictDataclassError, TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name}: expected sizes of a model in its config, but {reason}.") from error
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    inside = {*model.get_decoder().parameters(), head}
    layer = " ".join(name for name, _ in model.get_decoder().layers[0].named_parameters())
    found = Architecture(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=head.shape[0],
        tied=bool(head is embedding or config.tie_word_embeddings),
        vision=CountedVision(
            **seen.tower,
            out_hidden=text.hidden_size,
            counted=sum(p.numel() for p in model.parameters() if p not in inside),
        ),
        query_bias="q_proj.bias" in layer,
        query_norm="q_norm" in layer,
        frame_text=seen.frame_text,
        frame_tokens=seen.frame_tokens,
    )
    total = sum(p.numel() for p in model.parameters())
    if found.parameters != total:
        raise ConfigError(
            f"{name}: expected a text model whose layers are Qwen2's, Qwen3's or Llama's, got {text.model_type}, whose "
            f"model has {total:,} parameters in the place of {found.parameters:,}. It cannot be planned."
        )
    return found
