"""How keys are cut into tiles: every key once, frames in order, nothing of before and behind a video in one tile."""

import pytest
import torch
from attention_cases import case
from attention_layouts import FRAMES, LAYOUTS

from appo_kernels.attention.torch_tiles import key_tiles

# Sizes below, at and above a frame's keys and the whole sequence.
SIZES = (1, 5, 16, 1000)


# Layouts of every kind; tiles of fewer keys than a frame and of more than all; with keys of no frame and without.
@pytest.mark.parametrize("frames_only", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_once_and_its_frame(layout, size, frames_only):
    ids = case(keys=211, layout=layout).frame_ids[0]
    tiles = key_tiles(ids, FRAMES, size, frames_only=frames_only)
    positions = torch.cat([torch.empty(0, dtype=torch.int32), *(tile.positions for tile in tiles)])
    expected = (ids >= 0).nonzero().flatten() if frames_only else torch.arange(len(ids))
    assert torch.equal(positions.sort().values.long(), expected)
    for tile in tiles:
        assert 0 < len(tile) <= size
        own = ids[tile.positions.long()]
        assert torch.equal(torch.where(own < 0, FRAMES, own).long(), tile.frames)
        assert (tile.low, tile.high) == (int(tile.positions.min()), int(tile.positions.max()))
        assert tile.ascending == (tile.positions.tolist() == list(range(tile.low, tile.high + 1)))
        assert bool((own < 0).all()) or bool((own >= 0).all())
        sums = torch.zeros(1, FRAMES + 1)
        tile.add_frame_sums(torch.ones(1, len(tile)), sums)
        assert torch.equal(sums[0], torch.bincount(tile.frames, minlength=FRAMES + 1).float())


def test_text_before_and_behind_a_video_is_apart():
    """Rows of the response see the one whole, rows of the prompt's beginning nothing of the other: no masks."""
    ids = torch.cat([torch.full((7,), -1), torch.arange(FRAMES).repeat_interleave(8), torch.full((30,), -1)])
    text = [tile for tile in key_tiles(ids, FRAMES, 16, frames_only=False) if ids[tile.low] < 0]
    first_behind = 7 + 8 * FRAMES
    assert [(tile.low, tile.high) for tile in text] == [
        (0, 6),
        (first_behind, first_behind + 14),
        (first_behind + 15, first_behind + 29),
    ]
    assert all(tile.ascending for tile in text)


def test_short_gaps_are_not_cut():
    """A time in text before each frame: the tiles stay whole."""
    ids = torch.cat([torch.tensor([-1, -1, frame, frame, frame, frame]) for frame in range(FRAMES)])
    tiles = key_tiles(ids, FRAMES, 64, frames_only=False)
    assert [len(tile) for tile in tiles] == [4 * FRAMES, 2 * FRAMES]
