"""From a record to what the model reads: one `Prompt` per record, which `appo.data.prompt_batch` joins with others.

Everything of one prompt is kept apart (its ids, its pixels), so that groups can be split over micro-batches at will and
the vision tower runs once per prompt, not once per response.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from appo.config import APPOConfig
from appo.data.clip_times import frame_times, video_of
from appo.data.math_answers import reads
from appo.data.media import check_spans, load_clip, load_image
from appo.data.messages import prompt_messages
from appo.data.records import DataError, Record
from appo.data.video import Clip
from appo.data.video_cache import GIB, ClipCache
from appo.models.layout import LayoutError
from appo.models.layouts import layout_of

# Names under which processors and tokenizers have the tokens of media.
MEDIA_TOKENS = (
    "image_token", "video_token", "vision_start_token", "vision_end_token", "start_image_token", "end_image_token",
    "boi_token", "eoi_token", "fake_image_token", "global_image_token", "vision_bos_token", "vision_eos_token",
    "audio_token", "audio_bos_token", "audio_eos_token",
)  # fmt: skip


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
    builder: "PromptBuilder | None" = field(default=None, repr=False)
    resized: bool = False  # pictures are resized by the model's processor; False: taken as they come
    positions: Tensor | None = None  # (3, P) or (P,) int64 as the model counts, once they were asked for
    frame_times: list[tuple[float, float]] = field(default_factory=list)  # F spans (first, last sample) in seconds

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def clips(self) -> tuple[Clip, ...]:
        """The sampled frames of each video, for rollout engines and pages: decoded again, since none are kept."""
        return tuple(self.builder.clips(self.record)) if self.builder else ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images at the size in which the model sees them, read again."""
        pictures = self.builder.images(self.record) if self.builder else []
        return tuple(Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the prompt's tensors take."""
        tensors = [self.input_ids, self.frame_ids, *self.vision.values()]
        return sum(t.nbytes for t in tensors + ([] if self.token_types is None else [self.token_types]))

    def labelled_frames(self) -> list[int]:
        """Frames sampled within the time spans [start, end) that the record says decide; empty where it has none.

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
    """Decodes and tokenises records, and keeps the latest prompts up to ``config.prompt_cache_gib``.

    It can do so ahead of time in a thread of its own, which waits while prompts that nobody has taken yet fill the
    cache. Prompts are known by `Record.key`, never by id alone. ask: the text beside a record's media, where it is not
    that of training.
    """

    def __init__(
        self, processor: Any, model_config: Any, config: APPOConfig, *, ask: Callable[[Record], str] | None = None
    ) -> None:
        self.processor, self.model_config, self.config, self._ask = processor, model_config, config, ask
        self._limit = int(config.prompt_cache_gib * 2**30)
        self._clips = None
        if config.frame_cache is not None:
            self._clips = ClipCache(config.frame_cache, limit=config.frame_cache_gib * GIB)
        self._prompts: OrderedDict[Any, Future[Prompt]] = OrderedDict()  # an error is raised when asked for
        self._waiting: deque[Record] = deque()
        self._sizes: dict[Any, int] = {}  # bytes of those that are done
        self._untaken: set[Any] = set()
        self._lock = threading.RLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self.layout = layout_of(model_config)
        self.sizes = self.layout.sizes(processor)

    def __call__(self, record: Record) -> Prompt:
        """The prompt of ``record``. Raises DataError naming it where it cannot be built."""
        key = record.key
        with self._lock:
            future = self._prompts.get(key) or self._start(key, record)
            self._prompts.move_to_end(key)
        try:
            prompt = future.result()
        finally:
            with self._lock:
                self._untaken.discard(key)
                self._make_room()
                self._go_on()
        # Records of one key may differ in what they are counted under (``task``).
        return prompt if prompt.record is record else replace(prompt, record=record)

    def prefetch(self, records: Iterable[Record]) -> None:
        """Start on ``records`` in the background, in order."""
        with self._lock:
            self._waiting = deque(records)
            keys = [record.key for record in self._waiting]
            # Only what is asked for now is held for its taker: what an earlier call asked for may never be taken.
            self._untaken = {key for key in keys if key in self._prompts}
            for key in keys:
                if key in self._prompts:
                    self._prompts.move_to_end(key)
            self._make_room()
            self._go_on()

    def clips(self, record: Record) -> list[Clip]:
        """The sampled frames of a record's videos, as the model sees them; decoded again, since none are kept."""
        reading = self.config.clip_arguments() | self._reading(self.sizes.pixels) | {"cache": self._clips}
        return [load_clip(medium, record, **reading) for medium in record.media if medium.kind == "video"]

    def images(self, record: Record) -> list[Tensor]:
        """A record's images, (3, H, W) uint8 each, as the model sees them."""
        size = self._reading(self.sizes.image_pixels)
        return [load_image(medium, record, **size) for medium in record.media if medium.kind == "image"]

    def _reading(self, pixels: int) -> dict[str, int]:
        return {"max_pixels": max(self.config.max_pixels, pixels), "factor": self.sizes.factor}

    @property
    def held_bytes(self) -> int:
        """Bytes of all prompts that are kept."""
        return sum(self._sizes.values())

    def _start(self, key: Any, record: Record) -> "Future[Prompt]":
        future = self._thread.submit(self._build, record)
        self._prompts[key] = future
        self._untaken.add(key)
        future.add_done_callback(lambda done: self._done(key, done))
        return future

    def _done(self, key: Any, future: "Future[Prompt]") -> None:
        with self._lock:
            if self._prompts.get(key) is future:
                failed = future.cancelled() or future.exception() is not None
                self._sizes[key] = 4096 if failed else future.result().nbytes
            self._make_room()
            self._go_on()

    def _go_on(self) -> None:
        """Start the next record that waits, one at a time, unless what nobody has taken fills the cache."""
        if any(not future.done() for future in self._prompts.values()):
            return
        while self._waiting:
            if sum(self._sizes.get(key, 0) for key in self._untaken) >= self._limit:
                return
            record = self._waiting.popleft()
            if record.key not in self._prompts:
                self._start(record.key, record)
                return

    def _make_room(self) -> None:
        """Drop what was used longest ago, and nothing that is still to be taken."""
        total = sum(self._sizes.values())
        for key in [key for key in self._prompts if key in self._sizes and key not in self._untaken]:
            if total <= self._limit:
                return
            total -= self._sizes.pop(key)
            del self._prompts[key]

    def _build(self, record: Record) -> Prompt:
        if record.kind in ("numerical", "math") and record.answer and not reads(record.answer):
            raise DataError(f"{record.place}: `answer`: expected a number or expression, got {record.answer!r}.")
        images, clips = self.images(record), self.clips(record)
        check_spans(record, [clip.duration for clip in clips])
        asked = None if self._ask is None else self._ask(record)
        messages = prompt_messages(record, instructions=self.config.instructions, text=asked)
        self._check_text(record, messages)
        videos = [video_of(clip) for clip in clips]
        try:
            encoded = self.layout.encode(self.processor, self.model_config, messages, images, videos)
        except LayoutError as error:
            raise DataError(f"{record.place}: {error}") from error
        return Prompt(
            record=record,
            input_ids=encoded.input_ids,
            token_types=encoded.token_types,
            vision=encoded.vision,
            frame_ids=encoded.frame_ids,
            num_frames=encoded.num_frames,
            text=encoded.text,
            builder=self,
            resized=self.sizes.pixels > 0,
            frame_times=frame_times(clips, self.sizes.merged),
        )

    def _check_text(self, record: Record, messages: Sequence[dict[str, Any]]) -> None:
        """Refuse the processor's own placeholders in a question: they would be taken for images or frames."""
        found = [
            getattr(part, name, None) for part in (self.processor, self.processor.tokenizer) for name in MEDIA_TOKENS
        ]
        tokens = dict.fromkeys(token for token in found if isinstance(token, str))
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        for token in tokens:
            if token and any(token in text for text in texts):
                raise DataError(
                    f"{record.place}: `question`: expected text, got the model's own token {token!r} in it."
                )
