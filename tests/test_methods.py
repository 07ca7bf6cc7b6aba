"""Other methods on the same operators: weights and losses against dense computations, settings, and training steps."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from torch import Tensor

from appo.config import APPOConfig, ConfigError
from appo.method.attention_policy import attention_divergence, attention_loss
from appo.method.selection import position_slots
from appo.method.visual_dependence import filtered_weights, gated_weights, top_share
from appo.models.loaded import disable_checkpointing
from appo.presets import OTHER_METHODS, PRESETS
from appo.train.groups import Group, batch_parts, whole_groups
from appo.train.rules import weigh_tokens
from appo.train.scoring import filter_tokens
from appo.train.trainer import Trainer
from appo_kernels import group_divergence

G, N, F, V, D = 4, 7, 3, 60, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """Responses of 7, 5, 3 and 1 tokens."""
    return torch.arange(N) < torch.tensor([7, 5, 3, 1])[:, None]


def shares(seed: int = 0, batch: int = G, length: int = N) -> Tensor:
    """(B, N, F): what is left to 1 is no frame's."""
    return random(batch, length, F + 1, seed=seed).softmax(-1)[..., :F]


def group(**known: Tensor) -> Group:
    fields = {field.name: None for field in dataclasses.fields(Group)}
    return Group(**fields | {"mask": mask(), "rollout_logprobs": torch.zeros(G, N)} | known)  # type: ignore[arg-type]


def test_tw_grpo_is_the_authors_divergence_over_dense_logits() -> None:
    hidden, weight = random(G, N, D), random(V, D, seed=1)
    logits = hidden @ weight.t()
    logp = logits.log_softmax(-1).where(mask()[..., None], torch.tensor(-math.log(V)))
    ratio = (logp.mean(0, keepdim=True) - logp).clamp(-11, 11)
    k3 = (ratio.exp() - ratio - 1).sum(-1).mean(0)
    dense = 1 + 0.7 * (k3 - k3.min()) / (k3.max() - k3.min() + 1e-8)
    config = APPOConfig.preset("tw-grpo")

    def divergence(slots: Tensor) -> Tensor:
        return group_divergence(hidden, weight, logits.logsumexp(-1), slots, kind=config.divergence)

    weights = weigh_tokens(group(), divergence, config)
    torch.testing.assert_close(weights, dense.expand(G, N).where(mask(), torch.ones(())), atol=1e-6, rtol=0)
    assert position_slots(mask())[0, 1].tolist() == [0, 1, 2, 3, 4, -1, -1]


# The share of VPPO, one that rounds to a single token, and all.
@pytest.mark.parametrize(("share", "counts"), [(0.4, [3, 2, 2, 1]), (0.2, [2, 1, 1, 1]), (1.0, [7, 5, 3, 1])])
def test_the_filter_keeps_the_tokens_that_look_most(share: float, counts: list[int]) -> None:
    score = shares().sum(-1).masked_fill(~mask(), torch.nan)
    kept = top_share(score, mask(), share=share)
    assert kept.sum(1).tolist() == counts
    for row, values, valid in zip(kept, score, mask(), strict=True):
        if not bool(row[valid].all()):
            assert float(values[row].min()) >= float(values[valid & ~row].max())
    assert top_share(torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool), share=0.4).tolist() == [
        [True, True, False, False, False]
    ]


def test_vppo_scales_responses_by_how_much_they_look_and_its_mean_factor_is_one() -> None:
    mass, config = shares(), APPOConfig.preset("vppo")
    weights = weigh_tokens(group(mass=mass), lambda slots: slots, config)
    score = mass.sum(-1)
    means = torch.stack([row[valid].mean() for row, valid in zip(score, mask(), strict=True)])
    place = (means - means.min()) / (means.max() - means.min())
    factor = 0.9 + place * 0.1 / place.mean()
    assert torch.equal(weights > 0, top_share(score, mask(), share=0.4))
    torch.testing.assert_close(weights.amax(1), factor)
    torch.testing.assert_close(factor.mean(), torch.tensor(1.0))
    # Equal responses have the factor 1, and empty ones take no part.
    same = filtered_weights(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), share=1.0, floor=0.5)
    assert torch.equal(same, torch.ones(2, 3))
    nobody = filtered_weights(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), share=1.0, floor=0.5)
    assert torch.equal(nobody, torch.zeros(2, 3))


def test_pgpo_moves_credit_to_the_tokens_that_look_and_adds_none() -> None:
    mass, config = shares(), APPOConfig.preset("pgpo")
    weights = weigh_tokens(group(mass=mass), lambda slots: slots, config)
    score = mass.sum(-1)
    for row, values, valid in zip(weights, score, mask(), strict=True):
        own = values[valid]
        place = (own - own.min()) / (own.max() - own.min() + 1e-8)
        passed = own >= own.sort(descending=True).values[math.ceil(0.4 * len(own)) - 1]
        raw = 1 + 1.7 * place * passed
        torch.testing.assert_close(row[valid], raw / raw.mean())
        assert float(row[valid].sum()) == pytest.approx(len(own), rel=1e-6)
    plain = gated_weights(score, mask(), share=0.4, alpha=0.0, normalise=None)
    assert torch.equal(plain, torch.ones(G, N))


def test_top_entropy_keeps_a_fifth_of_the_batch() -> None:
    entropies = [random(G, N, seed=seed).exp() for seed in (0, 1)]
    groups = [group(entropy=entropy, old_logprobs=torch.zeros(G, N)) for entropy in entropies]
    filter_tokens(groups, APPOConfig.preset("top-entropy"))
    valid = torch.cat([entropy[mask()] for entropy in entropies])
    limit = torch.quantile(valid.double(), 0.8)
    for one, entropy in zip(groups, entropies, strict=True):
        assert one.weights is not None
        assert torch.equal(one.weights, ((entropy.double() >= limit) & mask()).float())
    filter_tokens([], APPOConfig.preset("top-entropy"))  # a process without a group calls alike


def test_off_policy_responses_are_dropped_on_top_of_other_weights() -> None:
    sampled = torch.zeros(G, N)
    sampled[1] = 1.0
    one = group(
        old_logprobs=torch.zeros(G, N), rollout_logprobs=sampled, advantages=torch.tensor([1.0, -1.0, -1.0, 1.0])
    )
    one.weights = torch.full((G, N), 2.0)
    filter_tokens([one], APPOConfig(off_policy_threshold=0.5))
    assert one.weights[mask()].unique().tolist() == [0.0, 2.0] and not bool(one.weights[1].any())


def dense_jsd(now: Tensor, old: Tensor) -> Tensor:
    """By its definition, in fp64, over frames and the rest."""
    p, q = (torch.cat([x.double(), 1 - x.double().sum(-1, keepdim=True)], -1) for x in (now, old))
    m = (p + q) / 2
    return 0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1)


def test_attention_divergence_and_its_gradient_are_those_of_the_definition() -> None:
    now, old = shares(0).requires_grad_(), shares(1)
    found = attention_divergence(now, old)
    torch.testing.assert_close(found, dense_jsd(now, old).float(), atol=1e-6, rtol=1e-5)
    slope = random(G, N, seed=5)
    got, want = (torch.autograd.grad((x * slope).sum(), now)[0] for x in (found, dense_jsd(now, old)))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert float(attention_divergence(old, old).abs().max()) < 1e-7
    # As far apart as can be: one looks at the first frame alone, the other at no frame.
    one = torch.tensor([[[1.0, 0.0, 0.0]]])
    assert float(attention_divergence(one, torch.zeros(1, 1, 3))) == pytest.approx(math.log(2))


def test_a_frame_without_keys_gives_a_finite_gradient() -> None:
    now = torch.tensor([[[0.3, 0.0, 0.0]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(attention_divergence(now, torch.tensor([[[0.2, 0.0, 0.1]]])).sum(), now)
    assert bool(gradient.isfinite().all())
    (still,) = torch.autograd.grad(attention_divergence(now, now.detach()).sum(), now)
    assert float(still.abs().max()) < 1e-6


# Every aggregation that the policy loss has.
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_attention_loss_is_aggregated_like_the_policy_loss(aggregation: str) -> None:
    now, old, advantages = shares(0).requires_grad_(), shares(1), torch.tensor([1.0, -0.5, 2.0, -1.0])
    rubbish = torch.where(mask()[..., None], now, torch.nan)
    loss, mean = attention_loss(rubbish, old, advantages, mask(), aggregation=aggregation, num_items=40, max_length=9)
    terms = dense_jsd(now, old) * advantages[:, None] * mask()
    lengths = mask().sum(1)
    want = {
        "dapo": terms.sum() / 40, "bnpo": terms.sum() / lengths.sum(), "dr_grpo": terms.sum() / (G * 9),
        "grpo": (terms.sum(1) / lengths).mean(),
    }[aggregation]  # fmt: skip
    torch.testing.assert_close(loss, want.float())
    torch.testing.assert_close(mean, (dense_jsd(now, old) * mask()).sum().float() / lengths.sum())
    got, dense = (torch.autograd.grad(x, now)[0] for x in (loss, want))
    torch.testing.assert_close(got, dense, atol=1e-7, rtol=1e-5)


# More than 1, negative, without a dimension, whole numbers.
@pytest.mark.parametrize("wrong", [shares() * 3, shares() - 1, shares()[0], shares().long()])
def test_masses_that_are_no_shares_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_divergence: `(old_)?mass`"):
        attention_divergence(wrong, shares())


# Settings that cannot stand beside each other, and the one that the message names.
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"method": "vppo"}, "mass_reduction"),
        ({"method": "pgpo"}, "mass_reduction"),
        ({"attention_coef": 0.5, "updates_per_step": 2}, "mass_reduction"),
        ({"attention_coef": 0.5, "mass_reduction": "sum"}, "updates_per_step"),
        ({"method": "grpo", "normalise": "mean"}, "normalise"),
        ({"kind": "dppo_tv", "level": "sequence"}, "level"),
        ({"kl_ratio": True}, "beta"),
        ({"kind": "cispo", "delta": 4.0}, "delta"),
        ({"entropy_share": 0.0}, "entropy_share"),
        ({"token_share": 1.5}, "token_share"),
        ({"kind": "vespo"}, "kind"),
    ],
)
def test_settings_that_cannot_stand_together_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^`{named}`: expected"):
        APPOConfig.from_dict(settings)


def test_presets_by_name() -> None:
    for name, settings in PRESETS.items():
        config = APPOConfig.from_dict({"preset": name}, ["learning_rate=2e-6"])
        assert config == APPOConfig.preset(name, learning_rate=2e-6)
        assert all(getattr(config, field) == value for field, value in settings.items())
    assert APPOConfig.preset("ral", prompts_per_step=3).updates_per_step == 3
    assert APPOConfig.preset("ral").updates_per_step == 4
    with pytest.raises(ConfigError, match=r"`preset`: expected one of paper, .*, tw-grpo"):
        APPOConfig.preset("best")


def trained(tmp_path: Path, **settings: object) -> tuple[Trainer, list[dict[str, float]]]:
    config = training.config(tmp_path / "run", **settings)
    model, processor = training.tiny()
    trainer = Trainer(model, processor, training.records(), config=config)
    return trainer, [trainer.step(number) for number in (1, 2)]


# Those of other papers: the paper's own are trained throughout these tests.
@pytest.mark.parametrize("preset", list(OTHER_METHODS))
def test_each_preset_trains(preset: str, tmp_path: Path) -> None:
    trainer, steps = trained(tmp_path, preset=preset)
    assert all(math.isfinite(value) for step in steps for name, value in step.items() if name.startswith("loss"))
    scored = [one for one in trainer.groups if one.scored]
    assert scored and (preset == "ral" or all(one.weights is not None for one in scored))
    if preset == "ral":
        assert steps[-1]["attention/divergence"] > 0
    else:
        weights = torch.cat([one.weights[one.mask] for one in scored])
        assert float(weights.std()) > 0, "weights that are all equal are no method"


# Separate sequences and packed groups, with and without recomputation; adapters alone.
@pytest.mark.parametrize("settings", [
    {"share_prompt": "off"}, {"share_prompt": "on"}, {"share_prompt": "on", "gradient_checkpointing": True},
    {"share_prompt": "off", "gradient_checkpointing": True}, {"lora_rank": 4, "freeze_vision": True},
])  # fmt: skip
def test_the_update_on_attention_is_that_of_eager_weights(settings: dict[str, object], tmp_path: Path) -> None:
    """The gradient of attention's part alone, in a trainer, against autograd through the model's own weights."""
    if "lora_rank" in settings:
        pytest.importorskip("peft")
    model, processor = training.tiny()
    config = training.config(tmp_path / "run", preset="ral", **settings)
    trainer = Trainer(model, processor, training.records(), config=config)
    groups = trainer.reward(trainer.rollout(2))
    parts = whole_groups(groups)
    trainer.score(parts)
    trainer.advantage(groups)
    for one in groups:
        assert one.mass is not None
        one.advantages = torch.tensor([1.0, -0.5, 2.0, -1.0])
        one.mass = (one.mass * torch.linspace(0.2, 1.0, one.mass.shape[-1])).clone()  # another policy's
    trainer.policy.train()

    def slope(coefficient: float) -> Tensor:
        trainer.config.attention_coef = coefficient
        trainer.policy.zero_grad()
        trainer.loss(parts, 100.0, 8.0).backward()
        found = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.policy.parameters() if p.requires_grad
        ]
        return torch.cat([g.flatten() for g in found]).double()

    ours = slope(3.0) - slope(0.0)
    # The same by eager attention, response by response.
    trainer.policy.zero_grad()
    causal: Any = trainer.unwrapped.causal
    policy = trainer.unwrapped
    policy.share_prompt = False
    causal.set_attn_implementation("eager")
    batch = batch_parts(parts, trainer.pad_id, "cpu")
    sequences = policy.sequences(batch)
    weights: list[Tensor] = []
    layer = causal.get_decoder().layers[-1].self_attn
    handle = layer.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    if config.gradient_checkpointing:
        disable_checkpointing(causal)
    policy(batch, lambda hidden, weight, bias: hidden, sequences)
    handle.remove()
    one_hot = (sequences.frame_ids[:, :, None] == torch.arange(batch.prompts.num_frames)).float()
    mass = (weights[0].mean(1) @ one_hot).gather(1, sequences.rows[..., None].expand(-1, -1, batch.prompts.num_frames))
    old = torch.zeros_like(mass)
    for index, one in enumerate(groups):
        old[4 * index : 4 * index + 4, : one.mass.shape[1], : one.mass.shape[2]] = one.mass
    terms = dense_jsd(mass, old) * torch.tensor([1.0, -0.5, 2.0, -1.0] * 2)[:, None] * batch.mask
    (3.0 * terms.sum() / 100.0).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.policy.parameters() if p.requires_grad]
    want = torch.cat([g.flatten() for g in found]).double()
    assert float(want.norm()) > 0
    assert float((ours - want).norm() / want.norm()) < 1e-4  # the difference of two gradients loses digits
