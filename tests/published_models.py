"""Models of published architectures at small sizes, for tests of sizes and plans."""

from dataclasses import replace
from typing import Any

import torch

from appo.models.architectures import ARCHITECTURES, Architecture


def config_of(sizes: Architecture) -> Any:
    """The transformers config of these sizes."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    vision = sizes.vision
    text = {
        "hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.key_heads, "vocab_size": sizes.vocabulary,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    tower = {
        "depth": vision.depth, "hidden_size": vision.hidden, "intermediate_size": vision.intermediate,
        "num_heads": vision.heads, "out_hidden_size": vision.out_hidden, "patch_size": vision.patch,
    }  # fmt: skip
    half = sizes.head_dim // 2
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if sizes.query_norm:
        rope["mrope_interleaved"] = True
        text |= {"head_dim": sizes.head_dim, "rope_parameters": rope}
        tower |= {
            "deepstack_visual_indexes": list(range(vision.deepstack)), "num_position_embeddings": vision.positions,
        }  # fmt: skip
        return Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=sizes.tied)
    full = list(range(vision.depth - vision.full_attention, vision.depth))
    window = vision.window * vision.merge * vision.patch
    tower |= {"fullatt_block_indexes": full, "window_size": window}
    text |= {"rope_parameters": rope}
    return Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=sizes.tied)


def build(sizes: Architecture, device: str = "cpu") -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

    kind = Qwen3VLForConditionalGeneration if sizes.query_norm else Qwen2_5_VLForConditionalGeneration
    with torch.device(device):
        return kind(config_of(sizes))


def small(name: str) -> Architecture:
    """The shape of a published model with small sizes, none of them equal to another."""
    sizes = ARCHITECTURES[name]
    vision = replace(
        sizes.vision, depth=3, hidden=96, intermediate=160, heads=4, out_hidden=192,
        full_attention=3 if sizes.query_norm else 1,
        deepstack=2 if sizes.query_norm else 0, positions=64 if sizes.query_norm else 0,
    )  # fmt: skip
    return replace(
        sizes, layers=3, hidden=192, intermediate=448, heads=6, key_heads=2, head_dim=32, vocabulary=640, vision=vision
    )


# A model of each family.
BOTH = ("Qwen2.5-VL-7B", "Qwen3-VL-8B")


def medium(name: str) -> Architecture:
    """Large enough for the allocator's own use to be small beside it."""
    sizes = small(name)
    vision = replace(sizes.vision, out_hidden=256)
    return replace(
        sizes, layers=5, hidden=256, intermediate=688, heads=8, key_heads=2, head_dim=32, vocabulary=2048, tied=False,
        vision=vision,
    )  # fmt: skip


def adapted(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
