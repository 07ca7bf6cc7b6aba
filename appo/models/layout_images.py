"""Models that see the frames of a video as images of one size, each with the same number of tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from appo.models.layout import Encoded, Layout, LayoutError, Sizes, Video, repeat_order


def square_sizes(reader: Any) -> Sizes:
    """Of pictures that ``reader`` makes of one size: with twice as many pixels as it makes of them, no side of a 16:9
    picture is shorter than the side it becomes."""
    pixels = 2 * reader.size["height"] * reader.size["width"]
    return Sizes(1, 1, pixels, pixels)


def check_lengths(models: str, videos: Sequence[Video]) -> None:
    """For processors that stack the videos of a prompt."""
    lengths = sorted({len(video.frames) for video in videos})
    if len(lengths) > 1:
        raise LayoutError(
            f"the processor of {models} takes videos of one number of frames in a prompt, got {lengths}. Lower "
            "`max_frames` to the fewest, or split the record."
        )


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

    def sizes(self, processor: Any) -> Sizes:
        return square_sizes(processor.video_processor)

    def media_arguments(
        self, messages: list[dict[str, Any]], images: Sequence[Tensor], videos: Sequence[Video]
    ) -> dict[str, Any]:
        check_lengths(self.models, videos)
        return super().media_arguments(messages, images, videos)

    def encode(self, processor: Any, *arguments: Any) -> Encoded:
        encoded = super().encode(processor, *arguments)
        tokens = (processor.image_token, processor.video_token)
        placeholders = re.findall("|".join(map(re.escape, tokens)), encoded.text)
        lengths = iter([len(video.frames) for video in arguments[-1]])
        runs: list[bool] = []
        for token in placeholders:
            runs += [False] if token == processor.image_token else [True] * next(lengths)
        return without_images(encoded, runs, self.models)


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
        order = repeat_order(rows["pixel_values"], repeats).tolist()
        features.pooler_output = [features.pooler_output[index] for index in order]
        return {"mm_encoder_outputs": {"image": features}}


@dataclass(frozen=True)
class LlavaOneVisionLayout(Layout):
    """A video is one run of tokens: its frames, pooled to a quarter of the tower's patches each, and a line break.

    Kept of a prompt are frames and tiles of images one after another, and how many of them each video and image has.
    """

    token_types: ClassVar[str | None] = None

    def sizes(self, processor: Any) -> Sizes:
        return square_sizes(processor.video_processor)

    def media_arguments(
        self, messages: list[dict[str, Any]], images: Sequence[Tensor], videos: Sequence[Video]
    ) -> dict[str, Any]:
        check_lengths(self.models, videos)
        return super().media_arguments(messages, images, videos)

    def vision(self, encoded: Mapping[str, Any], videos: Sequence[Video], sizes: Sizes) -> dict[str, Tensor]:
        found = super().vision(encoded, videos, sizes)
        for pixels, counts in (("pixel_values_videos", "video_frames"), ("pixel_values", "image_tiles")):
            if pixels in found:
                many, each = found[pixels].shape[:2]
                found |= {pixels: found[pixels].flatten(0, 1), counts: torch.full((many,), each)}
        return found

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
            order = repeat_order(rows["image_sizes"], repeats).tolist()
            image.pooler_output = [image.pooler_output[index] for index in order]
            outputs["image"] = image
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
            outputs["video"] = base.get_video_features(*(inputs[name] for name in of_videos), return_dict=True)
        if "pixel_values" in inputs:
            of_images = ("pixel_values", "image_position_ids")
            outputs["image"] = base.get_image_features(*(inputs[name] for name in of_images), return_dict=True)
        for kind, counted in (("video", "num_frames_per_video"), ("image", "pixel_values")):
            if kind in outputs:
                order = repeat_order(rows[counted], repeats).tolist()
                outputs[kind].pooler_output = [outputs[kind].pooler_output[index] for index in order]
        return {"mm_encoder_outputs": outputs} if outputs else {}
