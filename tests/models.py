"""The demo's tiny random models (``appo.tasks.tiny``) with the head counts of Qwen2.5-VL-7B, and their inputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.video_utils import VideoMetadata

from appo.tasks.tiny import build_tiny, build_tokenizer, text_settings

# Query and key/value heads: the ratio of Qwen2.5-VL-7B (28:4), which is no power of two.
HEADS, KV_HEADS, HEAD_DIM = 7, 1, 32
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


def qwen2_5_vl(heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0) -> VideoModel:
    return _video_model("qwen2_5_vl", heads, kv_heads, seed)


def qwen3_vl(heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0) -> VideoModel:
    return _video_model("qwen3_vl", heads, kv_heads, seed)


def qwen2(heads: int = HEADS, kv_heads: int = KV_HEADS, seed: int = 0, **text: Any) -> Any:
    """A decoder for text alone."""
    settings = text_settings(build_tokenizer(), {"rope_type": "default"}, _sizes(heads, kv_heads) | text)
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**settings)).float().eval()


def _video_model(family: str, heads: int, kv_heads: int, seed: int) -> VideoModel:
    return VideoModel(family, *build_tiny(seed, family=family, **_sizes(heads, kv_heads)))


def _sizes(heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        # Attention far from uniform, so that a wrong mask or row shows.
        "initializer_range": 0.14,
    }


def random_video(steps: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(2 * steps, 3, height, width) uint8: ``steps`` frames of the temporal grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2 * steps, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_mass_close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """``got``, fp32 and detached, against ``want``, relative to its largest entry."""
    assert got.dtype == torch.float32 and got.shape == want.shape and not got.requires_grad
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"relative error {error:.1e}"
