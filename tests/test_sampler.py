"""The order of records: complete, seeded, independent of how many are taken at a time, split over processes."""

import pytest

from appo.data.sampler import RecordSampler


def test_an_epoch_holds_every_record_once_and_epochs_differ():
    sampler = RecordSampler(list(range(10)), seed=3)
    first, second = sampler.take(10), sampler.take(10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_order_does_not_depend_on_how_many_are_taken_and_can_go_on():
    whole = RecordSampler(list(range(7)), seed=1).take(20)
    pieces = RecordSampler(list(range(7)), seed=1)
    assert [x for n in (1, 5, 3) for x in pieces.take(n)] == whole[:9]
    resumed = RecordSampler(list(range(7)), seed=1)
    resumed.load_state_dict(pieces.state_dict())
    assert resumed.take(11) == whole[9:]


def test_processes_share_an_epoch_without_overlap():
    parts = [RecordSampler(list(range(9)), seed=0, rank=rank, world=2).take(4) for rank in range(2)]
    assert len({*parts[0], *parts[1]}) == 8
    with pytest.raises(ValueError, match="at least one record per process"):
        RecordSampler([1], seed=0, world=2)
