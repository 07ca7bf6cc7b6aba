"""The definition of attention and frame mass: dense, in the dtype of its inputs, differentiated by autograd."""

import math

import torch
from torch import Tensor


def visible_keys(
    query: Tensor, keys: int, first_key: Tensor | None, last_key: Tensor | None, prefix_keys: Tensor | None
) -> Tensor:
    """(B, 1, R, S) bool: whether first_key <= v <= last_key, or v < prefix_keys."""
    batch, _, rows, _ = query.shape
    v = torch.arange(keys, device=query.device)
    seen = torch.ones(batch, rows, keys, dtype=torch.bool, device=query.device)
    if first_key is not None:
        seen = seen & (v >= first_key[..., None])
    if last_key is not None:
        seen = seen & (v <= last_key[..., None])
    if prefix_keys is not None:
        seen = seen | (v < prefix_keys[..., None])
    return seen[:, None]


def attention_matrix(query: Tensor, key: Tensor, seen: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Probabilities (B, Hq, R, S) and their log-sum-exp (B, Hq, R): all 0 and -inf in a row that sees no key."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    any_seen = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(any_seen & ~seen, -math.inf)  # a row of -inf alone would have no softmax
    probabilities = torch.where(any_seen, scores.softmax(-1), 0)
    lse = torch.where(any_seen.squeeze(-1), scores.logsumexp(-1), -math.inf)
    return probabilities, lse


def mass_of(probabilities: Tensor, frame_ids: Tensor, num_frames: int, reduction: str) -> Tensor:
    """(B, Hq, R, S) -> (B, Hq, R, F): sum or mean over the keys of each frame."""
    frames = torch.arange(num_frames, device=frame_ids.device)
    in_frame = (frame_ids[..., None] == frames).to(probabilities)  # (B, S, F)
    mass = probabilities @ in_frame[:, None]
    return mass / in_frame.sum(1).clamp(min=1)[:, None, None] if reduction == "mean" else mass
