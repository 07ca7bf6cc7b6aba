"""Sizes of a model by its published name, or out of its config.json, without loading it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo.constraints import ConfigError, shown
from appo.models.architectures import ARCHITECTURES, Architecture, Vision
from appo.models.counted_sizes import FAMILIES, counted_sizes


def find_architecture(model: str) -> Architecture:
    """The sizes of a model named as published ("Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"), or of a folder or
    config.json. Reads nothing else. Raises ConfigError."""
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        found_file = path.is_file()
    except (OSError, ValueError):  # longer than the file system takes, or with a zero byte
        found_file = False
    if found_file:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected the settings of a model, got a {type(content).__name__}.")
        return from_config(content, str(model))
    wanted = model.rsplit("/", 1)[-1].lower()
    for name, found in ARCHITECTURES.items():
        if wanted == name.lower() or wanted.startswith(name.lower() + "-"):
            return found
    raise ConfigError(
        f"`model`: expected a folder with a config.json or one of {', '.join(ARCHITECTURES)}, got {shown(model)}. "
        "Nothing is looked up in a network: pass the path of its config.json."
    )


def from_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The sizes out of a config.json: of Qwen2.5-VL or Qwen3-VL, in the old flat form or with ``text_config``, or of
    one of `counted_sizes.FAMILIES`. Raises ConfigError for others."""
    config = config.get("thinker_config", config)  # of a model that speaks too (Qwen-Omni)
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind in FAMILIES:
        return counted_sizes(config, name)
    if kind not in ("qwen2_5_vl", "qwen3_vl"):
        raise ConfigError(
            f"{name}: expected model_type {', '.join(('qwen2_5_vl', 'qwen3_vl', *FAMILIES))}, got {kind!r}, whose "
            "layers the plan has no model of. Pass one of these."
        )
    third = kind == "qwen3_vl"
    try:
        text, tower = {**config, **config.get("text_config", {})}, config.get("vision_config", {})
        window = 0 if third else tower.get("window_size", 112) // tower["patch_size"] // tower["spatial_merge_size"]
        blocks = tower.get("fullatt_block_indexes", (7, 15, 23, 31))
        vision = Vision(
            depth=tower["depth"],
            hidden=tower["hidden_size"],
            intermediate=tower["intermediate_size"],
            heads=tower["num_heads"],
            out_hidden=tower["out_hidden_size"],
            patch=tower["patch_size"],
            temporal_patch=tower["temporal_patch_size"],
            merge=tower["spatial_merge_size"],
            gated=not third,
            full_attention=tower["depth"] if third else len(blocks),
            window=window,
            deepstack=len(tower["deepstack_visual_indexes"]) if third else 0,
            positions=tower["num_position_embeddings"] if third else 0,
        )
        return Architecture(
            name=name,
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            heads=text["num_attention_heads"],
            key_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision=vision,
            query_bias=not third,
            query_norm=third,
            frame_text=8 if third else 0,
        )
    except KeyError as error:
        raise ConfigError(
            f"{name}: expected a field {error} in its config. Save it again with save_pretrained."
        ) from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{name}: expected sizes of a model in its config, but {error}.") from error
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
