"""Tiny random video models and their processors, built from nothing: no download, a few thousand parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.video_utils import VideoMetadata

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Query and key/value heads of the tiny models: the ratio of Qwen2.5-VL-7B (28:4), which is no power of two.
HEADS, KV_HEADS, HEAD_DIM = 7, 1, 16
LAYERS = 4


@dataclass
class VideoModel:
    name: str
    model: Any
    processor: Any

    @property
    def config(self) -> Any:
        return self.model.config

    def inputs(self, videos: list[Tensor | None], questions: list[str], response: str = "") -> dict[str, Tensor]:
        """A left-padded batch; video (2 * t, 3, height, width) uint8 or None for a text prompt."""
        chats = []
        for video, question in zip(videos, questions, strict=True):
            content = ([{"type": "video"}] if video is not None else []) + [{"type": "text", "text": question}]
            chats.append([{"role": "user", "content": content}])
        texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        shown = [video for video in videos if video is not None]
        metadata = [VideoMetadata(total_num_frames=len(v), fps=2.0, frames_indices=list(range(len(v)))) for v in shown]
        batch = self.processor(
            text=[text + response for text in texts],
            videos=shown or None,
            videos_kwargs={"do_sample_frames": False, "video_metadata": metadata} if shown else {},
            padding=True,
            return_tensors="pt",
        )
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    built.chat_template = CHAT_TEMPLATE
    return built


def _text(
    tok: PreTrainedTokenizerFast, mrope: list[int] | None, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if mrope is not None:
        rope["mrope_section"] = mrope
    return {
        "vocab_size": len(tok),
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "bos_token_id": tok.pad_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        # Attention far from uniform, so that a wrong mask or row shows.
        "initializer_range": 0.2,
        **more,
    }


def _special_ids(tok: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tok.convert_tokens_to_ids(token) for name, token in names.items()}


def _vision(heads: int, **more: Any) -> dict[str, Any]:
    size = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": heads * HEAD_DIM}
    return {**size, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def qwen2_5_vl(heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0, **text: Any) -> VideoModel:
    tok = tokenizer()
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tok,
        video_processor=Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen2_5_VLConfig(
        text_config=_text(tok, [2, 3, 3], heads, kv_heads, **text),
        vision_config=_vision(heads, patch_size=14, window_size=56, fullatt_block_indexes=[1], tokens_per_second=2),
        **_special_ids(tok),
    )
    torch.manual_seed(seed)
    return VideoModel("qwen2_5_vl", _ready(Qwen2_5_VLForConditionalGeneration(config)), processor)


def qwen3_vl(heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0, **text: Any) -> VideoModel:
    tok = tokenizer()
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 400}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, size=pixels),
        tokenizer=tok,
        video_processor=Qwen3VLVideoProcessor(size=pixels, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen3VLConfig(
        text_config=_text(tok, [4, 2, 2], heads, kv_heads, head_dim=HEAD_DIM, **text),
        vision_config=_vision(heads, patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **_special_ids(tok),
    )
    torch.manual_seed(seed)
    return VideoModel("qwen3_vl", _ready(Qwen3VLForConditionalGeneration(config)), processor)


def qwen2(heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0, **text: Any) -> Any:
    """A decoder for text alone."""
    torch.manual_seed(seed)
    return _ready(Qwen2ForCausalLM(Qwen2Config(**_text(tokenizer(), None, heads, kv_heads, **text))))


def _ready(model: nn.Module) -> nn.Module:
    return model.float().eval()


def random_video(steps: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(2 * steps, 3, height, width) uint8: ``steps`` frames of the temporal grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2 * steps, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_mass_close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """``got``, fp32 and detached, against ``want``, relative to its largest entry."""
    assert got.dtype == torch.float32 and got.shape == want.shape and not got.requires_grad
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"
