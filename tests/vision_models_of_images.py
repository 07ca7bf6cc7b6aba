"""Tiny random models of the families to which a video's frames are images, and what other families share with them."""

from typing import Any

import pytest
import transformers as hf
from tokenizers import processors

from appo.tasks import tiny

# Of a vision tower, as most configs name them.
TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def with_named(tokenizer: Any, names: dict[str, str]) -> Any:
    """The tokenizer with further tokens that it knows by name, as ``tokenizer.NAME`` and ``tokenizer.NAME_id``."""
    tokenizer.add_special_tokens({"extra_special_tokens": list(names.values())}, replace_extra_special_tokens=False)
    known = {name: getattr(tokenizer, name) for name in ("unk_token", "eos_token", "pad_token", "padding_side")}
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", **names}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=named, **known)


# Frames of 28 x 28 pixels in patches of 7.
SQUARE = {"height": 28, "width": 28}


def full_text(tokenizer: Any, kind: str, **changes: Any) -> dict[str, Any]:
    """A text model with rotary positions of one axis."""
    return tiny.text_settings(tokenizer, {"rope_type": "default"}, {"model_type": kind, **changes})


def _chat(tokenizer: Any, **marks: str) -> str:
    """The chat template of the tiny models, with other marks for images and videos."""
    template = tiny.CHAT_TEMPLATE
    for name, mark in marks.items():
        template = template.replace(f"<|vision_start|><|{name}_pad|><|vision_end|>", mark)
    return template


def internvl(tokenizer: Any) -> tuple[Any, Any]:
    """A frame is 4 x 4 patches, shuffled to 4 tokens; an image up to 4 tiles of that size."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    marks |= {"video_token": "<video>"}
    tokenizer = with_named(tokenizer, marks)
    config = hf.InternVLConfig(
        text_config=full_text(tokenizer, "qwen2"),
        vision_config={
            **TOWER, "image_size": [28, 28], "patch_size": [7, 7], "use_absolute_position_embeddings": True,
        },
        image_token_id=tokenizer.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    template = _chat(tokenizer, image="<IMG_CONTEXT>\n", video="<video>\n")
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def _siglip(**changes: Any) -> dict[str, Any]:
    """A tower of pictures of 28 x 28 pixels, 16 patches."""
    return {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, **TOWER, **changes}


def llava_onevision(tokenizer: Any) -> tuple[Any, Any]:
    """A frame is 16 patches, pooled to 4 tokens; an image itself and its tiles."""
    marks = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = with_named(tokenizer, marks)
    tiles = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = hf.LlavaOnevisionConfig(
        text_config=full_text(tokenizer, "qwen2"),
        vision_config=_siglip(vision_use_head=False),
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_grid_pinpoints=tiles,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
    )  # fmt: skip
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=tiles),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_chat(tokenizer, image="<image>\n", video="<video>\n"),
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _gemma_text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Two of four layers see a window that is shorter than a prompt."""
    layers = ["sliding_attention", "full_attention"] * 2
    rope = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in layers}
    sizes = {"head_dim": 32, "layer_types": layers, "sliding_window": 40, "rope_parameters": rope}
    return tiny.text_settings(tokenizer, {}, {**sizes, **changes})


def _gemma_tokenizer(tokenizer: Any, marks: dict[str, str]) -> Any:
    """A tokenizer that puts a token in front of all, as the chat template does too."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<bos>"]}, replace_extra_special_tokens=False)
    begin = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer = with_named(tokenizer, marks)
    tokenizer.bos_token = "<bos>"
    single = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


IMAGE_MARKS = {
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    "video_token": "<|video|>",
}  # fmt: skip


def gemma3(tokenizer: Any) -> tuple[Any, Any]:
    """A picture is 16 patches, pooled to 4 tokens."""
    tokenizer = _gemma_tokenizer(tokenizer, IMAGE_MARKS)
    config = hf.Gemma3Config(
        text_config=_gemma_text(tokenizer, query_pre_attn_scalar=32),
        vision_config=_siglip(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    processor = hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessor(size=SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template="{{ bos_token }}" + _chat(tokenizer, image="<start_of_image>"),
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def smolvlm(tokenizer: Any) -> tuple[Any, Any]:
    """A frame is 16 patches, shuffled to 4 tokens; an image up to four tiles and itself."""
    pytest.importorskip("num2words", reason="SmolVLM's processor counts frames in words")
    marks = {"image_token": "<image>", "video_token": "<video>", "fake_image_token": "<fake_token_around_image>"}
    marks |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer = with_named(tokenizer, marks)
    config = hf.SmolVLMConfig(
        text_config=full_text(tokenizer, "llama"),
        vision_config={"image_size": 28, "patch_size": 7, **TOWER},
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    size, most = {"longest_edge": 56}, {"longest_edge": 28}
    processor = hf.SmolVLMProcessor(
        image_processor=hf.SmolVLMImageProcessor(size=size, max_image_size=most),
        tokenizer=tokenizer,
        video_processor=hf.SmolVLMVideoProcessor(size=size, max_image_size=most, num_frames=8, fps=1),
        image_seq_len=4,
        chat_template=_chat(tokenizer, image="<image>", video="<video>"),
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def gemma4(tokenizer: Any) -> tuple[Any, Any]:
    """Frames of at most 70 tokens, the least there is; layers that take keys of earlier ones, and a part of each
    token's embedding by layer."""
    marks = IMAGE_MARKS | {"audio_token": "<|audio|>", "boa_token": "<|audio_start|>", "eoa_token": "<|audio_end|>"}
    tokenizer = _gemma_tokenizer(tokenizer, marks)
    text = _gemma_text(
        tokenizer, hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(tokenizer), num_kv_shared_layers=2,
        global_head_dim=64, final_logit_softcapping=5.0,
    )  # fmt: skip
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    tower |= {"head_dim": 16, "intermediate_size": 64, "patch_size": 4, "position_embedding_size": 1024}
    config = hf.Gemma4Config(
        text_config=text,
        vision_config=tower,
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )
    processor = hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=hf.Gemma4VideoProcessor(patch_size=4),
        chat_template="{{ bos_token }}" + _chat(tokenizer, image=IMAGE_MARKS["image_token"], video="<|video|>"),
    )
    return hf.Gemma4ForConditionalGeneration(config), processor
