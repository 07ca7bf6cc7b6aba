"""The video frame of each token of a prompt.

A frame is one step of the vision tower's temporal grid (docs/method.md section 2): with a temporal patch of 2 it
stands for two sampled video frames. ``video_grid_thw``, as processors return it, has one row (t, h, w) per video, in
patches; the video then takes t frames of h * w / merge_size**2 tokens each.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks

OP = "frame_ids"
# Families whose prompts have timestamps between the frames of a video, so that each run of video tokens is a frame.
FRAMES_APART = ("qwen3vl", "qwen35", "gemma4", "videollama3")
# Families whose frames are image tokens, each a run of its own, between the marks of a video.
FRAMES_BETWEEN_MARKS = ("glm4v", "glm46v")
# Families that show video frames as images, one run of image tokens each.
FRAMES_AS_IMAGES = ("internvl", "smolvlm", "gemma3")

# Families whose videos are runs of frames with the same number of tokens each, and a line break.
FRAMES_OF_ONE_SIZE = ("llavaonevision",)


class FrameIds(NamedTuple):
    """The frame of every token, as ``record_frame_mass`` and ``frame_mass`` take it."""

    ids: Tensor  # (B, S) int32: frame of each token, counted within its sequence; -1 for tokens of no frame
    num_frames: Tensor  # (B,) int64: frames of each sequence


def frame_ids(input_ids: Tensor, config_or_processor: Any, *, video_grid_thw: Tensor | None = None) -> FrameIds:
    """Frame of each token of ``input_ids``: Qwen-VL and GLM-4V families, InternVL, LLaVA-OneVision, SmolVLM.

    Frames are numbered 0, 1, 2, ... in order of appearance, on through all videos of a sequence, and from 0 in each
    sequence. Text, timestamps, vision start and end markers, padding and **images** have frame -1 (an image beside a
    video is no moment of it). InternVL and SmolVLM show video frames as images: there every run of image tokens is a
    frame, and an image beside a video (SmolVLM: each tile of it) cannot be told from one.

    Args:
        input_ids: (B, S) int32 or int64 token ids, padded on either side.
        config_or_processor: the model's config (``video_token_id`` and ``vision_config.spatial_merge_size``) or its
            processor (``video_token_id`` and ``video_processor.merge_size``); InternVL, SmolVLM: ``image_token_id``.
        video_grid_thw: (number of videos in the batch, 3) int, the grids of the batch's videos in order: what the
            processor returned and the model is given. One row per frame, t = 1, does as well. May be left out for
            Qwen3-VL and its relatives, whose frames are runs of video tokens between timestamps, and for text alone;
            must be None for InternVL, LLaVA-OneVision and SmolVLM.

    Returns:
        ``FrameIds(ids (B, S) int32, num_frames (B,) int64)`` on the device of ``input_ids``.

    Raises:
        ValueError: what is missing in the config or processor; grids that do not account exactly for the video tokens
            found, or whose frames would straddle a gap, naming the row of ``video_grid_thw``.
    """
    checks.rank(OP, "input_ids", input_ids, 2, "(B, S)")
    checks.dtype(OP, "input_ids", input_ids, checks.INTS)
    if _is_of(config_or_processor, FRAMES_BETWEEN_MARKS):
        return _from_runs(_between_marks(input_ids, config_or_processor))
    shown_as_images = _is_of(config_or_processor, FRAMES_AS_IMAGES)
    is_video = input_ids == (_image_token_id if shown_as_images else _video_token_id)(config_or_processor)
    of_one_size = _is_of(config_or_processor, FRAMES_OF_ONE_SIZE)
    if video_grid_thw is not None and (shown_as_images or of_one_size):
        checks.fail(OP, "video_grid_thw", f"None for {_name(config_or_processor)}", "a tensor", "Leave it out.")
    if video_grid_thw is not None:
        return _from_grids(is_video, video_grid_thw, _merge_size(config_or_processor))
    if of_one_size:
        return _from_lengths(is_video, _tokens_per_frame(config_or_processor))
    if shown_as_images or _is_of(config_or_processor, FRAMES_APART) or not bool(is_video.any()):
        return _from_runs(is_video)
    checks.fail(
        OP,
        "video_grid_thw",
        f"the grids of the videos ({_name(config_or_processor)} may put all frames of a video into one run of tokens)",
        None,
        'Pass the `video_grid_thw` that the processor returned, or the config of a model with timestamps ("qwen3_vl").',
    )


def _between_marks(input_ids: Tensor, source: Any) -> Tensor:
    """(B, S) bool: image tokens behind a mark that begins a video and before the one that ends it."""
    field = "video_{}_token_id" if hasattr(source, "model_type") else "video_{}_id"  # of a config, of a processor
    begun, ended = (input_ids == _token_id(source, field.format(name)) for name in ("start", "end"))
    return (input_ids == _token_id(source, "image_token_id")) & (begun.cumsum(1) > ended.cumsum(1))


def _from_runs(is_video: Tensor) -> FrameIds:
    """Every run of video tokens is a frame."""
    before = torch.nn.functional.pad(is_video, (1, 0))[:, :-1]
    count = (is_video & ~before).cumsum(1)  # (B, S): runs begun so far
    return FrameIds(torch.where(is_video, count - 1, -1).int(), count[:, -1] if count.shape[1] else count.sum(1))


def _from_lengths(is_video: Tensor, size: int) -> FrameIds:
    """Every run of video tokens is a video: frames of ``size`` tokens each, and one token behind the last."""
    ids, num_frames = torch.full(is_video.shape, -1, dtype=torch.int32), torch.zeros(len(is_video), dtype=torch.int64)
    for sequence, mask in enumerate(is_video.cpu()):
        steps = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
        begins, ends = (steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist()
        frame = 0
        for begin, end in zip(begins, ends, strict=True):
            count, left = divmod(end - 1 - begin, size)
            if left or not count:
                checks.fail(
                    OP,
                    "input_ids",
                    f"videos set apart by text, each of frames of {size} tokens and a line break",
                    f"{end - begin} video tokens in a row at token {begin} of sequence {sequence}",
                    "Pass prompts that are not truncated, as the model's chat template writes them.",
                )
            numbers = torch.arange(frame, frame + count, dtype=torch.int32)
            ids[sequence, begin : end - 1] = numbers.repeat_interleave(size)
            frame += count
        num_frames[sequence] = frame
    return FrameIds(ids.to(is_video.device), num_frames.to(is_video.device))


def _from_grids(is_video: Tensor, video_grid_thw: Tensor, merge_size: int) -> FrameIds:
    """Deals the rows of ``video_grid_thw`` out to the sequences, in order, each to exactly the tokens it describes."""
    if video_grid_thw.dim() != 2 or video_grid_thw.shape[1] != 3:
        checks.fail(
            OP,
            "video_grid_thw",
            "shape (number of videos, 3)",
            f"shape {tuple(video_grid_thw.shape)}",
            "Pass the tensor that the processor returned.",
        )
    grids: list[list[int]] = video_grid_thw.tolist()
    ids = torch.full(is_video.shape, -1, dtype=torch.int32)
    num_frames = torch.zeros(is_video.shape[0], dtype=torch.int64)
    row = 0
    for sequence, mask in enumerate(is_video.cpu()):
        positions = mask.nonzero().squeeze(1)  # of the sequence's video tokens
        start = frame = 0
        while start < len(positions):
            steps, size = _frames_of(grids, row, merge_size, sequence, len(positions) - start)
            frames = positions[start : start + steps * size].view(steps, size)
            gaps = frames[:, -1] - frames[:, 0] != size - 1
            if gaps.any():
                at = int(gaps.nonzero()[0])
                checks.fail(
                    OP,
                    "video_grid_thw",
                    f"row {row} {tuple(grids[row])} to give frames of {size} adjacent video tokens",
                    f"a gap within tokens {int(frames[at, 0])} to {int(frames[at, -1])} of sequence {sequence}",
                    "Pass the grids in the order in which the videos stand in the batch.",
                )
            ids[sequence, frames] = torch.arange(frame, frame + steps, dtype=torch.int32)[:, None]
            start, frame, row = start + steps * size, frame + steps, row + 1
        num_frames[sequence] = frame
    if row < len(grids):
        checks.fail(
            OP,
            "video_grid_thw",
            f"{row} rows, which account for all video tokens of the batch",
            f"{len(grids)} rows: row {row} {tuple(grids[row])} has no tokens",
            "Pass only the grids of the videos in `input_ids`, in order.",
        )
    return FrameIds(ids.to(is_video.device), num_frames.to(is_video.device))


def _frames_of(grids: list[list[int]], row: int, merge_size: int, sequence: int, left: int) -> tuple[int, int]:
    """(frames, tokens per frame) of one row, which must fit into the ``left`` video tokens of the sequence."""
    if row == len(grids):
        checks.fail(
            OP,
            "video_grid_thw",
            f"a row {row} for the remaining {left} video tokens of sequence {sequence}",
            f"{len(grids)} rows",
            "Pass one row per video of the whole batch (repeat them where prompts are repeated).",
        )
    steps, height, width = grids[row]
    size = (height // merge_size) * (width // merge_size)
    if min(steps, size, height, width) < 1 or height % merge_size or width % merge_size:
        checks.fail(
            OP,
            "video_grid_thw",
            f"row {row} to have t >= 1 and h, w positive multiples of the merge size {merge_size}",
            tuple(grids[row]),
            "Grids count patches before merging; pass those that the processor returned.",
        )
    if steps * size > left:
        checks.fail(
            OP,
            "video_grid_thw",
            f"row {row} {tuple(grids[row])}, {steps} x {size} tokens, to fit the video tokens of sequence {sequence}",
            f"{left} video tokens that no earlier row accounts for",
            "Pass the grids in the order of the videos, and prompts that are not truncated.",
        )
    return steps, size


def _name(source: Any) -> str:
    return getattr(source, "model_type", None) or type(source).__name__


def _is_of(source: Any, families: tuple[str, ...]) -> bool:
    """By model type of a config ("qwen3_vl_moe") or class name of a processor ("Qwen3VLProcessor")."""
    return _name(source).lower().replace("_", "").startswith(families)


def _video_token_id(source: Any) -> int:
    return _token_id(source, "video_token_id")


def _image_token_id(source: Any) -> int:
    """The id that stands for pixels: to Gemma 3's processor ``image_token_id`` is the mark before them."""
    return _token_id(source.tokenizer if _is_of(source, ("gemma3processor",)) else source, "image_token_id")


def _token_id(source: Any, field: str) -> int:
    token = getattr(source, field, None)
    if not isinstance(token, int):
        checks.fail(
            OP,
            "config_or_processor",
            f"a config or processor with `{field}`",
            f"{_name(source)}, which has none",
            "Pass `model.config` (not its text_config) or the processor of a video model.",
        )
    return token


def _tokens_per_frame(source: Any) -> int:
    """Of LLaVA-OneVision: its tower's patches, pooled 2 x 2."""
    tower = getattr(source, "vision_config", None)
    known = getattr(source, "num_image_tokens", None)  # of a processor
    side = tower.image_size // tower.patch_size if tower is not None else math.isqrt(known or 0)
    if side < 1:
        checks.fail(
            OP,
            "config_or_processor",
            "a config with `vision_config` or a processor with `num_image_tokens`",
            f"{_name(source)}, which has neither",
            "Pass `model.config` or the processor of a LLaVA-OneVision.",
        )
    return math.ceil(side / 2) ** 2


def _merge_size(source: Any) -> int:
    for part, field in (("vision_config", "spatial_merge_size"), ("video_processor", "merge_size")):
        size = getattr(getattr(source, part, None), field, None)
        if isinstance(size, int):
            return size
    checks.fail(
        OP,
        "config_or_processor",
        "a config with `vision_config.spatial_merge_size` or a processor with `video_processor.merge_size`",
        f"{_name(source)}, which has neither",
        "Pass `model.config` or the processor of a video model of the Qwen-VL family.",
    )
