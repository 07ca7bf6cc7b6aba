"""Models whose frames are video tokens, as many for each as the video's shape or the model says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from appo.models.layout import Encoded, Layout, Sizes, Video, repeat_features, repeat_order
from appo.models.layout_images import numbered, square_sizes


@dataclass(frozen=True)
class LlavaOneVisionLayout(Layout):
    """A video is one run of tokens: its frames, pooled to a quarter of the tower's patches each, and a line break.

    Kept of a prompt are frames and tiles of images one after another, and how many of them each video and image has.
    """

    token_types: ClassVar[str | None] = None
    stacks_videos: ClassVar[bool] = True

    def sizes(self, processor: Any) -> Sizes:
        return square_sizes(processor.video_processor)

    def vision(self, encoded: Mapping[str, Any], videos: Sequence[Video], sizes: Sizes) -> dict[str, Tensor]:
        found = super().vision(encoded, videos, sizes)
        for pixels, counts in (("pixel_values_videos", "video_frames"), ("pixel_values", "image_tiles")):
            if pixels in found:
                many, each = found[pixels].shape[:2]
                found |= {pixels: found[pixels].flatten(0, 1), counts: torch.full((many,), each)}
        return found

    def encode(self, processor: Any, *arguments: Any) -> Encoded:
        encoded, videos = super().encode(processor, *arguments), arguments[-1]
        lengths = [len(video.frames) for video in videos]
        kept = [frame < length for length in lengths for frame in range(max(lengths))]
        if all(kept):
            return encoded
        left = numbered(encoded.frame_ids, kept)
        tokens = (encoded.frame_ids < 0) | (left >= 0)
        frames = encoded.vision["pixel_values_videos"][torch.tensor(kept)]
        return encoded._replace(
            input_ids=encoded.input_ids[tokens],
            vision=encoded.vision | {"pixel_values_videos": frames, "video_frames": torch.tensor(lengths)},
            frame_ids=left[tokens],
            num_frames=sum(kept),
        )

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        outputs = {}
        if "pixel_values_videos" in inputs:
            # A video of one frame each: videos of several lengths cannot be stacked.
            video = base.get_video_features(inputs["pixel_values_videos"][:, None], return_dict=True)
            frames = video.pooler_output.split(inputs["video_frames"].tolist())  # (T, tokens and line break, D) each
            whole = [torch.cat([each[:, :-1].flatten(0, 1), each[-1, -1:]]) for each in frames]
            order = repeat_order(rows["video_frames"], repeats).tolist()
            video.pooler_output = torch.cat([whole[index] for index in order])[None]
            outputs["video"] = video
        if "pixel_values" in inputs:
            tiles = inputs["pixel_values"].split(inputs["image_tiles"].tolist())
            image = base.get_image_features(
                pad_sequence(tiles, batch_first=True),
                inputs["image_sizes"],
                batch_num_images=inputs["batch_num_images"],
                return_dict=True,
            )
            outputs["image"] = repeat_features(image, rows["image_sizes"], repeats)
        return {"mm_encoder_outputs": outputs} if outputs else {}


@dataclass(frozen=True)
class Gemma4Layout(Layout):
    """Frames stand behind their times, each with as many tokens as the shape of the video leaves of a fixed number."""

    def sizes(self, processor: Any) -> Sizes:
        readers = (processor.video_processor, processor.image_processor)
        pixels = [reader.max_soft_tokens * (reader.pooling_kernel_size * reader.patch_size) ** 2 for reader in readers]
        return Sizes(1, 1, *pixels)

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        outputs = {}
        if "pixel_values_videos" in inputs:
            of_videos = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
            video = base.get_video_features(*(inputs[name] for name in of_videos), return_dict=True)
            outputs["video"] = repeat_features(video, rows["num_frames_per_video"], repeats)
        if "pixel_values" in inputs:
            of_images = ("pixel_values", "image_position_ids")
            image = base.get_image_features(*(inputs[name] for name in of_images), return_dict=True)
            outputs["image"] = repeat_features(image, rows["pixel_values"], repeats)
        return {"mm_encoder_outputs": outputs} if outputs else {}
