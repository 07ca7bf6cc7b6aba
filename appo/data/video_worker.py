"""The process in which videos are decoded: ``read_video`` starts it, sends requests to stdin and reads results.

A decoder that hangs or crashes takes this process with it and not the training. It imports a decoder, numpy and Pillow
only, so it starts in a fraction of a second. Requests and results are pickles; every result is one of

    ("ok", frames (T, H, W, 3) uint8, seconds (T,) float64, source_fps, duration)
    ("missing", "ImportError: ...")       the decoder is not installed
    ("refused", "ends early: ...", "Fetch it again ...")   the file is known to be unusable, whatever the decoder
    ("failed", "InvalidDataError: ...")   the decoder could not read the file
"""

from typing import Any

from appo.data.video_decoders import DECODERS
from appo.data.video_timeline import RefusedError, Sampling
from appo.data.worker import serve


def answer(decoder: str, path: str, sampling: Sampling) -> tuple[Any, ...]:
    try:
        return "ok", *DECODERS[decoder](path, sampling)
    except ImportError as error:
        return "missing", f"{type(error).__name__}: {error}"
    except RefusedError as error:
        return "refused", str(error), error.remedy
    except Exception as error:  # every decoder has exceptions of its own; the parent raises VideoError with this text
        lines = str(error).strip().splitlines()
        return "failed", f"{type(error).__name__}: {lines[0] if lines else 'no text'}"


def main() -> None:
    serve(answer)
