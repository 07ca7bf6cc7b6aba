"""Requests to vLLM for a prompt, in this process or over HTTP, and completions out of its answers."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from appo.data.clip_times import metadata_of
from appo.data.prompts import Prompt
from appo.data.video import Clip
from appo.rollout.engine import Completion, Sampling

SEEDS = 1 << 31  # vLLM adds the number of a response to the seed, and some samplers take 32 bits


class EngineError(RuntimeError):
    """A rollout engine that cannot do its work: the message names the server, what happened and what to do."""


def request_of(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    suppressed: Sequence[int],
    end_ids: Sequence[int],
) -> bytes:
    """A safetensors message: frames (T, H, W, 3) uint8 and images (H, W, 3) as tensors, the rest in its header."""
    tensors: dict[str, Any] = {}
    described = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        media, processor = media_of(prompt)
        videos, images = list[dict[str, Any]](), list[str]()
        for frames, metadata in media.get("video", []):
            videos.append({"name": f"video-{index}-{len(videos)}", "metadata": metadata})
            tensors[videos[-1]["name"]] = frames
        for image in media.get("image", []):
            images.append(f"image-{index}-{len(images)}")
            tensors[images[-1]] = np.asarray(image)
        described.append(
            {
                "text": prompt.text,
                "token_ids": prompt.input_ids.tolist(),
                "videos": videos,
                "images": images,
                "processor": processor,
                "seed": seed % SEEDS,
            }
        )
    request = {
        "prompts": described,
        "group_size": sampling.group_size,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "suppressed": list(suppressed),
        "end_ids": list(end_ids),
    }
    tensors.setdefault("none", np.zeros(1, np.uint8))  # a message has at least one tensor
    return save(tensors, metadata={"request": json.dumps(request)})


def frames_of(clip: Clip) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    return np.ascontiguousarray(clip.frames.permute(0, 2, 3, 1).numpy())


def media_of(prompt: Prompt) -> tuple[dict[str, Any], dict[str, Any]]:
    """vLLM's multi-modal data of a prompt, empty without media, and the processor's arguments for it."""
    clips, images = prompt.clips, prompt.images  # decoded now
    media: dict[str, Any] = {}
    if clips:
        media["video"] = [(frames_of(clip), video_metadata(clip)) for clip in clips]
    if images:
        media["image"] = list(images)
    return media, {"do_resize": False} if media and not prompt.resized else {}


def sampling_arguments(
    sampling: Sampling, seed: int, *, suppressed: Sequence[int], end_ids: Sequence[int]
) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``."""
    return {
        "n": sampling.group_size,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed % SEEDS,
        "logprobs": 0,  # of the sampled token alone
        "logit_bias": dict.fromkeys(suppressed, -100.0),
        "stop_token_ids": list(end_ids),
        "detokenize": False,
    }


def video_metadata(clip: Clip) -> dict[str, Any]:
    """The metadata in vLLM's video input of frames sampled already (keys as in `transformers.VideoMetadata`)."""
    found = metadata_of(clip)
    return {
        "total_num_frames": found.total_num_frames,
        "fps": found.fps,
        "duration": found.duration,
        "frames_indices": list(found.frames_indices),
        "video_backend": "pyav",
        "do_sample_frames": False,
    }


def check_prompt(read: Sequence[int], prompt: Prompt, url: str) -> None:
    """Raise EngineError unless a server read the prompt as the trainer does."""
    ours = prompt.input_ids.tolist()
    if list(read) != ours:
        place = next((i for i, (a, b) in enumerate(zip(read, ours, strict=False)) if a != b), min(len(read), len(ours)))
        raise EngineError(
            f"vLLM server {url}: reads {prompt.record.place} as {len(read)} tokens, the trainer as {len(ours)}; they "
            f"part at token {place}. See `appo parity`."
        )


def completion_of(found: dict[str, Any], version: int) -> Completion:
    logprobs = [float("nan") if value is None else value for value in found["logprobs"]]
    return Completion(
        torch.tensor(found["ids"], dtype=torch.int64),
        torch.tensor(logprobs, dtype=torch.float32),
        found["finish_reason"],
        version,
    )
