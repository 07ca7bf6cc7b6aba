"""Every operator and backend on the pretended GPU: nothing a GPU refuses, and no number above the table's."""

from dataclasses import fields

import pytest

from gpu_rehearsal import budgets
from gpu_rehearsal.calls import calls
from gpu_rehearsal.recording import MISALIGNED

TABLE = budgets.read()
NAMES = [field.name for field in fields(budgets.Cost)]


@pytest.mark.parametrize("call", list(calls()), ids=lambda call: call.name)
def test_costs_no_more_than_the_table_says(call):
    for name, cost, recordings in budgets.costs(call):
        assert not budgets.refused(recordings)
        if not name.startswith(("frame_mass torch", "frame_attention torch")):  # which cut keys where frames are cut
            assert not recordings[0].of_kind(MISALIGNED), recordings[0].report()
        assert name in TABLE, f"{name} is not in budgets.txt; python -m gpu_rehearsal prints its line"
        risen = [
            f"{what}: {allowed} -> {now}"
            for what, now, allowed in zip(NAMES, cost.numbers, TABLE[name].numbers, strict=True)
            if now > allowed
        ]
        assert not risen, f"{name}: {'; '.join(risen)}\n{recordings[0].report('with checks of values')}"


def test_the_table_has_no_other_lines():
    names = {call.name + phase for call in calls() for phase in ("", " backward")}
    others = set(TABLE) - names - {name for name in TABLE if name.startswith(("Trainer.step", "APPOTrainer"))}
    assert not others
