"""The order of records: complete, seeded, independent of how many are taken at a time, split over processes."""

import pytest

from appo.data.sampler import RecordSampler


def records(drawn):
    return [record for _, record in drawn]


def positions(drawn):
    return [position for position, _ in drawn]


def test_an_epoch_holds_every_record_once_and_epochs_differ():
    sampler = RecordSampler(list(range(10)), seed=3)
    first, second = records(sampler.take(10)), records(sampler.take(10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_order_does_not_depend_on_how_many_are_taken_and_can_go_on():
    whole = RecordSampler(list(range(7)), seed=1).take(20)
    assert positions(whole) == list(range(20))
    pieces = RecordSampler(list(range(7)), seed=1)
    assert [x for n in (1, 5, 3) for x in pieces.take(n)] == whole[:9]
    assert pieces.peek(2) == whole[9:11] == pieces.peek(2)
    resumed = RecordSampler(list(range(7)), seed=1)
    resumed.load_state_dict([pieces.state_dict()])
    assert resumed.take(11) == whole[9:]


# 9 records over 2: an epoch that does not divide by the processes. 3 over 3: each process takes one.
@pytest.mark.parametrize(("count", "world"), [(9, 2), (3, 3), (5, 4)])
def test_processes_share_the_order_of_one_without_overlap(count, world):
    alone = RecordSampler(list(range(count)), seed=0).take(4 * world)
    parts = [RecordSampler(list(range(count)), seed=0, rank=rank, world=world).take(4) for rank in range(world)]
    assert [drawn for together in zip(*parts, strict=True) for drawn in together] == alone


def test_fewer_records_than_processes_are_refused():
    with pytest.raises(ValueError, match="at least one record per process"):
        RecordSampler([1], seed=0, world=2)


# Unequal counts as dynamic sampling makes them; up, down and back to the same number of processes.
@pytest.mark.parametrize("worlds", [(2, 2, 1), (2, 3, 1), (3, 1, 2), (1, 4, 3), (3, 2, 3)])
def test_a_run_that_goes_on_with_other_numbers_of_processes_takes_each_position_once(worlds):
    seen, states = [], []
    for turn, world in enumerate(worlds):
        samplers = [RecordSampler(list(range(11)), seed=4, rank=rank, world=world) for rank in range(world)]
        for sampler in samplers:
            sampler.load_state_dict(states)
        for rank, sampler in enumerate(samplers):
            seen += sampler.take(3 + (2 * rank + turn) % 4)
        states = [sampler.state_dict() for sampler in samplers]
    last = RecordSampler(list(range(11)), seed=4)
    last.load_state_dict(states)
    seen += last.take(40)
    assert sorted(positions(seen))[:30] == list(range(30)) and len(set(positions(seen))) == len(seen)
    order = dict(RecordSampler(list(range(11)), seed=4).take(60))
    assert all(order[position] == record for position, record in seen if position < 60)


def test_the_same_number_of_processes_goes_on_exactly():
    """What each process took is its own: a resumed run repeats the one that was not stopped."""
    samplers = [RecordSampler(list(range(11)), seed=4, rank=rank, world=2) for rank in range(2)]
    taken = [sampler.take(count) for sampler, count in zip(samplers, (5, 2), strict=True)]
    states = [sampler.state_dict() for sampler in samplers]
    resumed = [RecordSampler(list(range(11)), seed=4, rank=rank, world=2) for rank in range(2)]
    for before, after in zip(samplers, resumed, strict=True):
        after.load_state_dict(states)
        assert after.take(6) == before.take(6)
    assert len(taken[0]) == 5
