"""The matrix products of the fused loss on the pretended GPU: how many, how wide, where their operands start."""

import pytest
import torch

import gpu_rehearsal
from appo_kernels.vocabulary import output_head, torch_tiles
from gpu_rehearsal.calls import linear_weighted_surrogate
from gpu_rehearsal.recording import MISALIGNED, SYNC

V, D = 704, 32  # of the rehearsed call, whose 48 tokens are about 38 valid ones


def rehearsed(monkeypatch, *, tile_rows: int, slice_bytes: int = 256 << 20, **options):
    monkeypatch.setattr(output_head, "GPU_HEAD_TILE_BYTES", tile_rows * V * 4)
    monkeypatch.setattr(output_head, "WEIGHT_TILE_BYTES", slice_bytes // 8)
    with gpu_rehearsal.rehearse() as recording:
        with recording.pause():
            torch.manual_seed(0)
            run = linear_weighted_surrogate("triton", **options)
        run()
    return recording


# Bytes of a slice that make 100 columns, 68 and 127: 16-byte pieces would begin in the middle of one another.
@pytest.mark.parametrize("columns", [100, 68, 127])
def test_operands_start_on_a_cache_line(monkeypatch, columns):
    monkeypatch.setattr(output_head, "MAX_TILE_ROWS", 8)  # several tiles: sums of slices are made
    recording = rehearsed(monkeypatch, tile_rows=8, slice_bytes=columns * D * 4)
    assert recording.products > 3 * 5  # slices of the weight's gradient in each tile
    assert not recording.of_kind(MISALIGNED), recording.report()


def test_misaligned_products_are_seen():
    with gpu_rehearsal.rehearse() as recording:
        x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
        _ = x @ x, x[:, 4:] @ x[4:], x[:, 8:] @ x[8:]
    assert len(recording.of_kind(MISALIGNED)) == 1


def test_sums_are_made_where_the_product_is(monkeypatch):
    """One operation for each further tile, and no tensor of the weight's size that is added up afterwards."""
    monkeypatch.setattr(output_head, "MAX_TILE_ROWS", 8)
    recording = rehearsed(monkeypatch, tile_rows=8)
    sums = [name for name in recording.trace if name == "addmm"]
    assert len(sums) >= 3 and "add_" not in recording.trace, recording.trace


def test_waits_do_not_grow_with_tiles(monkeypatch):
    few = len(rehearsed(monkeypatch, tile_rows=48).of_kind(SYNC))
    monkeypatch.setattr(output_head, "MAX_TILE_ROWS", 8)
    many = len(rehearsed(monkeypatch, tile_rows=8).of_kind(SYNC))
    assert few == many == 1  # the check of values, which brings the numbers of tokens along


# (tokens, hidden size) at a vocabulary of 152,064: 3B, 7B and 32B models, few tokens and many.
@pytest.mark.parametrize("tokens", [1, 300, 1000, 3072, 9000])
@pytest.mark.parametrize("hidden", [2048, 3584, 5120])
def test_rows_of_a_tile(tokens, hidden):
    rows = output_head.tile_rows(tokens, 152_064, hidden, 4, on_gpu=True)
    assert rows == tokens or rows % 128 == 0
    if tokens <= min(hidden, output_head.MAX_TILE_ROWS):
        assert rows == tokens  # one tile: the weight's gradient needs no sum
    else:
        assert rows * 152_064 * 4 <= output_head.GPU_HEAD_TILE_BYTES
    assert torch_tiles.WEIGHT_TILE_BYTES * 8 <= 256 << 20


def test_rows_of_a_tile_on_a_cpu():
    assert output_head.tile_rows(10_000, 152_064, 3584, 4, on_gpu=False) == (160 << 20) // (152_064 * 4)
