"""The one function of all adapters: every method's rule as in the trainer, group by group, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from appo import perception_slots, select_frames, token_weights
from appo.config import APPOConfig, ConfigError
from appo.integrations import group_weights
from appo.integrations.weights import Responses
from appo.rollout.user_code import UserCodeError
from appo.settings_together import METHODS
from appo.train.rules import RULES, weigh_tokens
from appo_kernels.ops.group_divergence import reference

G, N, F, V, D = 3, 6, 4, 23, 8


def inputs() -> dict[str, Tensor]:
    """Two groups of three responses, the second of a clip of two frames; tokens of padding and of a tool."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(2 * G, N, F, generator=generator).softmax(-1) / 2
    mass[G:, :, 2:] = 0
    mask = torch.arange(N) < torch.tensor([6, 4, 1, 5, 6, 3])[:, None]
    mask[1, 2] = False
    return {
        "mass": mass, "mask": mask, "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]),
        "hidden": torch.randn(2 * G, N, D, generator=generator), "weight": torch.randn(V, D, generator=generator),
        "targets": torch.randint(V, (2 * G, N), generator=generator),
    }  # fmt: skip


def own_rule(folder: Path, returned: str) -> APPOConfig:
    """A rule of a file, which returns an expression."""
    (folder / "mine.py").write_text(f"def weigh(group, divergence, config):\n    return {returned}\n")
    return APPOConfig(method=f"{folder}/mine.py:weigh")


def rule(method: str, folder: Path) -> APPOConfig:
    if method == "own":
        return own_rule(folder, "group.mass.amax(-1) * group.entropy")
    if method == "appo":
        return APPOConfig(strategy="all", top_tokens=2, slot_tokens=3)
    return APPOConfig.preset(method)


def test_every_method_has_a_rule() -> None:
    assert set(RULES) == set(METHODS) - {"grpo"}


# Every rule there is, and one of a file.
@pytest.mark.parametrize("method", [*RULES, "own"])
def test_each_group_is_weighed_by_the_rule_of_the_trainer(method: str, tmp_path: Path) -> None:
    """Against dense logits, with the frames that a group has, as if it stood alone."""
    given, config = inputs(), rule(method, tmp_path)
    found = group_weights(**given, config=config, group_size=G, temperature=0.8)
    logits = given["hidden"] @ given["weight"].t() / 0.8
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    for start, frames in ((0, 4), (G, 2)):
        own = slice(start, start + G)
        group = Responses(given["mask"][own], given["rewards"][own], given["mass"][own, :, :frames], entropy[own], None)
        if method == "appo":
            group.target_frames = select_frames(
                group.mass, group.mask, group.accuracy, strategy="all", top_tokens=2, top_frames=3
            )
            assert torch.equal(found.frames[start // G], group.target_frames)

        def divergence(slots: Tensor, own: slice = own) -> Tensor:
            return reference.group_divergence_from_logits(
                logits[own], logits[own].logsumexp(-1), slots, kind=config.divergence
            )

        expected = weigh_tokens(group, divergence, config)
        torch.testing.assert_close(found.weights[own], expected, rtol=1e-4, atol=1e-4)
        assert float(expected[group.mask].std()) > 0
    expected = logp.gather(-1, given["targets"][..., None])[..., 0].masked_fill(~given["mask"], 0)
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_appo_is_its_definition() -> None:
    given, config = inputs(), rule("appo", Path())
    own = {name: value if name == "weight" else value[:G] for name, value in given.items()}
    found = group_weights(**own, config=config, group_size=G)
    frames = select_frames(own["mass"], own["mask"], own["rewards"], strategy="all", top_tokens=2, top_frames=3)
    slots = perception_slots(own["mass"], own["mask"], frames, top_tokens=3)
    logits = own["hidden"] @ own["weight"].t()
    divergence = reference.group_divergence_from_logits(logits, logits.logsumexp(-1), slots)
    torch.testing.assert_close(found.weights, token_weights(divergence, slots, own["mask"]), rtol=1e-4, atol=1e-4)


# With key frames, by mass, by a file; and no method, which frames do not bring weights.
@pytest.mark.parametrize("method", ["appo", "vppo", "own", "grpo"])
def test_groups_without_frames_or_method_have_weights_of_one(method: str, tmp_path: Path) -> None:
    given, config = inputs(), rule(method, tmp_path)
    given["mass"] = given["mass"] * (method == "grpo")
    found = group_weights(**given, config=config, group_size=G)
    assert torch.equal(found.weights, torch.ones(2 * G, N)) and [len(frames) for frames in found.frames] == [0, 0]
    given["mass"] = given["mass"][..., :0]
    assert torch.equal(group_weights(**given, config=config, group_size=G).weights, torch.ones(2 * G, N))


# No tensor, another shape, a negative weight and one that is no number, at one valid token and at all; an error.
@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ("None", "`weights`: expected a torch.Tensor, got None"),
        ("group.mask[0]", "`weights`: expected .*shape"),
        ("-group.entropy", r"`weights`: expected .*>= 0 .*got -[\d.]+ at response 0, token 0 \(\d+ such\)"),
        (
            "group.mask.float().index_fill(1, group.mask[0].nonzero()[0], float('nan'))",
            "`weights`: expected finite .*got nan at response 0",
        ),
        ("group.mass[9]", r"IndexError: .* \(mine\.py, line \d\)"),
    ],
)
def test_a_rule_that_fails_or_returns_other_things_is_named(returned: str, named: str, tmp_path: Path) -> None:
    config = own_rule(tmp_path, returned)
    with pytest.raises(UserCodeError, match=rf"method .*mine\.py:weigh: {named}"):
        group_weights(**inputs(), config=config, group_size=G)


def test_what_is_masked_may_be_anything(tmp_path: Path) -> None:
    config = own_rule(tmp_path, "group.entropy.masked_fill(~group.mask, float('nan'))")
    found = group_weights(**inputs(), config=config, group_size=G)
    assert bool((found.weights[~inputs()["mask"]] == 1).all()) and bool(found.weights.isfinite().all())


# A name that is none, one that is nearly a method's, a file that is not there, a file alone.
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"method": "looks"},
            "`method`: expected one of appo, grpo, pgpo, tw-grpo, vppo, or FILE.py:NAME, got 'looks'",
        ),
        ({"method": "vpo"}, "Did you mean"),
        ({"method": "nowhere.py:weigh"}, "`method`: .*no such file"),
        ({"method": "nowhere.py"}, "or FILE.py:NAME, got 'nowhere.py'. The function's name is missing."),
        ({"rewards": {"nowhere.py:": 1.0}}, "The function's name is missing"),
    ],
)
def test_unknown_methods_are_refused_by_the_settings(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        APPOConfig(**settings)


def test_more_than_weights_is_refused() -> None:
    for changes in ({"entropy_share": 0.2}, {"off_policy_threshold": 0.5}):
        with pytest.raises(ValueError, match=f"expected {next(iter(changes))} = "):
            group_weights(**inputs(), config=APPOConfig(**changes), group_size=G)
    with pytest.raises(ValueError, match="group_size"):
        group_weights(**inputs(), config=APPOConfig(), group_size=4)
