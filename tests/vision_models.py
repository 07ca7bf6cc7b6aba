"""A tiny random model and processor of every layout that is served, built from nothing."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from vision_models_of_images import TOWER, full_text, gemma3, gemma4, internvl, llava_onevision, smolvlm, with_named

from appo.tasks import tiny
from appo.tasks.tiny import VISION, build_tiny, build_tokenizer

ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
INTERLEAVED = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Two of four layers have attention; the others have linear attention.
HYBRID = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
}  # fmt: skip


def _qwen2_readers(tokenizer: Any, patch: int) -> dict[str, Any]:
    """The parts of a processor that reads images and videos as Qwen2-VL's does."""
    size = tiny.pixels(patch)
    return {
        "image_processor": hf.Qwen2VLImageProcessor(patch_size=patch, size=size),
        "tokenizer": tokenizer,
        "video_processor": hf.Qwen2VLVideoProcessor(patch_size=patch, size=size, cap_pixels_per_frame=False),
        "chat_template": tiny.CHAT_TEMPLATE,
    }


def _pad_ids(tokenizer: Any) -> dict[str, Any]:
    """Ids of the tokens in place of media, for configs that name none around them."""
    return {name: value for name, value in tiny.special_ids(tokenizer).items() if not name.startswith("vision")}


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    patch = 7
    tower = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 128}
    config = hf.Qwen2VLConfig(
        text_config=tiny.text_settings(tokenizer, ROPE, {}),
        vision_config=tower | tiny.patches(patch),
        **tiny.special_ids(tokenizer),
    )
    processor = hf.Qwen2VLProcessor(**_qwen2_readers(tokenizer, patch))
    return hf.Qwen2VLForConditionalGeneration(config), processor


def _third(config: Any, model: Any, text: dict[str, Any], **vision: Any) -> Callable[[Any], tuple[Any, Any]]:
    """A builder of a model with Qwen3-VL's processor."""

    def build_one(tokenizer: Any) -> tuple[Any, Any]:
        rope = {**INTERLEAVED, **text.get("rope", {})}
        sizes = {name: value for name, value in text.items() if name != "rope"}
        made = config(
            text_config={**tiny.text_settings(tokenizer, rope, {}), "head_dim": 32, **sizes},
            vision_config={**VISION, **tiny.patches(8), "num_position_embeddings": 64, **vision},
            **tiny.special_ids(tokenizer),
        )
        return model(made), build_tiny(family="qwen3_vl")[1]

    return build_one


MARKS = ("<|begin_of_video|>", "<|end_of_video|>", "<|begin_of_image|>", "<|end_of_image|>")


# Routed experts from the second layer on, beside a shared one.
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip


def _glm(config: Any, model: Any, readers: str, text: dict[str, Any]) -> Callable[[Any], tuple[Any, Any]]:
    """A builder of a model of the GLM-4V family: frames are image tokens within the marks of a video."""

    def build_one(tokenizer: Any) -> tuple[Any, Any]:
        patch = 8
        tokenizer.add_special_tokens({"extra_special_tokens": list(MARKS)}, replace_extra_special_tokens=False)
        video_start, video_end, image_start, image_end = tokenizer.convert_tokens_to_ids(list(MARKS))
        rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0}
        made = config(
            text_config={**tiny.text_settings(tokenizer, rope, {}), "head_dim": 32, **text},
            vision_config={**VISION, **tiny.patches(patch), "image_size": 64},
            video_start_token_id=video_start, video_end_token_id=video_end, image_start_token_id=image_start,
            image_end_token_id=image_end, **_pad_ids(tokenizer),
        )  # fmt: skip
        size = tiny.pixels(patch)
        template = tiny.CHAT_TEMPLATE
        for name, (begin, end) in {"video": MARKS[:2], "image": MARKS[2:]}.items():
            pad = f"<|{name}_pad|>"
            template = template.replace(f"<|vision_start|>{pad}<|vision_end|>", f"{begin}{pad}{end}")
        tokenizer.chat_template = template
        of_video = {**size, "longest_edge": 64 * size["longest_edge"]}
        return model(made), getattr(hf, f"{readers}Processor")(
            image_processor=getattr(hf, f"{readers}ImageProcessor")(patch_size=patch, size=size),
            tokenizer=tokenizer,
            video_processor=getattr(hf, f"{readers}VideoProcessor")(patch_size=patch, size=of_video),
            chat_template=template,
        )

    return build_one


def _omni(name: str, first: bool, text: dict[str, Any], **vision: Any) -> Callable[[Any], tuple[Any, Any]]:
    """A builder of a thinker of the Qwen-Omni family, which has an audio tower as well; ``first``: with the tokens and
    sizes of Qwen2.5-Omni."""

    def build_one(tokenizer: Any) -> tuple[Any, Any]:
        patch = 7 if first else 8
        marks = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
        marks |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
        tokenizer = with_named(tokenizer, marks)
        audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        audio |= {"output_dim": 128, "num_mel_bins": 16}
        rope = ROPE if first else INTERLEAVED
        made = getattr(hf, f"{name}ThinkerForConditionalGeneration")
        config = made.config_class(
            audio_config=audio,
            text_config={**tiny.text_settings(tokenizer, rope, {}), "head_dim": 32, **text},
            vision_config={**VISION, **tiny.patches(patch), **vision},
            audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
            audio_start_token_id=tokenizer.convert_tokens_to_ids("<|audio_bos|>"),
            audio_end_token_id=tokenizer.convert_tokens_to_ids("<|audio_eos|>"),
            position_id_per_seconds=2,
            **tiny.special_ids(tokenizer),
        )
        return made(config), getattr(hf, f"{name}Processor")(
            feature_extractor=hf.WhisperFeatureExtractor(feature_size=16), **_qwen2_readers(tokenizer, patch)
        )

    return build_one


def _video_llama(tokenizer: Any) -> tuple[Any, Any]:
    """Frames of up to four tokens, of which those that stay the same are left out."""
    patch = 7
    text = full_text(tokenizer, "qwen2")
    config = hf.VideoLlama3Config(text_config=text, vision_config=TOWER | {"patch_size": patch}, **_pad_ids(tokenizer))
    size = tiny.pixels(patch)
    processor = hf.VideoLlama3Processor(
        image_processor=hf.VideoLlama3ImageProcessor(patch_size=patch, size=size),
        tokenizer=tokenizer,
        video_processor=hf.VideoLlama3VideoProcessor(patch_size=patch, size=size),
        chat_template=tiny.CHAT_TEMPLATE,
    )
    return hf.VideoLlama3ForConditionalGeneration(config), processor


def _exaone(tokenizer: Any) -> tuple[Any, Any]:
    """Three layers of a sliding window of eight tokens, then one without."""
    patch = 7
    tower = {**VISION, **tiny.patches(patch), "num_key_value_heads": 1, "window_size": 28, "fullatt_block_indexes": [1]}
    text = full_text(tokenizer, "exaone4", head_dim=32, sliding_window=8, sliding_window_pattern=4)
    config = hf.Exaone4_5_Config(text_config=text, vision_config=tower, **_pad_ids(tokenizer))
    processor = hf.Exaone4_5_Processor(**_qwen2_readers(tokenizer, patch))
    return hf.Exaone4_5_ForConditionalGeneration(config), processor


PARTIAL = {"rope": {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}}
BUILDERS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": lambda tokenizer: build_tiny(family="qwen2_5_vl"),
    "qwen3_vl": lambda tokenizer: build_tiny(family="qwen3_vl"),
    "qwen3_vl_moe": _third(
        hf.Qwen3VLMoeConfig, hf.Qwen3VLMoeForConditionalGeneration, EXPERTS, deepstack_visual_indexes=[0, 1]
    ),
    "qwen3_5": _third(hf.Qwen3_5Config, hf.Qwen3_5ForConditionalGeneration, HYBRID | PARTIAL),
    "qwen3_5_moe": _third(
        hf.Qwen3_5MoeConfig,
        hf.Qwen3_5MoeForConditionalGeneration,
        HYBRID | PARTIAL | EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    "glm4v": _glm(hf.Glm4vConfig, hf.Glm4vForConditionalGeneration, "Glm4v", {}),
    "glm4v_moe": _glm(hf.Glm4vMoeConfig, hf.Glm4vMoeForConditionalGeneration, "Glm4v", ROUTED),
    "video_llama_3": _video_llama,
    "exaone4_5": _exaone,
    "qwen2_5_omni_thinker": _omni("Qwen2_5Omni", True, {}, window_size=28, fullatt_block_indexes=[1]),
    "qwen3_omni_moe_thinker": _omni(
        "Qwen3OmniMoe", False, EXPERTS, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]
    ),
    "glm46v": _glm(hf.Glm46VConfig, hf.Glm46VForConditionalGeneration, "Glm46V", {}),
    "internvl": internvl,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
    "smolvlm": smolvlm,
    "gemma4": gemma4,
}


def build(model_type: str, seed: int = 0) -> tuple[Any, Any]:
    """(model, processor) with random fp32 weights."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = BUILDERS[model_type](tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float().eval(), processor
