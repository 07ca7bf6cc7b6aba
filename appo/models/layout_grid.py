"""Models whose videos are grids of patches (Qwen-VL, GLM-4V): a frame has as many tokens as its size asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from appo.models.layout import Layout, Sizes, Video, repeat_features, repeat_order
from appo.recording.frame_ids import FrameIds, frame_ids

_PIXELS = {"video": "pixel_values_videos", "image": "pixel_values"}


@dataclass(frozen=True)
class GridLayout(Layout):
    """The processor returns ``video_grid_thw`` and ``image_grid_thw`` beside patches of frames it did not resize."""

    why_not_vllm: ClassVar[str] = ""

    def sizes(self, processor: Any) -> Sizes:
        reader = getattr(processor, "video_processor", None) or processor.image_processor
        return Sizes(reader.patch_size * reader.merge_size, reader.temporal_patch_size, 0)

    def media_arguments(
        self, messages: list[dict[str, Any]], images: Sequence[Tensor], videos: Sequence[Video]
    ) -> dict[str, Any]:
        options = super().media_arguments(messages, images, videos)
        if images:
            options["images_kwargs"] = {"do_resize": False}
        if videos:
            options["videos_kwargs"]["do_resize"] = False
        return options

    def find_frames(self, input_ids: Tensor, config: Any, vision: Mapping[str, Tensor]) -> FrameIds:
        return frame_ids(input_ids, config, video_grid_thw=vision.get("video_grid_thw"))

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: inputs[name][repeat_order(rows[name], repeats, inputs[name].device)]
            for name in ("video_grid_thw", "image_grid_thw", "second_per_grid_ts", "video_second_per_grid")
            if name in inputs
        }
        outputs = {
            kind: repeat_features(self.encoded(base, kind, inputs), rows[f"{kind}_grid_thw"], repeats)
            for kind, pixels in _PIXELS.items()
            if pixels in inputs
        }
        return found | {"mm_encoder_outputs": outputs or None}

    def encoded(self, base: Any, kind: str, inputs: Mapping[str, Tensor], *more: Tensor) -> Any:
        """The tower's output for all videos, or images, of a batch; ``more``: what it takes beside pixels and grid."""
        encode = getattr(base, f"get_{kind}_features")
        return encode(inputs[_PIXELS[kind]], inputs[f"{kind}_grid_thw"], *more, return_dict=True)


@dataclass(frozen=True)
class MarkedGridLayout(GridLayout):
    """GLM-4V: frames are image tokens within the marks of a video.

    Its forward takes features of either kind to be those of all image tokens, and fails where a batch has both.
    """

    mixes_media: ClassVar[bool] = False

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        found = super().features(base, inputs, rows, repeats)
        outputs = found["mm_encoder_outputs"]
        if outputs is not None and len(outputs) > 1:
            types = inputs["mm_token_type_ids"].repeat_interleave(
                torch.tensor(repeats).to(inputs["input_ids"].device), 0
            )
            types = types[types > 0]  # of all image tokens, in the order of the batch
            image, video = (torch.cat(outputs[kind].pooler_output) for kind in ("image", "video"))
            joined = image.new_empty(len(types), image.shape[1])
            joined = joined.index_put((types == 1,), image).index_put((types == 2,), video)
            outputs["image"].pooler_output = [joined]
            del outputs["video"]
        return found


@dataclass(frozen=True)
class OmniLayout(GridLayout):
    """Qwen-Omni's thinker, whose processor takes all frames to be sampled at one rate: the model gets the true one."""

    why_not_vllm: ClassVar[str] = "vLLM takes all its frames to be sampled at one rate, and positions would differ"

    def vision(self, encoded: Mapping[str, Any], videos: Sequence[Video], sizes: Sizes) -> dict[str, Tensor]:
        found = super().vision(encoded, videos, sizes)
        if videos:
            found["video_second_per_grid"] = torch.tensor([video.step for video in videos]) * sizes.merged
        return found


@dataclass(frozen=True)
class ExaoneLayout(GridLayout):
    """EXAONE 4.5, whose positions count tokens."""

    token_types: ClassVar[str | None] = None
    why_not_vllm: ClassVar[str] = Layout.why_not_vllm


@dataclass(frozen=True)
class VideoLlama3Layout(GridLayout):
    """VideoLLaMA 3: a frame has the tokens in which it differs from the one before, at least one."""

    token_types: ClassVar[str | None] = None
    why_not_vllm: ClassVar[str] = Layout.why_not_vllm

    def find_frames(self, input_ids: Tensor, config: Any, vision: Mapping[str, Tensor]) -> FrameIds:
        return frame_ids(input_ids, config)  # runs: grids count what was left out as well

    def encoded(self, base: Any, kind: str, inputs: Mapping[str, Tensor], *more: Tensor) -> Any:
        features = super().encoded(base, kind, inputs, inputs[f"{kind}_merge_sizes"], *more)
        kept = inputs.get(f"{kind}_compression_mask")
        if kept is not None:
            parts = kept.split([len(part) for part in features.pooler_output])
            features.pooler_output = [part[own] for part, own in zip(features.pooler_output, parts, strict=True)]
        return features
