"""Masks as intervals, against the dense mask they stand for."""

import pytest
import torch
from torch import Tensor

from appo.recording.hooks import AttentionCall
from appo.recording.mask_bounds import Visibility, visible_keys

S = 12


def dense(found: Visibility, num_keys: int) -> Tensor:
    """(B, R, S) bool: what the intervals say."""
    keys = torch.arange(num_keys)
    seen = (keys >= found.first_key[..., None]) & (keys <= found.last_key[..., None])
    return seen if found.prefix_keys is None else seen | (keys < found.prefix_keys[..., None])


def rows(*positions: int, batch: int = 1) -> Tensor:
    return torch.tensor([positions or range(S)] * batch)


def see(
    chosen: Tensor,
    mask: Tensor | None,
    implementation: str = "sdpa",
    num_queries: int = S,
    causal: bool = True,
    **options,
):
    query, key = torch.empty(len(chosen), 1, num_queries, 1), torch.empty(len(chosen), 1, S, 1)
    return visible_keys(chosen, AttentionCall(query, key, mask, implementation, causal, options))


def causal_mask(batch: int = 1) -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril().expand(batch, 1, S, S).clone()


def interval_masks() -> dict[str, Tensor]:
    """(B, 1, S, S) bool masks that are intervals, perhaps with a prefix."""
    left_padded = causal_mask(2)
    left_padded[1, :, :, :5] = False  # its first five rows see nothing
    packed = causal_mask()
    packed[:, :, 7:, :7] = False
    window = causal_mask().triu(-3)
    shared = causal_mask()  # keys 0..3 are a prompt that two responses share
    shared[:, :, 8:, 4:8] = False
    everything = torch.ones(1, 1, S, S, dtype=torch.bool)
    return {
        "causal": causal_mask(),
        "left padding": left_padded,
        "right padding": causal_mask() & (torch.arange(S) < 9),
        "packed": packed,
        "window": window,
        "shared prompt": shared,
        "everything": everything,
        "nothing": ~everything,
    }


# The values by which libraries hide a key.
@pytest.mark.parametrize("name", interval_masks())
@pytest.mark.parametrize("form", ["bool", "-inf", "finfo.min", "half"])
def test_dense_masks(name: str, form: str) -> None:
    mask = interval_masks()[name]
    dtype = torch.float16 if form == "half" else torch.float32
    low = float("-inf") if form == "-inf" else torch.finfo(dtype).min
    given = mask if form == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    chosen = rows(batch=max(2, len(mask)))
    found = see(chosen, given, "sdpa" if form == "bool" else "eager")
    assert torch.equal(dense(found, S), mask[:, 0].expand(len(chosen), -1, -1))
    assert (found.prefix_keys is not None) == (name == "shared prompt")


def test_rows_in_any_order_and_after_a_cache() -> None:
    mask = interval_masks()["left padding"]
    chosen = torch.tensor([[11, 0, 9, 9], [6, 7, 11, 2]])
    batch = torch.arange(2)[:, None]
    assert torch.equal(dense(see(chosen, mask), S), mask[batch, 0, chosen])
    late = torch.tensor([[10, 11, 8], [8, 9, 10]])  # the forward computes positions 8 to 11 of 12
    assert torch.equal(dense(see(late, mask[:, :, 8:], num_queries=4), S), mask[batch, 0, late])


def test_masks_that_agree_between_heads() -> None:
    mask = interval_masks()["packed"].expand(1, 3, S, S)
    assert torch.equal(dense(see(rows(), mask), S), mask[:, 0])
    with pytest.raises(ValueError, match=r"the same mask for all heads"):
        see(rows(), torch.cat([mask, causal_mask()], 1))


def test_no_mask() -> None:
    assert torch.equal(dense(see(rows(), None), S), causal_mask()[0])
    assert torch.equal(dense(see(rows(), None, "flash_attention_2"), S), causal_mask()[0])
    for found in (see(rows(), None, causal=False), see(rows(), None, "eager")):
        assert dense(found, S).all()
    # One new token after a cache sees everything.
    assert dense(see(rows(11), None, num_queries=1), S).all()


def test_flash_attention_is_told_of_windows_padding_and_packing_by_arguments() -> None:
    masks = interval_masks()
    flash = "flash_attention_2"
    assert torch.equal(dense(see(rows(), None, flash, sliding_window=4), S), masks["window"][0])
    positions = torch.tensor([[*range(7), *range(5)]])
    assert torch.equal(dense(see(rows(), None, flash, position_ids=positions), S), masks["packed"][0])
    assert torch.equal(dense(see(rows(), None, flash, position_ids=positions + 3), S), masks["packed"][0])
    assert torch.equal(
        dense(see(rows(), None, flash, cu_seq_lens_k=torch.tensor([0, 7, 12]).int()), S), masks["packed"][0]
    )
    # A mask made from the positions has said so already; and flash attention packs single sequences only.
    assert torch.equal(dense(see(rows(), causal_mask(), position_ids=positions), S), causal_mask()[0])
    two = see(rows(batch=2), None, flash, position_ids=positions.expand(2, -1))
    assert torch.equal(dense(two, S), causal_mask(2)[:, 0])

    padding = torch.ones(2, S, dtype=torch.int64)
    padding[0, :5], padding[1, 9:] = 0, 0
    want = causal_mask(2)[:, 0] & padding.bool()[:, None] & padding.bool()[:, :, None]
    assert torch.equal(dense(see(rows(batch=2), padding, flash), S), want)
    windowed = see(rows(batch=2), padding, flash, sliding_window=4)
    assert torch.equal(dense(windowed, S), want & masks["window"][0])
    both = padding.bool()[:, None] & padding.bool()[:, :, None]
    assert torch.equal(dense(see(rows(batch=2), padding, flash, causal=False), S), both)


def hole() -> Tensor:
    mask = causal_mask()
    mask[0, 0, 9, [2, 6]] = False  # three runs
    return mask


# A hole, a bias and NaN, a mask that eager attention would add, padding within a sequence, another rank, length, type.
@pytest.mark.parametrize(
    ("mask", "implementation", "message"),
    [
        (hole(), "sdpa", "more runs in the row of position 9 of sequence 0"),
        (torch.zeros(1, 1, S, S).masked_fill(~causal_mask(), -1e9) + 0.5, "eager", "A bias on the scores"),
        (torch.full((1, 1, S, S), float("nan")), "eager", "A bias on the scores"),
        (causal_mask(), "eager", "an additive mask with eager attention, got bool"),
        (torch.tensor([[1, 1, 0, *[1] * 9]]), "flash_attention_2", "padding within a sequence"),
        (torch.tensor([[1, 0, 1, 0, *[1] * 8]]), "flash_attention_2", "more runs"),
        (torch.ones(1, S, S), "sdpa", r"got \(1, 12, 12\)"),
        (causal_mask()[..., :-1], "sdpa", "expected 12 keys, as the layer has, got 11"),
        ("a block mask", "flex_attention", 'got str. Use attn_implementation "sdpa"'),
    ],
)
def test_what_is_no_interval_is_refused(mask: Tensor, implementation: str, message: str) -> None:
    with pytest.raises(ValueError, match="record_frame_mass: `attention_mask`.*" + message):
        see(rows(), mask, implementation)
