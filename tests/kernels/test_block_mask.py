"""The definition of tiles of keys and block mask against every pair of row and key; ptx/interpreted_kernels.py
compares the Triton kernels with it."""

import pytest
import torch
from block_mask_cases import examples
from block_mask_reference import block_mask, key_plan, row_blocks, row_bounds

from appo_kernels.attention.triton_device import FULL, SHORT, SKIP

EXAMPLES = examples()


# Tiles smaller and larger than frames; as large as all keys.
@pytest.mark.parametrize("size", [2, 8, 128])
def test_tiles_hold_every_key_that_is_seen_once(size: int) -> None:
    for example in EXAMPLES:
        bounds = row_bounds(2, example.rows, example.keys, *example.given)
        plan = key_plan(example.frame_ids, example.frames, bounds, size)
        seen = example.visible().any(1)
        for b in range(2):
            held, ids, none = [], example.frame_ids[b], example.frames + 1  # -1 % none: F
            for number, (start, length, frame, _) in enumerate(plan.tiles[b].tolist()):
                positions = plan.order[b, start : start + length].long()
                assert 0 <= length <= size and len(positions) == length
                if not length:
                    continue
                held.append(positions)
                assert torch.equal(plan.frames[b, start : start + length], ids[positions] % none)
                assert (int(plan.low[b, number]) <= positions).all() and (positions <= int(plan.high[b, number])).all()
                if frame <= example.frames:  # not a mixed tile
                    assert (ids[positions] % none == frame).all()
                    assert (positions.diff() > 0).all()
                    assert [int(x[b, number]) for x in (plan.low, plan.high)] == positions[[0, -1]].tolist()
                if frame < example.frames:
                    begin, end = plan.frame_tiles[b, frame : frame + 2].tolist()
                    assert begin <= number < end
            together = torch.cat([torch.zeros(0, dtype=torch.int64), *held])
            assert len(together.unique()) == len(together)
            assert seen[b, together.sort().values].sum() == seen[b].sum(), "a key that a row sees is in no tile"
            of_frames = [plan.order[b, plan.small[b, f] : plan.small[b, f + 1]].long() for f in range(example.frames)]
            for f, positions in enumerate(of_frames):
                assert (ids[positions] == f).all()
                own_tiles = bool(((plan.tiles[b, :, 2] == f) & (plan.tiles[b, :, 1] > 0)).any())
                assert own_tiles or len(positions) == int((ids[together] == f).sum())


# Single keys and single rows; tiles that neither divide nor hold all of them.
@pytest.mark.parametrize(("size", "tile_rows"), [(1, 4), (8, 1), (8, 4), (32, 16)])
def test_the_mask_is_that_of_all_pairs(size: int, tile_rows: int) -> None:
    kept = total = 0
    for example in EXAMPLES:
        bounds = row_bounds(2, example.rows, example.keys, *example.given)
        plan = key_plan(example.frame_ids, example.frames, bounds, size)
        mask = block_mask(plan, example.frames, bounds, example.rows, tile_rows, size)
        visible = example.visible()
        for b in range(2):
            for n, first in enumerate(range(0, example.rows, tile_rows)):
                for t, (start, length, frame, _) in enumerate(plan.tiles[b].tolist()):
                    pairs = visible[b, first : first + tile_rows][:, plan.order[b, start : start + length].long()]
                    kind = int(mask.kinds[b, n, t])
                    if kind == SKIP:
                        assert not pairs.any()
                    if kind >= SHORT:
                        assert pairs.all() and frame != example.frames + 1 and (kind == FULL) == (length == size)
                    total, kept = total + (not pairs.any()), kept + (not pairs.any() and kind != SKIP)
                indices, (full, unmasked, some) = mask.kv_indices[b, n].tolist(), mask.kv_num_blocks[b, n].tolist()
                kinds = mask.kinds[b, n]
                assert indices[:some] == (kinds != SKIP).nonzero().flatten().tolist()
                assert sorted(indices) == list(range(len(kinds)))
                assert (kinds[indices[:full]] == FULL).all() and (full == some or kinds[indices[full]] != FULL)
                assert (kinds[indices[:unmasked]] >= SHORT).all()
                assert full <= unmasked and (unmasked == some or kinds[indices[unmasked]] < SHORT)
        rows, counts = row_blocks(mask)
        for b, t in [(b, t) for b in range(2) for t in range(mask.kinds.shape[2])]:
            full, some = counts[b, t].tolist()
            chosen = rows[b, t, :some].long()
            assert set(chosen.tolist()) == set((mask.kinds[b, :, t] != SKIP).nonzero().flatten().tolist())
            assert (mask.kinds[b, chosen[:full], t] >= SHORT).all() and (mask.kinds[b, chosen[full:], t] < SHORT).all()
    assert kept < 0.3 * total, "tiles that no row sees are left out, but for rows with gaps between them"


# Rows in order whose intervals have no gaps: nothing is visited in vain.
@pytest.mark.parametrize("name", ["all", "causal", "window", "nothing"])
def test_nothing_in_vain_where_rows_see_runs(name: str) -> None:
    for example in EXAMPLES:
        if example.name != name:
            continue
        bounds = row_bounds(2, example.rows, example.keys, *example.given)
        plan = key_plan(example.frame_ids, example.frames, bounds, 8)
        mask, visible = block_mask(plan, example.frames, bounds, example.rows, 4, 8), example.visible()
        for b in range(2):
            for t, (start, length, frame, _) in enumerate(plan.tiles[b].tolist()):
                positions = plan.order[b, start : start + length].long()
                if frame > example.frames or (length > 1 and (positions.diff() != 1).any()):
                    continue
                for n in range(mask.kinds.shape[1]):
                    pairs = visible[b, 4 * n : 4 * n + 4][:, positions]
                    assert (int(mask.kinds[b, n, t]) == SKIP) == (not pairs.any())
                    assert (int(mask.kinds[b, n, t]) == FULL) == (length == 8 and bool(pairs.all()))
                    assert (int(mask.kinds[b, n, t]) >= SHORT) == (length > 0 and bool(pairs.all()))


# Tokens of a frame in real videos (48, 56, 60), multiples of a tile, a rest beside whole tiles.
@pytest.mark.parametrize("frame_keys", [48, 56, 60, 64, 100, 240, 256])
def test_frames_of_a_video_need_no_mask(frame_keys: int) -> None:
    """A prompt with 16 frames in its text, then causal rows: at least 85 % of the visits are unmasked."""
    frames, text, rows, size, tile_rows = 16, 126, 384, 64, 18
    prompt = text + frames * frame_keys
    ids = torch.full((1, prompt + rows), -1, dtype=torch.int32)
    ids[0, 15 : 15 + frames * frame_keys] = torch.arange(frames * frame_keys, dtype=torch.int32) // frame_keys
    bounds = row_bounds(1, rows, prompt + rows, None, (torch.arange(rows) + prompt - 1)[None].int(), None)
    mask = block_mask(key_plan(ids, frames, bounds, size), frames, bounds, rows, tile_rows, size)
    full, unmasked, some = mask.kv_num_blocks.sum((0, 1)).tolist()
    assert unmasked >= 0.85 * some and (frame_keys % size or full >= 0.85 * some)
