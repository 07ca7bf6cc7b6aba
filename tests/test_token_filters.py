"""Token filters against their definitions, and what wrong arguments say."""

import math

import pytest
import torch

from appo.method.token_filters import off_policy_sequences, top_entropy_tokens


def test_off_policy_sequences_by_hand() -> None:
    """Means of 0.5: kept with A >= 0 whatever they are, dropped with A < 0 above the threshold; NaN counts as 0."""
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [-1.0, -9.0]])
    sampled = torch.tensor([[-0.5, -1.5], [-0.5, -1.5], [-0.5, math.nan], [-0.5, 9.0]])
    mask = torch.tensor([[True, True]] * 3 + [[True, False]])
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    got = off_policy_sequences(logprobs, sampled, advantages, mask, threshold=0.4)
    assert got.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert off_policy_sequences(logprobs, sampled, advantages, mask, threshold=0.5).tolist() == mask.float().tolist()
    signs = torch.tensor([[1.0, -1.0]] * 4)
    assert off_policy_sequences(logprobs, sampled, signs, mask, threshold=0.4).tolist()[1] == [1, 0]


# Shares that fall on a token, between two, on all of them; an odd number of tokens.
@pytest.mark.parametrize("share", [0.2, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [5, 12])
def test_top_entropy_tokens_reach_the_quantile(share: float, tokens: int) -> None:
    entropy = torch.rand(3, tokens, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(tokens) < torch.tensor([[tokens], [2], [0]])
    entropy[~mask] = math.nan
    kept = top_entropy_tokens(entropy, mask, share=share).bool()
    assert torch.equal(kept, mask & (entropy >= torch.quantile(entropy[mask], 1 - share)))
    assert not top_entropy_tokens(entropy, torch.zeros_like(mask), share=share).any()


# None, more than all, not a number, text, a truth value.
@pytest.mark.parametrize("share", [0.0, 1.5, math.nan, "0.2", True])
def test_wrong_share(share: object) -> None:
    with pytest.raises(ValueError, match=r"^top_entropy_tokens: `share`: expected a number in \(0, 1\], got"):
        top_entropy_tokens(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), share=share)  # type: ignore[arg-type]


def test_wrong_tensors() -> None:
    good = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3, dtype=torch.bool)
    for place, name in enumerate(("logprobs", "sampled_logprobs", "advantages", "mask")):
        for wrong in (None, [[0.0]], torch.zeros(4, 5, 6), torch.zeros(2, 3).long()):
            arguments = [*good[:place], wrong, *good[place + 1 :]]
            with pytest.raises(ValueError, match=rf"^off_policy_sequences: `{name}`: expected"):
                off_policy_sequences(*arguments, threshold=0.1)
