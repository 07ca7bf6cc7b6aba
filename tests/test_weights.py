"""token_weights and group_advantages: hand-computed values, both averages, what is left out, and refusals."""

import math

import pytest
import torch

from appo.method.advantages import group_advantages
from appo.method.selection import perception_slots, select_frames
from appo.method.token_weights import token_weights

# Two target frames, two responses, two slots each. Dhat: frame 0 (D 1, 3) -> 0, 1; frame 1 (D 5, 2) -> 1, 0.
DIVERGENCE = torch.tensor([[1.0, 3.0], [5.0, 2.0]])
SLOTS = torch.tensor([[[0, 2], [1, 3]], [[2, 4], [0, 3]]])
MASK = torch.ones(2, 5, dtype=torch.bool)


def test_paper_average_by_hand() -> None:
    weights = token_weights(DIVERGENCE, SLOTS, MASK, alpha=2.0, average="frames")
    # Response 0: token 2 is slot (0, 1) and slot (1, 0): 1 + 2 * (1 + 1) / 2. Response 1: token 3 is (0, 1) and (1, 1).
    expected = [[1.0, 1.0, 3.0, 1.0, 1.0], [2.0, 1.0, 1.0, 2.0, 1.0]]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)


def test_member_average_by_hand() -> None:
    weights = token_weights(DIVERGENCE, SLOTS, MASK, alpha=0.7, average="member")
    # Response 1: token 0 lies in one frame only (Dhat 1), token 3 in both (Dhat 1 and 0).
    expected = [[1.0, 1.0, 1.7, 1.0, 1.0], [1.7, 1.0, 1.0, 1.35, 1.0]]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)


def test_slots_without_members_are_left_out_of_the_scaling() -> None:
    # Slot 2 has no member; its 0 (or NaN) must not become the minimum.
    slots = torch.tensor([[[0, 1, -1], [1, 3, -1]]])
    for rubbish in (0.0, 99.0, torch.nan):
        weights = token_weights(torch.tensor([[1.0, 2.0, rubbish]]), slots, MASK, alpha=1.0)
        torch.testing.assert_close(weights, torch.tensor([[1.0, 2, 1, 1, 1], [1.0, 1, 1, 2, 1]]), atol=1e-6, rtol=0)


def test_a_slot_with_one_member_takes_part_in_the_scaling() -> None:
    slots = torch.tensor([[[0, 1, 2], [1, 3, -1]]])
    weights = token_weights(torch.tensor([[1.0, 2.0, 0.0]]), slots, MASK, alpha=1.0)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 2, 1, 1, 1], [1.0, 1.5, 1, 2, 1]]), atol=1e-6, rtol=0)


def test_equal_divergences_give_no_weight() -> None:
    assert torch.equal(token_weights(torch.full((2, 2), 4.0), SLOTS, MASK), torch.ones(2, 5))


def test_a_frame_without_any_member_still_counts_in_the_paper_average() -> None:
    slots = torch.stack([SLOTS[0], torch.full((2, 2), -1)])
    divergence = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert token_weights(divergence, slots, MASK, alpha=2.0)[0, 2] == pytest.approx(1 + 2 * 1 / 2)
    assert token_weights(divergence, slots, MASK, alpha=2.0, average="member")[0, 2] == pytest.approx(3.0)


def test_normalised_weights_have_mean_one_over_each_responses_valid_tokens() -> None:
    mask = MASK.clone()
    mask[1, 4] = False
    slots = SLOTS.masked_fill(~mask[torch.arange(2)[None, :, None], SLOTS], -1)
    for average in ("frames", "member"):
        plain = token_weights(DIVERGENCE, slots, mask, alpha=2.0, average=average)
        weights = token_weights(DIVERGENCE, slots, mask, alpha=2.0, average=average, normalise="mean")
        for row, whole, valid in zip(weights, plain, mask, strict=True):
            torch.testing.assert_close(row[valid], whole[valid] / whole[valid].mean())
            assert bool((row[~valid] == 1).all())


def test_normalising_nothing_gives_exactly_one() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)  # no valid token, so no mean either
    slots = torch.full_like(SLOTS, -1)
    assert torch.equal(token_weights(DIVERGENCE, slots, nothing, normalise="mean"), torch.ones(2, 5))
    none = torch.zeros(0, 2, 3, dtype=torch.int64)
    assert torch.equal(token_weights(torch.zeros(0, 3), none, MASK, normalise="mean"), torch.ones(2, 5))


# No frame, no slot, neither.
@pytest.mark.parametrize(("K", "J"), [(0, 2), (0, 0), (2, 0)])
def test_nothing_selected_gives_exactly_one(K: int, J: int) -> None:
    weights = token_weights(torch.zeros(K, J), torch.zeros(K, 2, J, dtype=torch.int64), MASK)
    assert torch.equal(weights, torch.ones(2, 5))


def test_alpha_zero_gives_exactly_one() -> None:
    assert torch.equal(token_weights(DIVERGENCE, SLOTS, MASK, alpha=0.0), torch.ones(2, 5))


def test_masked_tokens_weigh_one_and_the_result_is_detached() -> None:
    mask = MASK.clone()
    mask[0, 2] = False
    weights = token_weights(DIVERGENCE.clone().requires_grad_(), SLOTS, mask, alpha=2.0)
    assert weights[0].tolist() == [1.0] * 5
    assert not weights.requires_grad


# Both averages: over the frames that a token has a slot of, and over members.
@pytest.mark.parametrize("average", ["frames", "member"])
def test_whole_chain_on_random_groups(average: str) -> None:
    """Loops as the specification reads against the vectorised result, which stays in 1..1 + alpha."""
    generator = torch.Generator().manual_seed(3)
    for G, N, F, top in ((2, 7, 3, 4), (8, 33, 16, 12), (3, 5, 2, 64)):
        mass = torch.rand(G, N, F, generator=generator)
        mask = torch.arange(N) < torch.randint(0, N + 1, (G, 1), generator=generator)
        frames = select_frames(mass, mask, torch.rand(G, generator=generator), strategy="all", top_tokens=3)
        slots = perception_slots(mass, mask, frames, top_tokens=top)
        divergence = torch.rand(slots.shape[0], slots.shape[2], generator=generator)
        weights = token_weights(divergence, slots, mask, average=average)

        bonus = [[[] for _ in range(N)] for _ in range(G)]
        for k in range(len(frames)):
            filled = [j for j in range(slots.shape[2]) if bool((slots[k, :, j] >= 0).any())]
            values = [float(divergence[k, j]) for j in filled]
            for i in range(G):
                for j in filled:
                    if slots[k, i, j] >= 0:
                        scaled = (float(divergence[k, j]) - min(values)) / (max(values) - min(values) + 1e-8)
                        bonus[i][int(slots[k, i, j])].append(scaled)
        K = len(frames)
        by_member = average == "member"
        expected = [[1 + 1.7 * (sum(b) / (len(b) if by_member else K) if b else 0.0) for b in row] for row in bonus]
        torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-5, rtol=0)
        assert weights.min() >= 1
        assert weights.max() <= 1 + 1.7 + 1e-5
        assert torch.equal(weights, token_weights(divergence, slots, mask, average=average))


def test_precision_of_the_result() -> None:
    assert token_weights(DIVERGENCE.bfloat16(), SLOTS, MASK).dtype == torch.float32
    assert token_weights(DIVERGENCE.double(), SLOTS.int(), MASK).dtype == torch.float64


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"divergence": DIVERGENCE[:1]}, "divergence"),
        ({"divergence": DIVERGENCE.long()}, "divergence"),
        ({"divergence": DIVERGENCE * torch.nan}, "divergence"),
        ({"slots": SLOTS[0]}, "slots"),
        ({"slots": SLOTS.float()}, "slots"),
        ({"slots": SLOTS + 1}, "slots"),
        ({"slots": SLOTS - 2}, "slots"),
        ({"mask": MASK[:1]}, "mask"),
        ({"mask": MASK.float()}, "mask"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"average": "tokens"}, "average"),
    ],
)
def test_token_weights_refuses(changed: dict, named: str) -> None:
    arguments = {"divergence": DIVERGENCE, "slots": SLOTS, "mask": MASK} | changed
    with pytest.raises(ValueError, match=f"token_weights: `{named}`: expected .* got "):
        token_weights(arguments.pop("divergence"), arguments.pop("slots"), arguments.pop("mask"), **arguments)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    std = math.sqrt(4 * 0.25 / 3)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5])
    torch.testing.assert_close(group_advantages(rewards), expected / (std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale="none"), expected)
    assert group_advantages(rewards).dtype == torch.float32


# Rewards whose mean rounds, and some that do not.
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.9, 1 / 3])
def test_equal_rewards_give_exactly_zero(value: float) -> None:
    for size in (1, 3, 7, 8):
        assert torch.equal(group_advantages(torch.full((size,), value)), torch.zeros(size))


def test_advantages_of_integer_rewards() -> None:
    assert torch.equal(group_advantages(torch.tensor([3, 1]), scale="none"), torch.tensor([1.0, -1.0]))


# Another shape, an empty group, a reward that is none, a scale that is none.
@pytest.mark.parametrize(
    ("rewards", "scale", "named"),
    [
        (torch.ones(2, 2), "group", "rewards"),
        (torch.ones(0), "group", "rewards"),
        (torch.tensor([1.0, torch.nan]), "group", "rewards"),
        (torch.ones(2), "batch", "scale"),
    ],
)
def test_group_advantages_refuses(rewards: torch.Tensor, scale: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"group_advantages: `{named}`"):
        group_advantages(rewards, scale=scale)


# Both averages: one scatters sums, the other does not.
@pytest.mark.gpu
@pytest.mark.parametrize("average", ["frames", "member"])
def test_a_gpu_gives_what_the_cpu_gives_and_the_same_each_time(average: str) -> None:
    generator = torch.Generator().manual_seed(5)
    mass = torch.rand(8, 384, 16, generator=generator)
    mask = torch.arange(384) < torch.randint(0, 385, (8, 1), generator=generator)
    rewards = torch.randint(0, 2, (8,), generator=generator).float()

    def chain(device: str) -> list[torch.Tensor]:
        m, k, r = (tensor.to(device) for tensor in (mass, mask, rewards))
        frames = select_frames(m, k, r, strategy="soft")
        slots = perception_slots(m, k, frames)
        divergence = torch.rand(slots.shape[0], slots.shape[2], generator=torch.Generator().manual_seed(6)).to(device)
        return [frames, slots, token_weights(divergence, slots, k, average=average), group_advantages(r)]

    expected, got, again = chain("cpu"), chain("cuda"), chain("cuda")
    for name, a, b, c in zip(("frames", "slots", "weights", "advantages"), expected, got, again, strict=True):
        assert b.is_cuda, name
        assert torch.equal(b, c), name
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-6 if a.is_floating_point() else 0)
