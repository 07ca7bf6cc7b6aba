"""Models whose frames stand in the prompt as images do: runs of image tokens, all of one length."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from appo.models.layout import Encoded, Layout, LayoutError, Sizes, Video, repeat_features, repeat_order


def square_sizes(reader: Any) -> Sizes:
    """Of pictures that ``reader`` makes of one size: with twice as many pixels as it makes of them, no side of a 16:9
    picture is shorter than the side it becomes."""
    pixels = 2 * reader.size["height"] * reader.size["width"]
    return Sizes(1, 1, pixels, pixels)


def without_images(encoded: Encoded, runs: Sequence[bool], models: str) -> Encoded:
    """``encoded`` with the frames of videos alone. runs: of each run of image tokens, whether it is such a frame."""
    if len(runs) != encoded.num_frames:
        raise LayoutError(
            f"expected {len(runs)} images and frames in a prompt of {models}, got {encoded.num_frames} runs of image "
            "tokens. Is its processor's chat template that of the model?"
        )
    return encoded._replace(frame_ids=numbered(encoded.frame_ids, runs), num_frames=sum(runs))


def numbered(frame_ids: Tensor, kept: Sequence[bool]) -> Tensor:
    """``frame_ids`` of the ``kept`` frames alone, without gaps."""
    frames = torch.tensor([*kept, False])  # the last for tokens of no frame
    return torch.where(frames, frames.cumsum(0) - 1, -1).int()[frame_ids.long()]


@dataclass(frozen=True)
class ImagesLayout(Layout):
    """Frames and images are ``pixel_values`` in the order in which they stand in the prompt."""

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        if "pixel_values" not in inputs:
            return {}
        features = base.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        order = repeat_order(rows["pixel_values"], repeats, inputs["pixel_values"].device)
        features.pooler_output = features.pooler_output[order]
        return {"mm_encoder_outputs": {"image": features}}


@dataclass(frozen=True)
class InternVLLayout(ImagesLayout):
    """A frame is one tile, an image as many as fit it, all within the marks of one image."""

    token_types: ClassVar[str | None] = None
    stacks_videos: ClassVar[bool] = True

    def sizes(self, processor: Any) -> Sizes:
        return square_sizes(processor.video_processor)

    def encode(self, processor: Any, *arguments: Any) -> Encoded:
        encoded = super().encode(processor, *arguments)
        tokens = (processor.image_token, processor.video_token)
        placeholders = re.findall("|".join(map(re.escape, tokens)), encoded.text)
        videos: Sequence[Video] = arguments[-1]
        longest = max((len(video.frames) for video in videos), default=0)
        lengths = iter([len(video.frames) for video in videos])
        runs: list[bool] = []  # of image tokens: whether it is a frame
        added: list[bool] = []  # whether that is none of the video's own
        for token in placeholders:
            own = 1 if token == processor.image_token else next(lengths)
            count = 1 if token == processor.image_token else longest
            runs += [token == processor.video_token] * count
            added += [False] * own + [True] * (count - own)
        found = without_images(encoded, runs, self.models)
        return _without_added(encoded, runs, added, processor.image_seq_length) if any(added) else found


def _without_added(encoded: Encoded, runs: Sequence[bool], added: Sequence[bool], tile: int) -> Encoded:
    """InternVL's prompt without the frames that `appo.models.layout.of_one_length` added.

    Of each goes "\\nFrame9: <img>...</img>", from behind the mark that ends the frame before. runs, added: of each run
    of image tokens, ``tile`` to a picture, whether it is a frame, and an added one.
    """
    ends = [int((encoded.frame_ids == run).nonzero()[-1]) + 1 for run in range(len(runs))]
    left = torch.ones(len(encoded.input_ids), dtype=torch.bool)
    for run, more in enumerate(added):
        if more:
            left[ends[run - 1] + 1 : ends[run] + 1] = False
    pictures = torch.bincount(encoded.frame_ids[encoded.frame_ids >= 0]) // tile
    kept = [frame and not more for frame, more in zip(runs, added, strict=True)]
    return encoded._replace(
        input_ids=encoded.input_ids[left],
        vision={"pixel_values": encoded.vision["pixel_values"][~torch.tensor(added).repeat_interleave(pictures)]},
        frame_ids=numbered(encoded.frame_ids, kept)[left],
        num_frames=sum(kept),
    )


@dataclass(frozen=True)
class Gemma3Layout(ImagesLayout):
    """Frames are images to processor and template, each behind its time, as Gemma 4 writes it."""

    token_types: ClassVar[str | None] = "token_type_ids"

    def sizes(self, processor: Any) -> Sizes:
        return square_sizes(processor.image_processor)

    def messages(self, messages: list[dict[str, Any]], videos: Sequence[Video]) -> list[dict[str, Any]]:
        left = iter(videos)
        return [
            message | {"content": [shown for part in message["content"] for shown in _as_images(part, left)]}
            for message in messages
        ]

    def media_arguments(
        self, messages: list[dict[str, Any]], images: Sequence[Tensor], videos: Sequence[Video]
    ) -> dict[str, Any]:
        frames = iter([video.frames for video in videos])
        left: dict[str, Iterator[Any]] = {"image": iter([[image] for image in images]), "video": frames}
        pictures = [picture for kind in _media_kinds(messages) for picture in next(left[kind])]
        if not pictures:
            return {}
        # Crops of a frame would stand for further frames.
        return {"images": [pictures], "images_kwargs": {"do_pan_and_scan": False} if videos else {}}

    def encode(
        self,
        processor: Any,
        config: Any,
        messages: list[dict[str, Any]],
        images: Sequence[Tensor],
        videos: Sequence[Video],
    ) -> Encoded:
        encoded = super().encode(processor, config, messages, images, videos)
        if not videos:
            return encoded._replace(frame_ids=torch.full_like(encoded.frame_ids, -1), num_frames=0)
        lengths = iter([len(video.frames) for video in videos])
        runs: list[bool] = []
        for kind in _media_kinds(messages):
            runs += [True] * next(lengths) if kind == "video" else [False]
        return without_images(encoded, runs, self.models)


def _media_kinds(messages: list[dict[str, Any]]) -> list[str]:
    return [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]


def _as_images(part: dict[str, Any], videos: Iterator[Video]) -> list[dict[str, Any]]:
    """A part of a message; of a video, its times and frames."""
    if part["type"] != "video":
        return [part]
    shown: list[dict[str, Any]] = []
    for second in map(int, next(videos).seconds):
        shown += [{"type": "text", "text": f"{second // 60:02d}:{second % 60:02d} "}, {"type": "image"}]
    return shown


@dataclass(frozen=True)
class SmolVLMLayout(Layout):
    """Frames stand behind their times, and a text that counts them in front. Kept of a prompt are frames, or tiles of
    images, one after another."""

    token_types: ClassVar[str | None] = None
    mixes_media: ClassVar[bool] = False  # its processor returns both under one name

    def sizes(self, processor: Any) -> Sizes:
        side, longest = processor.video_processor.max_image_size, processor.image_processor.size
        return Sizes(1, 1, 2 * side["longest_edge"] ** 2, longest["longest_edge"] ** 2)

    def vision(self, encoded: Mapping[str, Any], videos: Sequence[Video], sizes: Sizes) -> dict[str, Tensor]:
        found = super().vision(encoded, videos, sizes)
        lengths = [len(video.frames) for video in videos]  # the processor pads to the longest
        for name, value in found.items():
            rows = [row[:length] for row, length in zip(value, lengths, strict=True)] if videos else list(value)
            found[name] = torch.cat(rows)[:, None]
        return found

    def encode(self, processor: Any, *arguments: Any) -> Encoded:
        encoded, videos = super().encode(processor, *arguments), arguments[-1]
        runs = [True] * sum(len(video.frames) for video in videos)
        return without_images(encoded, runs or [False] * encoded.num_frames, self.models)

    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        if "pixel_values" not in inputs:
            return {}
        features = base.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
        return {"mm_encoder_outputs": {"image": repeat_features(features, rows["pixel_values"], repeats)}}
