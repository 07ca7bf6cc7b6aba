"""From a record to what the model reads: one `Prompt` per record, collated by left padding.

Everything of one prompt is kept apart (its ids, its pixels), so that groups can be split over micro-batches at will and
the vision tower runs once per prompt, not once per response.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from appo.config import APPOConfig
from appo.data.records import DataError, Record
from appo.data.video import Clip, VideoError, read_video
from appo.recording.frame_ids import frame_ids

# Processor outputs with one row per token; everything else is per video or per image.
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")

SYSTEM_PROMPT = (
    "You watch the video and answer the question about it. First reason about what you see inside <think> </think> "
    "tags, then give the final answer inside <answer> </answer> tags."
)
TIME_PROMPT = (
    " After the answer, name the moments of the video that decide it, in seconds, inside <time> </time> tags, such as "
    "<time>8.4 to 12.5, 25 to 30.2</time>."
)
ANSWER_PROMPTS = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with one number.",
    "regression": "Answer with one number.",
    "math": "Answer with one mathematical expression.",
    "ocr": "Answer with the text as it is written.",
    "free-form": "Answer in a short sentence.",
}


def prompt_messages(record: Record, *, instructions: bool = True) -> list[dict[str, Any]]:
    """The chat messages that ask a record's question: the format to answer in, the media, the question, its options.

    ``instructions=False`` leaves out the system message and the line on how to answer, for a model that was trained on
    the format.
    """
    text = "\n".join((record.question, *record.options, *([ANSWER_PROMPTS[record.kind]] if instructions else [])))
    content: list[dict[str, Any]] = [{"type": media.kind, media.kind: str(media.path)} for media in record.media]
    user = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    if not instructions:
        return [user]
    system = SYSTEM_PROMPT + (TIME_PROMPT if record.asks_time else "")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, user]


@dataclass
class Prompt:
    """One record, decoded and tokenised. P tokens, F frames (temporal grid steps)."""

    record: Record
    input_ids: Tensor  # (P,) int64
    token_types: Tensor | None  # (P,) int64: 0 text, 1 image, 2 video
    vision: dict[str, Tensor] = field(default_factory=dict)  # pixel values and grids, as the processor made them
    frame_ids: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int32)
    )  # (P,) frame of each token or -1
    num_frames: int = 0  # F
    text: str = ""  # the rendered chat, as the processor got it
    clips: tuple[Clip, ...] = ()  # the sampled frames of each video, for rollout engines and pages
    images: tuple[Image.Image, ...] = ()
    frame_times: list[tuple[float, float]] = field(default_factory=list)  # F spans (first, last sample) in seconds

    def __len__(self) -> int:
        return self.input_ids.numel()

    def crucial_frames(self) -> list[int]:
        """Frames that were sampled within one of the record's time spans [start, end); empty where none are known.

        A span that falls between two samples counts for the frame nearest to its middle.
        """
        found = set()
        for start, end in self.record.time_spans:
            inside = [
                f
                for f, (first, last) in enumerate(self.frame_times)
                if last >= start and (first < end or first == start)
            ]
            middle = (start + end) / 2
            nearest = min(
                range(self.num_frames), key=lambda f: abs(sum(self.frame_times[f]) / 2 - middle), default=None
            )
            found.update(inside or ([] if nearest is None else [nearest]))
        return sorted(found)


class PromptBuilder:
    """Decodes and tokenises records, keeping the last ``cache`` prompts; can do so ahead of time in a thread."""

    def __init__(self, processor: Any, model_config: Any, config: APPOConfig, *, cache: int = 1024) -> None:
        self.processor, self.model_config, self.config = processor, model_config, config
        self._prompts: OrderedDict[str, Future[Prompt]] = OrderedDict()  # by record; an error is raised when asked for
        self._size = cache
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def __call__(self, record: Record) -> Prompt:
        self.prefetch([record])
        return self._prompts[record.id].result()

    def prefetch(self, records: Iterable[Record]) -> None:
        """Start on ``records`` in the background, in order."""
        for record in records:
            if record.id in self._prompts:
                self._prompts.move_to_end(record.id)
            else:
                self._prompts[record.id] = self._thread.submit(self._build, record)
        while len(self._prompts) > self._size:
            self._prompts.popitem(last=False)

    def _build(self, record: Record) -> Prompt:
        sizes = video_processor(self.processor)
        factor = sizes.patch_size * sizes.merge_size
        images, clips = [], []
        for media in record.media:
            try:
                if media.kind == "image":
                    images.append(Image.open(media.path).convert("RGB"))
                else:
                    clips.append(self._read(media.path, factor))
            except (VideoError, OSError) as error:
                raise DataError(f"record {record.id!r}: {media.kind} {media.path}: {error}") from error
        text = self.processor.apply_chat_template(
            prompt_messages(record, instructions=self.config.instructions), add_generation_prompt=True, tokenize=False
        )
        options: dict[str, Any] = {}
        if images:
            options["images"] = images
        if clips:
            options["videos"] = [clip.frames for clip in clips]
            options["videos_kwargs"] = {
                "do_sample_frames": False,
                "do_resize": False,
                "video_metadata": [_metadata(clip) for clip in clips],
            }
        encoded = self.processor(text=[text], return_tensors="pt", **options)
        vision = {
            name: torch.as_tensor(value)
            for name, value in encoded.items()
            if name not in PER_TOKEN and name != "video_metadata"
        }
        ids = frame_ids(encoded["input_ids"], self.model_config, video_grid_thw=vision.get("video_grid_thw"))
        types = encoded.get("mm_token_type_ids")
        return Prompt(
            record=record,
            input_ids=encoded["input_ids"][0],
            token_types=None if types is None else torch.as_tensor(types)[0],
            vision=vision,
            frame_ids=ids.ids[0],
            num_frames=int(ids.num_frames[0]),
            text=text,
            clips=tuple(clips),
            images=tuple(images),
            frame_times=_frame_times(clips, sizes.temporal_patch_size),
        )

    def _read(self, path: Any, factor: int) -> Clip:
        return read_video(
            path,
            fps=self.config.fps,
            max_frames=self.config.max_frames,
            max_pixels=self.config.max_pixels,
            factor=factor,
            timeout=self.config.decode_timeout,
            decoder=self.config.video_decoder,
        )


def video_processor(processor: Any) -> Any:
    """The part of a processor that turns videos into patches, and says of what size."""
    return getattr(processor, "video_processor", None) or processor.image_processor


TICKS = 1000.0  # per second: the clock of the times below


def _metadata(clip: Clip) -> Any:
    """What processors turn into timestamps and second-per-grid values: the true time of each sampled frame.

    Processors know a time as an index divided by a rate. Frames counted at the average rate of a file would be off
    where its rate varies, so the indices here count milliseconds; ``total_num_frames`` is the length of what was
    sampled in the same unit, from which they take the samples per second.
    """
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=max(len(clip.timestamps), round((clip.end - clip.start) * TICKS)),
        fps=TICKS,
        duration=clip.duration,
        frames_indices=[round(time * TICKS) for time in clip.timestamps.tolist()],
    )


def _frame_times(clips: Sequence[Clip], temporal_patch: int) -> list[tuple[float, float]]:
    times = []
    for clip in clips:
        stamps = clip.timestamps.tolist()
        times += [
            (stamps[i], stamps[min(i + temporal_patch, len(stamps)) - 1]) for i in range(0, len(stamps), temporal_patch)
        ]
    return times


@dataclass
class PromptBatch:
    """Prompts padded on the left to P tokens."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask (B, P), mm_token_type_ids, and the vision tensors of all
    frame_ids: Tensor  # (B, P) int32, -1 on padding
    num_frames: int  # F, the largest
    videos: list[int]  # number of videos of each prompt
    images: list[int]


def collate(prompts: Sequence[Prompt], pad_id: int, device: torch.device | str = "cpu") -> PromptBatch:
    """Pad prompts on the left and join their vision tensors in order."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    frames = torch.full((len(prompts), length), -1, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt.input_ids
        mask[row, length - len(prompt) :] = 1
        frames[row, length - len(prompt) :] = prompt.frame_ids
        if prompt.token_types is not None:
            types[row, length - len(prompt) :] = prompt.token_types
    inputs = {"input_ids": ids, "attention_mask": mask}
    if prompts[0].token_types is not None:
        inputs["mm_token_type_ids"] = types
    names = dict.fromkeys(name for prompt in prompts for name in prompt.vision)
    inputs |= {name: torch.cat([p.vision[name] for p in prompts if name in p.vision]) for name in names}
    return PromptBatch(
        inputs={name: value.to(device) for name, value in inputs.items()},
        frame_ids=frames.to(device),
        num_frames=max(prompt.num_frames for prompt in prompts),
        videos=[_count(prompt, "video_grid_thw") for prompt in prompts],
        images=[_count(prompt, "image_grid_thw") for prompt in prompts],
    )


def _count(prompt: Prompt, name: str) -> int:
    return len(prompt.vision[name]) if name in prompt.vision else 0
