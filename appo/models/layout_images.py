"""Models that see the frames of a video as images of one size, each with the same number of tokens."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from appo.models.layout import Encoded, Layout, LayoutError, Sizes, Video, repeat_order


def tower_pixels(reader: Any) -> int:
    """Least H * W to read a picture at that ``reader`` makes of one size: with twice as many as it makes of it, no side
    of a 16:9 picture is shorter than the side it becomes."""
    size = reader.size
    edges = [getattr(size, name, None) for name in ("height", "width", "longest_edge")]
    height, width, longest = (int(edge) if edge else 0 for edge in edges)
    return 2 * (height * width or longest * longest)


def without_images(encoded: Encoded, runs: Sequence[bool], models: str) -> Encoded:
    """``encoded`` with the frames of videos alone. runs: of each run of image tokens, whether it is such a frame."""
    if len(runs) != encoded.num_frames:
        raise LayoutError(
            f"expected {len(runs)} images and frames in a prompt of {models}, got {encoded.num_frames} runs of image "
            "tokens. Is its processor's chat template that of the model?"
        )
    of_run = torch.tensor([*runs, False])  # the last for tokens of no run
    number = torch.where(of_run, of_run.cumsum(0) - 1, -1).int()
    return encoded._replace(frame_ids=number[encoded.frame_ids.long()], num_frames=sum(runs))


@dataclass(frozen=True)
class InternVLLayout(Layout):
    """Frames and tiles of images are ``pixel_values`` in the order in which they stand in the prompt."""

    token_types: ClassVar[str | None] = None

    def sizes(self, processor: Any) -> Sizes:
        return Sizes(1, 1, tower_pixels(processor.video_processor))

    def media_arguments(self, images: Sequence[Tensor], videos: Sequence[Video]) -> dict[str, Any]:
        lengths = sorted({len(video.frames) for video in videos})
        if len(lengths) > 1:
            raise LayoutError(
                f"the processor of {self.models} takes videos of one number of frames in a prompt, got {lengths}. "
                "Lower `max_frames` to the fewest, or split the record."
            )
        return super().media_arguments(images, videos)

    def encode(self, processor: Any, *arguments: Any) -> Encoded:
        encoded = super().encode(processor, *arguments)
        tokens = (processor.image_token, processor.video_token)
        placeholders = re.findall("|".join(map(re.escape, tokens)), encoded.text)
        lengths = iter([len(video.frames) for video in arguments[-1]])
        runs: list[bool] = []
        for token in placeholders:
            runs += [False] if token == processor.image_token else [True] * next(lengths)
        return without_images(encoded, runs, self.models)

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        if "pixel_values" not in inputs:
            return {}
        features = base.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        order = repeat_order(rows["pixel_values"], repeats, inputs["pixel_values"].device)
        features.pooler_output = features.pooler_output[order]
        return {"mm_encoder_outputs": {"image": features}}
