"""Choices of frames, by the deciding ones that they find: python -m benchmarks.credit.frames FOLDER [--batches 8]

FOLDER: of a warm start, as `python -m benchmarks.credit.measure` makes them (config.yaml), or any run's. Of the groups
of its first batches of prompts whose rewards differ, for each choice: the share of the frames picked that are labelled
as deciding, of the labelled ones that are picked, and of groups in which nothing is. No gradient is taken: half a
second a group. Settings are chosen by this, on a warm start that nothing else is measured on.
"""

import argparse
import statistics
from pathlib import Path

import torch

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.method.selection import select_frames
from appo.train.groups import Group, known, whole_groups
from appo.train.setup import load_model
from appo.train.trainer import Trainer

# (strategy, K1, K2): the demo's settings, then one frame by amount and by peak, over one, two and five tokens.
CHOICES = [
    *((strategy, 5, 2) for strategy in ("hard", "soft", "contrast", "all", "common", "peak")),
    *((strategy, tokens, 1) for strategy in ("common", "peak") for tokens in (1, 2, 5)),
]


def scored_groups(folder: Path, batches: int) -> list[Group]:
    """Groups with rewards that differ, with their mass."""
    config = APPOConfig.load(folder / "config.yaml")
    trainer = Trainer(*load_model(config), load_records(config.data), config=config)
    trainer.policy.eval()
    found = []
    for _ in range(batches):
        groups = [group for group in trainer.reward(trainer.rollout(config.prompts_per_step)) if group.informative]
        for group in groups:
            trainer.score(whole_groups([group]))
            group.hidden = group.lse = None
        found += groups
    return found


def quality(groups: list[Group], strategy: str, top_tokens: int, top_frames: int) -> dict[str, float]:
    """precision, recall: means over groups, precision over those in which a frame is picked. none: share of others."""
    precision, recall = [], []
    for group in groups:
        frames = select_frames(
            known(group.mass), group.mask, group.accuracy,
            strategy=strategy, top_tokens=top_tokens, top_frames=top_frames,
        )  # fmt: skip
        labelled = group.prompt.labelled_frames()
        hits = int(torch.isin(frames, torch.tensor(labelled)).sum())
        precision += [hits / len(frames)] if len(frames) else []
        recall.append(hits / len(labelled))
    return {
        "precision": statistics.fmean(precision) if precision else float("nan"),
        "recall": statistics.fmean(recall),
        "none": 1 - len(precision) / len(groups),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=8, help="of the run's prompts, from the first")
    options = parser.parse_args()
    groups = [group for group in scored_groups(options.folder, options.batches) if group.prompt.labelled_frames()]
    chance = statistics.fmean(len(group.prompt.labelled_frames()) / group.prompt.num_frames for group in groups)
    print(f"{len(groups)} groups; labelled are {chance:.0%} of all frames")
    print(f"{'strategy':14s} {'K1':>3s} {'K2':>3s}  picked that are labelled  labelled that are picked  none picked")
    for strategy, tokens, frames in CHOICES:
        found = quality(groups, strategy, tokens, frames)
        print(
            f"{strategy:14s} {tokens:3d} {frames:3d}  {found['precision']:24.0%}  {found['recall']:24.0%}  "
            f"{found['none']:11.0%}"
        )


if __name__ == "__main__":
    main()
