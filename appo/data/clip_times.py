"""Clips as processors take them: when each of their frames was."""

from collections.abc import Sequence
from typing import Any

from appo.data.video import Clip
from appo.models.layout import Video

TICKS = 1000.0  # per second: the clock of the times below


def metadata_of(clip: Clip) -> Any:
    """Metadata that processors turn into timestamps and second-per-grid values: the true time of each sampled frame.

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


def video_of(clip: Clip) -> Video:
    """A clip as layouts take it."""
    return Video(clip.frames, metadata_of(clip), (clip.end - clip.start) / len(clip.timestamps))


def frame_times(clips: Sequence[Clip], temporal_patch: int) -> list[tuple[float, float]]:
    """First and last time of each frame of the model, which ``temporal_patch`` sampled frames become, in seconds."""
    times = []
    for clip in clips:
        stamps = clip.timestamps.tolist()
        times += [
            (stamps[i], stamps[min(i + temporal_patch, len(stamps)) - 1]) for i in range(0, len(stamps), temporal_patch)
        ]
    return times
