"""Videos within the sequences of a family of models: the base class of all layouts (docs/models.md: adding one)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from appo.recording.frame_ids import FrameIds, frame_ids

# Processor outputs with one row per token, without the types of tokens; everything else is of videos and images.
PER_TOKEN = ("input_ids", "attention_mask")


class LayoutError(ValueError):
    """Media that a model's processor cannot lay into one prompt."""


class Sizes(NamedTuple):
    """Sizes of the pictures that a processor is given."""

    factor: int  # pixels: their sides are multiples of it
    merged: int  # sampled frames that become one frame of the model
    pixels: int  # least H * W to read frames at: the processor resizes them; 0: it takes them as they come
    image_pixels: int = 0  # of images


@dataclass
class Video:
    """Sampled frames of a video (T, 3, H, W) uint8, and what transformers' processors want to know of their times."""

    frames: Tensor
    metadata: Any  # a transformers ``VideoMetadata``
    step: float  # seconds from one frame to the next, on average

    @property
    def seconds(self) -> list[float]:
        """T times."""
        return [index / self.metadata.fps for index in self.metadata.frames_indices]


class Encoded(NamedTuple):
    """A prompt as a model reads it: P tokens, F frames."""

    text: str  # the rendered chat, as the processor got it
    input_ids: Tensor  # (P,) int64
    token_types: Tensor | None  # (P,) int64: 0 text, 1 image, 2 video, where the model asks for them
    vision: dict[str, Tensor]  # joined with those of other prompts along the first axis
    frame_ids: Tensor  # (P,) int32
    num_frames: int


@dataclass(frozen=True)
class Layout(ABC):
    """A family of models. shares_prompt: a group's responses can stand behind one prompt."""

    model_type: str
    models: str  # as published
    frames: str  # how a video's tokens stand in the prompt
    shares_prompt: bool
    why_not: str = ""  # in one clause, why a prompt cannot be shared

    # Under which name processor and forward have the types of tokens; None: they have none.
    token_types: ClassVar[str | None] = "mm_token_type_ids"
    # In one clause, why vLLM cannot sample for it; "": it can
    why_not_vllm: ClassVar[str] = "what vLLM makes of its frames has not been compared with transformers"
    mixes_media: ClassVar[bool] = True  # images and videos can stand in one prompt
    stacks_videos: ClassVar[bool] = False  # its processor takes videos of one length alone in a prompt

    # From a record to a prompt

    @abstractmethod
    def sizes(self, processor: Any) -> Sizes: ...

    def media_arguments(
        self, messages: list[dict[str, Any]], images: Sequence[Tensor], videos: Sequence[Video]
    ) -> dict[str, Any]:
        """Arguments of the processor: images (3, H, W) uint8 and videos in their order in ``messages``, and that frames
        are sampled already."""
        options: dict[str, Any] = {}
        if images:
            options["images"] = list(images)
        if videos:
            videos = of_one_length(videos) if self.stacks_videos else videos
            metadata = [video.metadata for video in videos]
            options["videos"] = [video.frames for video in videos]
            options["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
        return options

    def messages(self, messages: list[dict[str, Any]], videos: Sequence[Video]) -> list[dict[str, Any]]:
        """Chat messages as the model's template takes them."""
        return messages

    def vision(self, encoded: Mapping[str, Any], videos: Sequence[Video], sizes: Sizes) -> dict[str, Tensor]:
        """The processor's output for one prompt's media, in a form that those of several prompts can be joined in."""
        left_out = {*PER_TOKEN, self.token_types, "video_metadata"}
        return {name: torch.as_tensor(value) for name, value in encoded.items() if name not in left_out}

    def named_types(self, token_types: Tensor | None) -> dict[str, Tensor]:
        """The argument of a forward that says which tokens are text, image and video; none where it takes none."""
        return {} if token_types is None or self.token_types is None else {self.token_types: token_types}

    def find_frames(self, input_ids: Tensor, config: Any, vision: Mapping[str, Tensor]) -> FrameIds:
        """Frames of the (1, P) tokens of one prompt."""
        return frame_ids(input_ids, config)

    def encode(
        self,
        processor: Any,
        config: Any,
        messages: list[dict[str, Any]],
        images: Sequence[Tensor],
        videos: Sequence[Video],
    ) -> Encoded:
        """The prompt that asks ``messages``. images, videos: in their order there.

        Raises LayoutError for media that cannot stand in one prompt of this model.
        """
        if images and videos and not self.mixes_media:
            raise LayoutError(f"{self.models} of transformers takes images or videos in a prompt, not both.")
        shown = self.messages(messages, videos)
        text = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
        options = self.media_arguments(messages, images, videos) | text_arguments(processor, text)
        encoded = processor(text=[text], return_tensors="pt", **options)
        vision = self.vision(encoded, videos, self.sizes(processor))
        found = self.find_frames(encoded["input_ids"], config, vision)
        types = None if self.token_types is None else encoded.get(self.token_types)
        return Encoded(
            text=text,
            input_ids=encoded["input_ids"][0],
            token_types=None if types is None else torch.as_tensor(types)[0],
            vision=vision,
            frame_ids=found.ids[0],
            num_frames=int(found.num_frames[0]),
        )

    # From prompts to a forward

    @abstractmethod
    def features(
        self, base: Any, inputs: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]], repeats: Sequence[int]
    ) -> dict[str, Any]:
        """Arguments of a forward that bring in videos and images: features ("mm_encoder_outputs"), sizes.

        The vision tower runs once for each prompt, whose features are repeated.

        Args:
            base: the transformers model without its head.
            inputs: tensors of a batch of prompts, among them those of `vision`, joined.
            rows: of each of these, how many rows are each prompt's.
            repeats: how often each prompt stands in the batch.
        """


def of_one_length(videos: Sequence[Video]) -> list[Video]:
    """Videos as long as the longest, their last frames repeated."""
    longest = max((len(video.frames) for video in videos), default=0)
    last = [video.frames[-1:].expand(longest - len(video.frames), -1, -1, -1) for video in videos]
    return [replace(video, frames=torch.cat([video.frames, more])) for video, more in zip(videos, last, strict=True)]


def text_arguments(processor: Any, text: str) -> dict[str, Any]:
    """Arguments for a chat that has the token of its beginning already: it would be put in front again."""
    begin = getattr(processor.tokenizer, "bos_token", None)
    return {"text_kwargs": {"add_special_tokens": False}} if begin and text.startswith(begin) else {}


def repeat_order(counts: Sequence[int], repeats: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Indices that repeat each prompt's media as a block: counts [2, 1], repeats [2, 3] -> 0 1 0 1 2 2 2."""
    order: list[int] = []
    start = 0
    for count, repeat in zip(counts, repeats, strict=True):
        order += list(range(start, start + count)) * repeat
        start += count
    return torch.tensor(order, dtype=torch.int64, device=device)


def repeat_features(features: Any, counts: Sequence[int], repeats: Sequence[int]) -> Any:
    """``pooler_output`` (one tensor per video or image) and each level of ``deepstack_features``, repeated."""
    order = repeat_order(counts, repeats).tolist()
    features.pooler_output = [features.pooler_output[i] for i in order]
    levels = getattr(features, "deepstack_features", None)
    if levels is not None:
        features.deepstack_features = [[level[i] for i in order] for level in levels]
    return features
