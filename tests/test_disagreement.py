"""slot_disagreement: by hand, the mixture's entropy against its definition, forks and copies, in other trainers."""

import math
from functools import partial

import pytest
import torch

from appo.config import APPOConfig, ConfigError
from appo.integrations.weights import group_weights
from appo.method.disagreement import slot_disagreement
from appo.method.selection import perception_slots, select_frames
from appo.method.token_weights import token_weights
from appo_kernels import group_divergence_from_logits

# Two frames, two responses, three slots; response 1 has one token fewer.
SLOTS = torch.tensor([[[0, 2, 3], [1, 2, -1]], [[1, 2, 3], [0, 1, -1]]])
ENTROPY = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, torch.nan]])


def nothing(slots):
    raise AssertionError("the divergence is not needed")


def entropy_of(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def random_group(G=5, N=7, V=11, scale=3.0):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(G, N, V, generator=generator, dtype=torch.float64)
    return logits, logits.logsumexp(-1), entropy_of(logits)


def test_entropy_is_each_members_own() -> None:
    found = slot_disagreement("entropy", SLOTS, nothing, ENTROPY)
    expected = [[[0.1, 0.3, 0.4], [2.0, 3.0, 0.0]], [[0.2, 0.3, 0.4], [1.0, 2.0, 0.0]]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_divergence_is_what_it_was() -> None:
    divergence = torch.rand(2, 3)
    assert slot_disagreement("divergence", SLOTS, lambda slots: divergence) is divergence


def test_mixture_is_the_entropy_of_the_mean_distribution() -> None:
    """Against the definition, members missing here and there."""
    logits, lse, entropy = random_group()
    generator = torch.Generator().manual_seed(4)
    slots = torch.stack([torch.randperm(7, generator=generator)[:4].sort().values for _ in range(10)]).view(2, 5, 4)
    slots = slots.masked_fill(torch.rand(slots.shape, generator=generator) < 0.3, -1)
    found = slot_disagreement("mixture", slots, partial(group_divergence_from_logits, logits, lse), entropy)
    for k, j in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        members = [logits[i, t].softmax(-1) for i, t in enumerate(slots[k, :, j].tolist()) if t >= 0]
        mean = torch.stack(members).mean(0)
        assert float(found[k, j]) == pytest.approx(float(-(mean * mean.log()).sum()), abs=1e-9)


def test_a_fork_has_entropy_and_a_copy_divergence() -> None:
    """Token 0: both members choose between two words. Token 1: each repeats its own. Token 2: both say the same."""
    logits = torch.full((2, 3, 4), -40.0)
    logits[:, 0, :2] = 0.0
    logits[0, 1, 0] = logits[1, 1, 1] = logits[:, 2, 3] = 0.0
    lse = logits.logsumexp(-1)
    entropy = entropy_of(logits)
    slots = torch.arange(3).expand(1, 2, 3)
    of = partial(group_divergence_from_logits, logits, lse)
    fork, copy, same = slot_disagreement("divergence", slots, of)[0].tolist()
    assert copy == pytest.approx(math.log(2), abs=1e-5) and max(fork, same) < 1e-5
    fork, copy, same = slot_disagreement("entropy", slots, nothing, entropy)[0].mean(0).tolist()
    assert fork == pytest.approx(math.log(2), abs=1e-5) and max(copy, same) < 1e-5
    fork, copy, same = slot_disagreement("mixture", slots, of, entropy)[0].tolist()
    assert fork == pytest.approx(math.log(2), abs=1e-5) == copy and same < 1e-5


def test_members_values_are_scaled_over_the_whole_frame() -> None:
    values = slot_disagreement("entropy", SLOTS[:1], nothing, ENTROPY)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    weights = token_weights(values, SLOTS[:1], mask, alpha=1.0)
    # From 0.1 to 3.0; the missing member's 0 is not the least.
    expected = [[1.0, 1.0, 1 + 0.2 / 2.9, 1 + 0.3 / 2.9], [1.0, 1 + 1.9 / 2.9, 2.0, 1.0]]
    torch.testing.assert_close(weights, torch.tensor(expected))
    values[0, 1, 2] = torch.nan  # at the missing member
    assert torch.equal(token_weights(values, SLOTS[:1], mask, alpha=1.0), weights)
    values[0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="`divergence`: expected finite values"):
        token_weights(values, SLOTS[:1], mask)
    with pytest.raises(ValueError, match="`divergence`: expected shape"):
        token_weights(values[..., :2], SLOTS[:1], mask)


def test_no_frames_and_no_tokens_are_no_fault() -> None:
    none = torch.zeros(0, 2, 3, dtype=torch.int64)
    assert slot_disagreement("entropy", none, nothing, ENTROPY).shape == (0, 2, 3)
    empty = torch.full((1, 2, 0), -1)
    assert slot_disagreement("entropy", empty, nothing, torch.zeros(2, 0)).shape == (1, 2, 0)


def test_refusals_name_the_argument() -> None:
    with pytest.raises(ValueError, match="slot_disagreement: `kind`: expected one of divergence, entropy, mixture"):
        slot_disagreement("fork", SLOTS, nothing, ENTROPY)
    with pytest.raises(ValueError, match=r"slot_disagreement: `entropy`: expected shape \(G, N\) with G = 2"):
        slot_disagreement("entropy", SLOTS, nothing)
    with pytest.raises(ConfigError, match="`divergence`: expected kl with disagreement = mixture"):
        APPOConfig(disagreement="mixture", divergence="k3").check()
    with pytest.raises(ConfigError, match="`disagreement`: expected divergence with method = tw-grpo"):
        APPOConfig(method="tw-grpo", disagreement="entropy").check()


# All kinds: one comes from the operator, one from entropies, one from both.
@pytest.mark.parametrize("kind", ["divergence", "entropy", "mixture"])
def test_other_trainers_get_the_same_weights(kind: str) -> None:
    """group_weights of two groups against the three functions, one group after the other."""
    logits = random_group(G=6, N=9, V=13)[0].float()
    hidden, weight, entropy = logits, torch.eye(13), entropy_of(logits)
    generator = torch.Generator().manual_seed(5)
    mass, targets = torch.rand(6, 9, 4, generator=generator), torch.randint(13, (6, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 5, 7, 1, 9, 3])[:, None]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    config = APPOConfig(strategy="common", top_tokens=2, top_frames=2, slot_tokens=3, disagreement=kind)
    found = group_weights(mass, mask, rewards, hidden, weight, targets, config=config, group_size=3)
    for own in (slice(0, 3), slice(3, 6)):
        frames = select_frames(mass[own], mask[own], rewards[own], strategy="common", top_tokens=2, top_frames=2)
        slots = perception_slots(mass[own], mask[own], frames, top_tokens=3)
        of = partial(group_divergence_from_logits, logits[own], logits[own].logsumexp(-1))
        values = slot_disagreement(kind, slots, of, entropy[own])
        torch.testing.assert_close(found.weights[own], token_weights(values, slots, mask[own]), atol=1e-4, rtol=1e-4)
