"""Inputs shared by the tests of frame_mass and frame_attention: hostile frame layouts and visibilities."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo_kernels.ops.frame_mass.reference import visible_keys

FRAMES = 6
LAYOUTS = ("equal", "unequal", "interleaved", "shuffled", "scattered", "none")
VISIBILITIES = ("all", "causal", "left padding", "packed", "shared prefix", "blind rows")


class Case(NamedTuple):
    query: Tensor  # (B, Hq, R, d)
    key: Tensor  # (B, Hkv, S, d)
    value: Tensor
    frame_ids: Tensor  # (B, S)
    bounds: dict[str, Tensor]  # first_key, last_key, prefix_keys (B, R)

    def to(self, dtype: torch.dtype) -> "Case":
        """Leaves of their own, so that each implementation gets its own gradients."""
        tensors = (t.detach().to(dtype).requires_grad_() for t in self[:3])
        return Case(*tensors, self.frame_ids, self.bounds)

    def seen(self) -> Tensor:
        """(B, 1, R, S) bool."""
        bounds = (self.bounds.get(name) for name in ("first_key", "last_key", "prefix_keys"))
        return visible_keys(self.query, self.key.shape[2], *bounds)


def frames(layout: str, batch: int, keys: int) -> Tensor:
    """(B, S) frame ids below FRAMES; frame 2 has no key in "unequal" and "scattered"."""
    generator = torch.Generator().manual_seed(len(layout))
    ids = torch.full((batch, keys), -1)
    if layout == "equal":  # as Qwen2.5-VL: one run, text around it
        length = (keys - 4) // FRAMES
        ids[:, 2 : 2 + FRAMES * length] = torch.arange(FRAMES).repeat_interleave(length)
    elif layout == "unequal":  # another start in each sequence
        for b in range(batch):
            lengths = [3, 1, 0, 17, 2, 9]
            run = torch.repeat_interleave(torch.arange(FRAMES), torch.tensor(lengths))[: keys - b]
            ids[b, b : b + len(run)] = run
    elif layout == "interleaved":  # as Qwen3-VL: timestamps between frames
        place = torch.arange(keys)
        ids[:] = torch.where(place % 9 < 6, place // 9, -1)
        ids[ids >= FRAMES] = -1
    elif layout == "shuffled":  # frame numbers not in key order, no text at all
        ids[:] = torch.randperm(FRAMES, generator=generator).repeat_interleave(-(-keys // FRAMES))[:keys]
    elif layout == "scattered":
        ids = torch.randint(-1, FRAMES, (batch, keys), generator=generator)
        ids[ids == 2] = -1
    return ids


def bounds(kind: str, batch: int, rows: int, keys: int) -> dict[str, Tensor]:
    """Visibility of the last ``rows`` positions (of all keys, repeated, where there are more rows than keys)."""
    generator = torch.Generator().manual_seed(len(kind))
    place = (torch.arange(rows) + max(0, keys - rows)).clamp(max=keys - 1).expand(batch, -1)
    if kind == "all":
        return {}
    if kind == "causal":
        return {"last_key": place}
    if kind == "left padding":
        padding = torch.arange(batch)[:, None] * 5 - 3  # negative: starts before the sequence, as a window does
        return {"first_key": padding.expand_as(place), "last_key": place}
    if kind == "packed":
        return {"first_key": place // 7 * 7, "last_key": place}
    if kind == "shared prefix":  # responses behind one prompt; some intervals overlap it
        prefix = torch.randint(0, keys + 1, (batch, rows), generator=generator)
        return {"first_key": place // 7 * 7, "last_key": place, "prefix_keys": prefix}
    first = torch.randint(0, keys, (batch, rows), generator=generator)
    last = torch.randint(-1, keys, (batch, rows), generator=generator)
    last[:, ::3] = -1  # every third row sees nothing, and others where first > last
    return {"first_key": first, "last_key": last}


def case(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (7, 1),
    rows: int = 13,
    keys: int = 63,
    head_dim: int = 32,
    layout: str = "equal",
    visibility: str = "causal",
    device: str = "cpu",
    strided: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(rows * keys)

    def random(heads: int, length: int) -> Tensor:
        if strided:  # heads next to each other and a padded last dimension, as a fused projection leaves them
            wide = torch.randn(batch, length, heads, head_dim + 8, generator=generator)
            return wide[..., :head_dim].transpose(1, 2).to(device)
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(device)

    tensors = random(heads[0], rows), random(heads[1], keys), random(heads[1], keys)
    limits = {name: bound.to(device) for name, bound in bounds(visibility, batch, rows, keys).items()}
    return Case(*tensors, frames(layout, batch, keys).to(device), limits)


def leaves(example: Case, tensors: str) -> list[Tensor]:
    return [getattr(example, {"q": "query", "k": "key", "v": "value"}[name]) for name in tensors]


def small_tiles(monkeypatch: Any, keys: int = 20, rows: int = 17) -> None:
    """So that the small cases take several tiles of rows and of keys, with remainders, and frames cut in two."""
    from appo_kernels.attention import torch_passes as attention
    from appo_kernels.ops.frame_mass import streaming as mass

    for module in (attention, mass):
        monkeypatch.setattr(module, "MAX_KEYS", keys)
        monkeypatch.setattr(module, "TILE_SCORES", keys * rows)
    monkeypatch.setattr(mass, "MIN_KEYS", 1)
