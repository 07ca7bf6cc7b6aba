"""select_frames and perception_slots: hand-computed groups, ties, short and empty responses, and refusals."""

import pytest
import torch

from appo.method.selection import STRATEGIES, perception_slots, select_frames


def group(*frames_by_response: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """One valid token per response, whose mass is what is given."""
    mass = torch.tensor(frames_by_response)[:, None, :]
    return mass, torch.ones(mass.shape[:2], dtype=torch.bool)


# Responses 0 and 1 are right, 2 and 3 wrong. With K2 = 2: psi = {0, 1}, {1, 2}, {1, 3}, {3, 4}.
MASS, MASK = group(
    [0.5, 0.4, 0.1, 0.0, 0.0],
    [0.1, 0.5, 0.4, 0.0, 0.0],
    [0.0, 0.5, 0.1, 0.4, 0.0],
    [0.0, 0.1, 0.0, 0.4, 0.5],
)
REWARDS = torch.tensor([1.0, 0.5, 0.49, 0.0])
COMMON = [1, 3]  # sums over responses: 0.6, 1.5, 0.6, 0.8, 0.5


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("hard", [0, 2]),
        ("soft", [0, 1, 2]),
        ("all", [0, 1, 2, 3, 4]),
        # Means over right less wrong: 0.3, 0.45 - 0.3 = 0.15, 0.25 - 0.05 = 0.2, negative, negative.
        ("contrast", [0, 2]),
        ("common", COMMON),
        # With one token its mass is the mean: 1 where it looks, 0 where not; sums 2, 4, 3, 2, 1.
        ("peak", [1, 2]),
        ("released-hard", [0, 1, 2]),
        ("released-soft", [0, 1, 2]),
    ],
)
def test_strategies_by_hand(strategy: str, expected: list[int]) -> None:
    frames = select_frames(MASS, MASK, REWARDS, strategy=strategy, top_tokens=1, top_frames=2)
    assert frames.dtype == torch.int64
    assert frames.tolist() == expected


# Every strategy, with only wrong and only right answers: what it takes away, or takes instead.
@pytest.mark.parametrize(
    ("strategy", "nobody_right", "everybody_right"),
    [
        ("hard", [], [0, 1, 2, 3, 4]),
        ("soft", [], [0, 1, 2, 3, 4]),
        ("all", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ("contrast", [], []),
        ("common", COMMON, COMMON),
        ("peak", [1, 2], [1, 2]),
        ("released-hard", [], [0, 1, 2, 3, 4]),
        ("released-soft", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_groups_of_one_kind(strategy: str, nobody_right: list[int], everybody_right: list[int]) -> None:
    for reward, expected in ((0.0, nobody_right), (1.0, everybody_right)):
        frames = select_frames(MASS, MASK, torch.full((4,), reward), strategy=strategy, top_tokens=1, top_frames=2)
        assert frames.tolist() == expected


def test_threshold_moves_the_border() -> None:
    def chosen(threshold: float) -> list[int]:
        return select_frames(
            MASS, MASK, REWARDS, strategy="soft", top_tokens=1, top_frames=1, threshold=threshold
        ).tolist()

    assert chosen(0.9) == [0]
    assert chosen(0.5) == [0, 1]


def test_contrast_takes_only_positive_differences_and_at_most_k2() -> None:
    mass, mask = group([0.5, 0.3, 0.2], [0.5, 0.2, 0.3])
    rewards = torch.tensor([1.0, 0.0])
    assert select_frames(mass, mask, rewards, strategy="contrast", top_tokens=1, top_frames=3).tolist() == [1]
    mass, mask = group([0.25, 0.25, 0.25, 0.25], [0.0, 0.05, 0.05, 0.9])
    assert select_frames(mass, mask, rewards, strategy="contrast", top_tokens=1, top_frames=2).tolist() == [
        0,
        1,
    ]


def test_k1_is_the_mean_of_the_largest_tokens() -> None:
    # Frame 0 has the single largest mass, frame 1 the largest mean of two.
    mass = torch.tensor([[[0.9, 0.5], [0.0, 0.5], [0.0, 0.1]]])
    mask, rewards = torch.ones(1, 3, dtype=torch.bool), torch.ones(1)
    assert select_frames(mass, mask, rewards, top_tokens=1, top_frames=1).tolist() == [0]
    assert select_frames(mass, mask, rewards, top_tokens=2, top_frames=1).tolist() == [1]


def test_fewer_than_k1_valid_tokens_average_over_those_there_are() -> None:
    # One valid token in response 0, so its A is (0.4, 0.3). Divided by K1 = 2 it would be (0.2, 0.15), and contrast
    # would see 0.2 - 0.3 < 0 instead of 0.4 - 0.3 > 0.
    mass = torch.tensor([[[0.4, 0.3], [9.0, 9.0]], [[0.3, 0.4], [0.3, 0.4]]])
    mask = torch.tensor([[True, False], [True, True]])
    frames = select_frames(mass, mask, torch.tensor([1.0, 0.0]), strategy="contrast", top_tokens=2, top_frames=2)
    assert frames.tolist() == [0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fully_masked_response_changes_nothing(strategy: str) -> None:
    mass = torch.cat([MASS, torch.full((2, 1, 5), torch.nan)])
    mask = torch.cat([MASK, torch.zeros(2, 1, dtype=torch.bool)])
    rewards = torch.cat([REWARDS, torch.tensor([1.0, 0.0])])
    options = {"strategy": strategy, "top_tokens": 3, "top_frames": 2}
    assert torch.equal(select_frames(mass, mask, rewards, **options), select_frames(MASS, MASK, REWARDS, **options))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_group_without_any_valid_token_has_no_target(strategy: str) -> None:
    assert select_frames(MASS, torch.zeros_like(MASK), REWARDS, strategy=strategy).tolist() == []


def test_ties_go_to_the_lower_frame() -> None:
    # 40 equal frames: more than a partial sort keeps in order by chance.
    mass, mask = torch.full((2, 5, 40), 0.25), torch.ones(2, 5, dtype=torch.bool)
    assert select_frames(mass, mask, torch.ones(2), strategy="all", top_frames=3).tolist() == [0, 1, 2]


def test_a_frame_without_keys_is_never_a_target() -> None:
    mass, mask = group([0.0, 0.6, 0.4, 0.0, 0.0], [0.0, 0.6, 0.4, 0.0, 0.0])
    for strategy in ("soft", "all", "common", "peak", "released-hard"):
        assert select_frames(mass, mask, torch.ones(2), strategy=strategy, top_frames=4).tolist() == [1, 2]


def test_more_frames_and_tokens_asked_for_than_there_are() -> None:
    frames = select_frames(MASS, MASK, REWARDS, strategy="soft", top_tokens=99, top_frames=99)
    assert frames.tolist() == [0, 1, 2, 3, 4]


def test_what_stands_at_masked_tokens_is_ignored() -> None:
    torch.manual_seed(0)
    mass, rewards = torch.rand(4, 9, 7), torch.tensor([1.0, 0.0, 1.0, 0.0])
    mask = torch.rand(4, 9) > 0.4
    frames = select_frames(mass, mask, rewards, strategy="soft", top_tokens=3)
    slots = perception_slots(mass, mask, frames, top_tokens=4)
    for rubbish in (torch.nan, torch.inf, -5.0):
        dirty = mass.masked_fill(~mask[..., None], rubbish)
        assert torch.equal(select_frames(dirty, mask, rewards, strategy="soft", top_tokens=3), frames)
        assert torch.equal(perception_slots(dirty, mask, frames, top_tokens=4), slots)


def test_slots_by_hand() -> None:
    # (G=2, N=4, F=2); token 1 of response 1 is not valid although its mass is the largest.
    mass = torch.tensor(
        [[[0.1, 0.4], [0.3, 0.4], [0.2, 0.1], [0.4, 0.4]], [[0.1, 0.2], [0.9, 0.9], [0.3, 0.1], [0.2, 0.3]]]
    )
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    slots = perception_slots(mass, mask, torch.tensor([0, 1]), top_tokens=2)
    assert slots.dtype == torch.int64
    # Frame 0: tokens 3 and 1 by mass, so 1, 3 by position. Frame 1: a three-way tie at 0.4 keeps the first two.
    assert slots.tolist() == [[[1, 3], [2, 3]], [[0, 1], [0, 3]]]


def test_slots_are_missing_where_a_response_is_short_or_empty() -> None:
    mass = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 4, [True, False, False, True], [False] * 4])
    slots = perception_slots(mass, mask, torch.tensor([1]), top_tokens=3)
    assert slots.shape == (1, 3, 3)
    assert slots[0, 1].tolist() == [0, 3, -1]
    assert slots[0, 2].tolist() == [-1, -1, -1]


def test_slots_reach_no_further_than_the_response() -> None:
    slots = perception_slots(MASS, MASK, torch.tensor([0, 4]), top_tokens=64)
    assert slots.tolist() == [[[0]] * 4] * 2


def test_no_target_frames_give_no_slots() -> None:
    assert perception_slots(MASS, MASK, torch.empty(0, dtype=torch.int64)).shape == (0, 4, 1)


def test_ties_between_tokens_go_to_the_earlier() -> None:
    mass, mask = torch.full((2, 50, 3), 0.1), torch.ones(2, 50, dtype=torch.bool)
    assert perception_slots(mass, mask, torch.tensor([2]), top_tokens=4)[0, 1].tolist() == [0, 1, 2, 3]


def test_gradients_and_strides_do_not_matter() -> None:
    mass = MASS.clone().requires_grad_().transpose(0, 2).contiguous().transpose(0, 2)
    assert select_frames(mass, MASK, REWARDS, top_tokens=1, top_frames=2).tolist() == [0, 2]


def test_low_precision_mass_is_accepted() -> None:
    assert select_frames(MASS.bfloat16(), MASK, REWARDS, top_tokens=1, top_frames=2).tolist() == [0, 2]


# One argument at a time: another shape or dtype, values that are no mass or reward, no such strategy, no such count.
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mass": MASS[0]}, "mass"),
        ({"mass": MASS.long()}, "mass"),
        ({"mass": MASS * torch.nan}, "mass"),
        ({"mass": -MASS - 1}, "mass"),
        ({"mass": MASS[:, :, :0]}, "mass"),
        ({"mask": MASK[:3]}, "mask"),
        ({"mask": MASK.float()}, "mask"),
        ({"rewards": REWARDS[:3]}, "rewards"),
        ({"rewards": REWARDS * torch.nan}, "rewards"),
        ({"strategy": "medium"}, "strategy"),
        ({"top_tokens": 0}, "top_tokens"),
        ({"top_frames": 1.5}, "top_frames"),
    ],
)
def test_select_frames_refuses(changed: dict, named: str) -> None:
    arguments = {"mass": MASS, "mask": MASK, "rewards": REWARDS} | changed
    with pytest.raises(ValueError, match=f"select_frames: `{named}`: expected .* got "):
        select_frames(arguments.pop("mass"), arguments.pop("mask"), arguments.pop("rewards"), **arguments)


# One past the last, negative, no whole number, another shape.
@pytest.mark.parametrize("frames", [torch.tensor([5]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])])
def test_perception_slots_refuses_frames_that_are_not_there(frames: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="perception_slots: `frames`"):
        perception_slots(MASS, MASK, frames)


def by_the_book(mass: list, lengths: list[int], rewards: list[float], strategy: str, K1: int, K2: int) -> list[int]:
    """docs/method.md section 4 in plain Python."""
    F = len(mass[0][0])
    A, psi = {}, {}
    for i, n in enumerate(lengths):
        if n:
            top = [sorted((mass[i][t][f] for t in range(n)), reverse=True)[:K1] for f in range(F)]
            A[i] = [sum(values) / len(values) for values in top]
            psi[i] = set(sorted(range(F), key=lambda f: (-A[i][f], f))[:K2])
    right = [i for i in A if rewards[i] >= 0.5]
    wrong = [i for i in A if rewards[i] < 0.5]
    if strategy == "peak":
        for i in A:
            usual = [sum(mass[i][t][f] for t in range(lengths[i])) / lengths[i] for f in range(F)]
            A[i] = [value / mean for value, mean in zip(A[i], usual, strict=True)]
    if strategy in ("common", "peak"):
        mean = [sum(A[i][f] for i in A) for f in range(F)]
        return sorted(sorted(range(F), key=lambda f: (-mean[f], f))[:K2]) if A else []
    if strategy == "contrast":
        if not right or not wrong:
            return []
        gain = [sum(A[i][f] for i in right) / len(right) - sum(A[i][f] for i in wrong) / len(wrong) for f in range(F)]
        return sorted(f for f in sorted(range(F), key=lambda f: (-gain[f], f))[:K2] if gain[f] > 0)
    union = {
        kind: set().union(*(psi[i] for i in members)) for kind, members in (("S1", right), ("S2", wrong), ("all", A))
    }
    chosen = {
        "hard": union["S1"] - union["S2"],
        "soft": union["S1"],
        "all": union["all"],
        "released-hard": union["S1"],
        "released-soft": union["S1"] if right else union["all"],
    }
    return sorted(chosen[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_groups_against_the_specification_in_plain_python(strategy: str) -> None:
    generator = torch.Generator().manual_seed(7)
    found = 0
    for _ in range(60):
        G, N, F, K1, K2 = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in
                           ((1, 9), (1, 30), (1, 18), (1, 20), (1, 6)))  # fmt: skip
        # Few distinct values: ties are common and sums exact. Not where means of means are not exact.
        mass = torch.randint(1, 6, (G, N, F), generator=generator).double() / 64
        if strategy in ("contrast", "common", "peak"):
            mass = torch.rand(G, N, F, generator=generator, dtype=torch.float64)
        if strategy == "peak":  # where K1 is all tokens, every ratio is 1 up to rounding
            K1 = 1
        lengths = torch.randint(0, N + 1, (G,), generator=generator)
        rewards = torch.randint(0, 3, (G,), generator=generator) / 2
        frames = select_frames(
            mass, torch.arange(N) < lengths[:, None], rewards, strategy=strategy, top_tokens=K1, top_frames=K2
        )
        expected = by_the_book(mass.tolist(), lengths.tolist(), rewards.tolist(), strategy, K1, K2)
        assert frames.tolist() == expected
        found += len(expected)
    assert found > 20


def test_a_peak_is_found_behind_frames_that_every_token_looks_at() -> None:
    """One token of each response looks at frame 2, ten times as much as the others do, who look at 0 and 1 most."""
    mass = torch.tensor([0.3, 0.2, 0.01, 0.02]).repeat(2, 6, 1)
    mass[0, 4], mass[1, 1] = torch.tensor([0.05, 0.04, 0.1, 0.02]), torch.tensor([0.05, 0.04, 0.1, 0.02])
    mask, rewards = torch.ones(2, 6, dtype=torch.bool), torch.tensor([1.0, 0.0])
    for strategy, expected in (("common", [0]), ("peak", [2])):
        for scale in (1.0, 2.0**-12):  # an amount that all tokens share says nothing
            for dtype in (torch.float32, torch.bfloat16):
                found = select_frames(
                    (scale * mass).to(dtype), mask, rewards, strategy=strategy, top_tokens=1, top_frames=1
                )
                assert found.tolist() == expected
    # Over as many tokens as there are, nothing is a peak: ratios are all 1.
    flat = select_frames(torch.ones(1, 4, 3), torch.ones(1, 4).bool(), torch.ones(1), strategy="peak", top_tokens=4)
    assert flat.tolist() == [0, 1, 2]


def test_slots_by_share_are_those_of_tokens_that_look_at_the_frame_rather_than_at_others() -> None:
    # Token 0 looks most at everything; token 2 looks at nothing; tokens 1 and 3 look little, but at one frame each.
    mass = torch.tensor([[[0.5, 0.4], [0.2, 0.02], [0.0, 0.0], [0.01, 0.1]]])
    mask, frames = torch.ones(1, 4, dtype=torch.bool), torch.tensor([0, 1])
    assert perception_slots(mass, mask, frames, top_tokens=1).flatten().tolist() == [0, 0]
    assert perception_slots(mass, mask, frames, top_tokens=1, score="share").flatten().tolist() == [1, 3]
    # A token that looks at no frame is last, and takes part where there are slots for all.
    two = perception_slots(mass, mask, frames, top_tokens=3, score="share")
    assert two.tolist() == [[[0, 1, 3]], [[0, 1, 3]]]
    assert perception_slots(mass, mask, frames, top_tokens=4, score="share").tolist() == [[[0, 1, 2, 3]]] * 2


# Every dtype that mass may come in.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_slots_by_share_do_not_depend_on_how_much_a_token_looks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.randint(1, 64, (3, 9, 5), generator=generator).to(dtype) / 64
    mask = torch.rand(3, 9, generator=generator) < 0.8
    amount = 2.0 ** torch.randint(-4, 4, (3, 9, 1), generator=generator)  # powers of two scale without rounding
    for frames in (torch.tensor([0, 3]), torch.tensor([4]), torch.zeros(0, dtype=torch.int64)):
        expected = perception_slots(share, mask, frames, top_tokens=3, score="share")
        scaled = (share * amount.to(dtype)).masked_fill(~mask[..., None], torch.nan)
        assert torch.equal(perception_slots(scaled, mask, frames, top_tokens=3, score="share"), expected)
