"""Each tapped layer costs a few torch operations and no wait: frames and visibility are worked out once a forward."""

from typing import Any

import pytest
import test_packed_attention as groups
import torch

import gpu_rehearsal
from appo import record_frame_mass
from appo.models.packed_attention import packed_mask, use_packed_attention
from gpu_rehearsal.recording import SYNC, UPLOAD, Recording
from gpu_rehearsal.tensors import DEVICE

# Operations on the GPU of one more tapped layer, launches of kernels left out: of a packed row with two groups (rows
# and lse gathered, two buffers a group, masses joined and added), and of separate sequences (a buffer for the lse),
# with rows on the GPU or as a slice.
BUDGETS = {"packed": 10, "separate": 1, "slice": 1}


def recorded(form: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """What a forward of three layers costs with the last ``layers`` of them tapped; values are not checked."""
    monkeypatch.setenv("APPO_CHECK_VALUES", "0")
    model, inputs = groups.models.qwen2(heads=4, kv_heads=2, layers=3), groups.Inputs()
    with gpu_rehearsal.rehearse() as recording:
        model = model.to(DEVICE)
        if form == "packed":
            use_packed_attention(model)
            ids, frames, rows = inputs.ids, inputs.frame_ids, inputs.rows[None]
            more: dict[str, Any] = {"group_layout": inputs.layout, "position_ids": inputs.places[None].to(DEVICE)}
            more["attention_mask"] = packed_mask(DEVICE)
        else:
            ids, frames = (x[:, inputs.alone[0]].repeat(2, 1) for x in (inputs.ids, inputs.frame_ids))
            rows, more = torch.arange(18, 27).expand(2, -1), {}
        recorded_rows = slice(18, 27) if form == "slice" else rows.to(DEVICE)
        with torch.no_grad(), record_frame_mass(model, frames.to(DEVICE), rows=recorded_rows, layers=layers):
            recording.clear()
            model.model(input_ids=ids.to(DEVICE), use_cache=False, **more)
    return recording


@pytest.mark.parametrize("form", list(BUDGETS))
def test_one_more_layer(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, two, three = (recorded(form, layers, monkeypatch) for layers in (1, 2, 3))  # the first fills caches
    assert len(three.launches) > len(two.launches), "the mass of a layer is computed by our kernels"
    assert 0 < three.operations - two.operations <= BUDGETS[form], three.report()
    for kind in (SYNC, UPLOAD):
        assert len(three.of_kind(kind)) == len(two.of_kind(kind)), three.report()
