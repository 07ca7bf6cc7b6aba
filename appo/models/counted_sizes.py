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


def _side(tower: Any) -> int:
    """Patches along a side of a frame, all of which have one size."""
    size, patch = (
        value[0] if isinstance(value, list | tuple) else value for value in (tower.image_size, tower.patch_size)
    )
    return int(size // patch)


# By model_type: patches along a side that become one token; tokens of a frame (0: as its pixels say) and
# of text before it.
FAMILIES: dict[str, Callable[[Any], tuple[int, int, int]]] = {
    "internvl": lambda c: (round(1 / c.downsample_ratio), int((_side(c.vision_config) * c.downsample_ratio) ** 2), 6),
    "llava_onevision": lambda c: (2, math.ceil(_side(c.vision_config) / 2) ** 2, 0),
    "smolvlm": lambda c: (c.scale_factor, (_side(c.vision_config) // c.scale_factor) ** 2, 10),
    "video_llama_3": lambda c: (2, 0, 8),
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
        text, tower = config.get_text_config(), config.vision_config
        merge, frame_tokens, frame_text = FAMILIES[content["model_type"]](config)
    except (StrictDataclassError, TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name}: expected sizes of a model in its config, but {reason}.") from error
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    inside = {*model.get_decoder().parameters(), head}
    patch = tower.patch_size
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
            depth=tower.num_hidden_layers,
            hidden=tower.hidden_size,
            intermediate=tower.intermediate_size,
            heads=tower.num_attention_heads,
            out_hidden=text.hidden_size,
            patch=patch[0] if isinstance(patch, list | tuple) else patch,
            temporal_patch=1,
            merge=merge,
            gated=False,
            full_attention=tower.num_hidden_layers,
            window=0,
            counted=sum(p.numel() for p in model.parameters() if p not in inside),
        ),
        query_bias=text.model_type == "qwen2",
        query_norm=text.model_type == "qwen3",
        frame_text=frame_text,
        frame_tokens=frame_tokens,
    )
    total = sum(p.numel() for p in {*model.parameters()})
    if found.parameters != total:
        raise ConfigError(
            f"{name}: expected a text model whose layers are Qwen2's, Qwen3's or Llama's, got {text.model_type}, whose "
            f"model has {total:,} parameters in the place of {found.parameters:,}. It cannot be planned."
        )
    return found
