"""Measures of what responses look at: how much of their attention is on the video, in which part, on which frames.

Attention on a video decays along a response in many models; these numbers tell whether training changes that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from appo.config import APPOConfig
from appo.recording.heads import record_head_mass
from appo.train.groups import Group, batch_parts, whole_groups
from appo.train.logs import Meter
from appo.train.policy import Policy

PARTS = 4


@dataclass(frozen=True)
class HeadShares:
    """The share of each head's attention on a video while a group of responses is written.

    L layers, Hq query heads, F frames.

    layers: numbers of the L layers. mass: (L, Hq, F) fp32, the share of attention on each frame, mean over tokens.
    labelled: the frames that decide the question, where known. sizes: (F,) fp32, tokens of each frame.
    """

    layers: list[int]
    mass: Tensor
    labelled: list[int]
    sizes: Tensor

    @property
    def video(self) -> Tensor:
        """(L, Hq) fp32: the share of attention on the video."""
        return self.mass.sum(-1)

    @property
    def labelled_share(self) -> Tensor | None:
        """(L, Hq) fp32: of what is on the video, the share on the frames that decide; None where they are not known."""
        if not self.labelled:
            return None
        return self.mass[..., self.labelled].sum(-1) / self.video.clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def chance(self) -> float:
        """The share of the video's tokens that are of the frames that decide: ``labelled_share`` by chance."""
        return float(self.sizes[self.labelled].sum() / self.sizes.sum())

    def as_json(self) -> dict[str, Any]:
        """A line of heads.jsonl: L ``layers``; ``video``, ``labelled_share`` (or null), L lists of Hq; ``chance``."""
        known = self.labelled_share is not None
        return {
            "layers": self.layers,
            "video": _rounded(self.video),
            "labelled_share": None if self.labelled_share is None else _rounded(self.labelled_share),
            "chance": self.chance if known else None,
        }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def measure_looking(meter: Meter, group: Group) -> None:
    """Shares of attention of a group whose frame mass was recorded, each a mean over tokens.

    mass/frames: the share on frames at all; mass/quarter_1 to 4: the same in the quarters of each response.
    mass/labelled: of what is on frames, the share on those that decide the question (where they are known);
    mass/labelled_chance: the share of the video's tokens that are theirs, which attention spread evenly would give.
    """
    mass, mask = frame_shares(group), group.mask  # (G, N, F), (G, N)
    looked = mass.sum(-1)
    meter.add("mass/frames", looked[mask].mean(), group.tokens)
    parts = quarters(mask)
    for part in range(PARTS):
        chosen = parts == part
        meter.add(f"mass/quarter_{part + 1}", looked[chosen].mean(), int(chosen.sum()))
    labelled = group.prompt.labelled_frames()
    seen = mask & (looked > 0)
    if labelled and seen.any():
        sizes = frame_sizes(group)
        share = mass[..., labelled].sum(-1)[seen] / looked[seen]
        meter.add("mass/labelled", share.mean(), int(seen.sum()))
        meter.add("mass/labelled_chance", sizes[labelled].sum() / sizes.sum(), int(seen.sum()))


def frame_sizes(group: Group) -> Tensor:
    """(F,) fp32: tokens of each frame."""
    ids = group.prompt.frame_ids
    return torch.bincount(ids[ids >= 0].long(), minlength=group.prompt.num_frames).float()


def frame_shares(group: Group) -> Tensor:
    """(G, N, F) fp32: the share of each token's attention on each frame, whichever reduction was recorded."""
    assert group.mass is not None
    return group.mass if group.mass_reduction == "sum" else group.mass * frame_sizes(group)


def quarters(mask: Tensor) -> Tensor:
    """(G, N) int64: the quarter of its response that each token is in, 0 to 3; -1 at padding."""
    place = torch.arange(mask.shape[1], device=mask.device)
    part = place * PARTS // mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, part, -1)


@torch.no_grad()
def record_mass(
    groups: Sequence[Group], policy: nn.Module, unwrapped: Policy, config: APPOConfig, pad_id: int, device: torch.device
) -> None:
    """Fill in the frame mass of groups with frames, in one forward, whatever method is trained.

    policy: ``unwrapped`` inside what synchronises or shards it, as it is called.
    """
    groups = [group for group in groups if group.prompt.num_frames > 0]
    if not groups:
        return
    batch = batch_parts(whole_groups(groups), pad_id, device)
    sequences = unwrapped.sequences(batch)
    with unwrapped.recorder(sequences, config, reduction="sum") as recorder:
        policy(batch, _nothing, sequences)
    mass = batch.split(sequences.per_response(recorder.mass).cpu())
    for group, own in zip(groups, mass, strict=True):
        group.mass, group.mass_reduction = own[:, : group.mask.shape[1], : group.prompt.num_frames], "sum"


@torch.no_grad()
def head_shares(
    group: Group, policy: nn.Module, unwrapped: Policy, pad_id: int, device: torch.device
) -> HeadShares | None:
    """Heads that look: one forward over a group, recorded in every layer that has attention. None without frames."""
    batch = batch_parts(whole_groups([group]), pad_id, device)
    sequences = unwrapped.sequences(batch)
    if group.prompt.num_frames == 0:
        policy(batch, _nothing, sequences)  # processes call alike
        return None
    # A packed row has the tokens of responses alone, separate sequences have padding.
    valid = torch.ones_like(sequences.rows, dtype=torch.bool) if sequences.places is not None else batch.mask
    recorder = record_head_mass(unwrapped.model, sequences.frame_ids, rows=sequences.rows, valid=valid)
    with recorder:
        policy(batch, _nothing, sequences)
    tokens = valid.sum(1).cpu()[:, None, None]
    mass = (recorder.heads * tokens).sum(1) / tokens.sum()
    return HeadShares(
        layers=recorder.layers,
        mass=mass[..., : group.prompt.num_frames],
        labelled=group.prompt.labelled_frames(),
        sizes=frame_sizes(group),
    )


def _nothing(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """A head that leaves the hidden states alone: the forward is for what is recorded in it."""
