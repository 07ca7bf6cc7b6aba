"""The process in which videos are decoded: ``read_video`` starts it, sends requests to stdin and reads
results from stdout.

A decoder that hangs or crashes takes this process with it and not the training. It is run as a script, so
that it imports a decoder and numpy only and starts in a fraction of a second. Requests and results are
pickles; every result is one of

    ("ok", frames (T, H, W, 3) uint8, seconds (T,) float64, source_fps, duration)
    ("missing", "ImportError: ...")       the decoder is not installed
    ("failed", "DECORDError: ...")        the decoder could not read the file
"""

import importlib
import os
import pickle
import sys
from typing import Any

import numpy as np


def sample_indices(num_frames: int, duration: float, fps: float, max_frames: int, min_frames: int) -> np.ndarray:
    """Indices of an even number of frames spread over the whole clip, about ``fps`` a second.

    Frame i of n stands for the i-th of n equal parts of the clip and is that part's first frame. A clip with
    fewer than two frames gives its only frame twice, since the models merge frames in pairs.
    """
    wanted = min(max(round(duration * fps), min_frames), max_frames, num_frames)
    count = max(wanted - wanted % 2, 2)
    return np.minimum(np.arange(count) * num_frames // count, num_frames - 1)


def decode_decord(path: str, fps: float, max_frames: int, min_frames: int) -> tuple[Any, ...]:
    decord = importlib.import_module("decord")
    reader = decord.VideoReader(path, num_threads=1)
    if len(reader) == 0:
        raise ValueError("no frames")
    spans = np.asarray(reader.get_frame_timestamp(list(range(len(reader)))), np.float64).reshape(-1, 2)
    start, duration = float(spans[0, 0]), float(spans[:, 1].max() - spans[0, 0])
    if duration <= 0:  # some containers give no durations
        duration = len(reader) / float(reader.get_avg_fps())
    indices = sample_indices(len(reader), duration, fps, max_frames, min_frames)
    frames = reader.get_batch(indices.tolist()).asnumpy()
    return frames, spans[indices, 0] - start, len(reader) / duration, duration


def decode_pyav(path: str, fps: float, max_frames: int, min_frames: int) -> tuple[Any, ...]:
    av = importlib.import_module("av")
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        if not packets:
            raise ValueError("no frames")
        order = sorted(packets, key=lambda p: p.pts)
        times = np.array([p.pts for p in order], np.int64)
        keyframes = np.array([p.pts for p in order if p.is_keyframe], np.int64)
        base = float(stream.time_base)
        duration = float(max(p.pts + (p.duration or 0) for p in order) - times[0]) * base
        if duration <= 0:
            duration = len(times) / float(stream.average_rate or 1)
        indices = sample_indices(len(times), duration, fps, max_frames, min_frames)
        frames = dict(_decode_at(container, stream, sorted(set(times[indices].tolist())), times[0], keyframes))
    missing = [i for i in indices.tolist() if int(times[i]) not in frames]
    if missing:
        raise ValueError(f"frames {missing[:4]} of {len(times)} could not be decoded")
    picked = np.stack([frames[int(times[i])] for i in indices])
    return picked, (times[indices] - times[0]) * base, len(times) / duration, duration


def _decode_at(container: Any, stream: Any, wanted: list[int], first: int, keyframes: np.ndarray) -> Any:
    """Yields (pts, (H, W, 3)) of the wanted times, seeking only where that skips whole groups of pictures."""
    stream.thread_type = "NONE"
    container.seek(int(first), stream=stream)
    position, queue = int(first), list(wanted)
    while queue:
        skipped = keyframes[(keyframes > position) & (keyframes <= queue[0])]
        if len(skipped):
            container.seek(int(skipped[-1]), stream=stream)
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < queue[0]:
                continue
            position = frame.pts
            if frame.pts == queue[0]:
                yield frame.pts, frame.to_ndarray(format="rgb24")
            queue = [pts for pts in queue if pts > position]
            if not queue or ((keyframes > position) & (keyframes <= queue[0])).any():
                break
        else:
            return


DECODERS = {"decord": decode_decord, "pyav": decode_pyav}


def answer(decoder: str, path: str, *sampling: Any) -> tuple[Any, ...]:
    try:
        return "ok", *DECODERS[decoder](path, *sampling)
    except ImportError as error:
        return "missing", f"{type(error).__name__}: {error}"
    except Exception as error:  # every decoder has exceptions of its own; the parent raises VideoError with this text
        return (
            "failed",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no text'}",
        )


def main() -> None:
    # Decoders print to stdout; results have a descriptor of their own.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(*request), results, protocol=5)
        results.flush()


if __name__ == "__main__":
    main()
