"""One training step: one step whatever the micro-batches, repeatable, resumable, and its records kept."""

import json
import os
import signal

import pytest
import torch
import training

from appo.train.groups import whole_groups
from appo.train.interrupt import Stopped
from appo.train.trainer import Trainer


def run(output, **changes):
    model, processor = training.tiny()
    trainer = Trainer(model, processor, training.records(), config=training.config(output, **changes))
    trainer.train()
    return trainer


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_time(record):
    return {key: value for key, value in record.items() if not key.startswith(("time/", "memory/"))}


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_step_leaves_its_numbers_and_moves_the_model(tmp_path):
    before, _ = training.tiny()
    trainer = run(tmp_path, max_steps=1)
    (metrics,) = lines(tmp_path)
    named = {"loss", "reward", "accuracy", "entropy", "grad_norm", "lr", "length/mean", "clip/low", "clip/high"}
    named |= {"weight/mean", "weight/max", "frames/target", "frames/recall", "groups/no_signal", "time/rollout"}
    named |= {
        "time/score",
        "time/update",
        "time/step",
        "memory/peak_gib",
        "mass/frames",
        "length/clipped",
        "time/weights",
        "reward/length_parity",
    }
    assert named <= metrics.keys()
    assert 0 < metrics["mass/frames"] < 1 and metrics["length/clipped"] > 0
    assert metrics["grad_norm"] > 0 and metrics["weight/max"] > 1 and metrics["entropy"] > 0
    moved = [n for n, p in before.state_dict().items() if not torch.equal(p, trainer.model.state_dict()[n])]
    assert (
        any("lm_head" in n for n in moved) and any("layers.0" in n for n in moved) and any("visual" in n for n in moved)
    )
    (sample,) = lines(tmp_path, "samples.jsonl")
    completion = sample["completions"][0]
    assert len(sample["completions"]) == 4 and len(completion["tokens"]) == len(completion["weights"])
    assert (tmp_path / "final" / "config.json").is_file() and (tmp_path / "config.yaml").is_file()


# Every way to divide a sum must give the gradient of one batch: by tokens, by responses, by a fixed length.
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_micro_batches_add_up_to_one_batch(tmp_path, aggregation):
    model, processor = training.tiny()
    settings = training.config(tmp_path, aggregation=aggregation, entropy_coef=0.01)
    trainer = Trainer(model, processor, training.records(), config=settings)
    trainer.policy.eval()
    groups = trainer.reward(trainer.rollout(4))
    for micro in trainer.micro_batches(groups):
        trainer.score(micro)
    trainer.advantage(groups)
    tokens, responses = sum(g.tokens for g in groups), 4 * len(groups)

    def gradient(size, limit=0):
        trainer.config.micro_groups, trainer.config.micro_tokens = size, limit
        trainer.policy.zero_grad()
        for part in trainer.micro_batches(groups):
            trainer.loss(part, tokens, responses).backward()
        return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])

    whole = gradient(4)
    assert whole.norm() > 0
    # Groups one by one; groups split by responses, down to one response at a time.
    for size, limit in ((1, 0), (4, len(groups[0].prompt) + 14), (4, 1)):
        assert float((gradient(size, limit) - whole).norm() / whole.norm()) < 1e-5


def test_scoring_on_policy_gives_ratio_one_and_the_rollout_log_probabilities(tmp_path):
    model, processor = training.tiny()
    trainer = Trainer(model, processor, training.records(), config=training.config(tmp_path))
    trainer.policy.eval()
    groups = trainer.reward(trainer.rollout(4))
    trainer.score(whole_groups(groups))
    trainer.select(groups)
    trainer.weigh(groups)
    trainer.advantage(groups)
    for group in groups:
        mask = group.mask
        torch.testing.assert_close(group.old_logprobs[mask], group.rollout_logprobs[mask], rtol=1e-4, atol=1e-4)
        assert (group.old_logprobs[~mask] == 0).all() and (group.weights >= 1).all()
        assert group.mass.shape == (*mask.shape, 8) and len(group.target_frames) > 0
    trainer.loss(whole_groups(groups), sum(g.tokens for g in groups), 16)
    found = trainer.meter.means()
    assert abs(found["ratio/max"] - 1) < 1e-4 and abs(found["kl/approx"]) < 1e-6 and found["clip/high"] == 0


def test_weights_of_one_are_grpo(tmp_path):
    """alpha = 0 and method "grpo" are the same step, bit for bit."""
    same = {"max_steps": 2, "updates_per_step": 2}
    first = weights_of(run(tmp_path / "a", alpha=0.0, **same))
    second = weights_of(run(tmp_path / "b", method="grpo", **same))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "weight/mean" not in lines(tmp_path / "b")[0]


def test_a_run_repeats_and_a_stopped_one_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = run(tmp_path / "whole", max_steps=3, updates_per_step=2, learning_rate=1e-3, lr_schedule="cosine")
    changes = {"updates_per_step": 2, "lr_schedule": "cosine", "max_steps": 3}
    model, processor = training.tiny()
    first = Trainer(model, processor, training.records(), config=training.config(tmp_path / "parts", **changes))
    step = first.step

    def interrupted(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(number)

    first.step = interrupted
    with pytest.raises(Stopped):
        first.train()
    assert [record["step"] for record in lines(tmp_path / "parts")] == [1, 2]
    assert not (tmp_path / "parts" / "final").exists()
    model, processor = training.tiny(seed=9)  # other weights: those of the checkpoint must replace them
    second = Trainer(model, processor, training.records(), config=training.config(tmp_path / "parts", **changes))
    second.train()
    assert [without_time(r) for r in lines(tmp_path / "parts")] == [without_time(r) for r in lines(tmp_path / "whole")]
    resumed = weights_of(second)
    assert all(torch.equal(value, resumed[name]) for name, value in weights_of(whole).items())


def test_groups_without_signal_are_replaced_and_too_few_make_no_update(tmp_path):
    before, _ = training.tiny()
    changes = {"rewards": {"constant": 1.0}, "dynamic_sampling": True, "max_sampling_rounds": 2, "max_steps": 1}
    trainer = run(tmp_path, **changes)
    (metrics,) = lines(tmp_path)
    assert metrics["groups/no_signal"] == 1 and metrics["updates/skipped"] == 1 and "loss" not in metrics
    assert trainer.sampler.taken == 8, "two rounds of four prompts"
    assert all(torch.equal(p, trainer.model.state_dict()[n]) for n, p in before.state_dict().items())


def test_groups_without_signal_are_not_scored_but_count_in_the_mean(tmp_path):
    def gradient(score_all):
        model, processor = training.tiny()
        trainer = Trainer(
            model, processor, training.records(), config=training.config(tmp_path, micro_groups=1, sample_every=0)
        )
        reward, score, update, scored, gradients = trainer.reward, trainer.score, trainer.update, [], []

        def without_signal(sampled):
            groups = reward(sampled)
            for number, group in enumerate(groups):
                group.rewards = torch.arange(4.0) if number > 1 else torch.zeros(4)
            return groups

        def record(parts):
            scored.extend(part.group for part in parts)
            score(parts)

        def update_all(groups, number):
            score(whole_groups(groups[2:]))
            update(groups, number)

        trainer.reward, trainer.score = without_signal, record
        if score_all:
            trainer.update = update_all
        trainer.updates.optimizer.step = lambda: gradients.extend(p.grad.clone() for p in trainer.policy.parameters())
        trainer.step(2)
        assert len(scored) == 2 and all(group.informative for group in scored)
        return torch.cat([part.flatten() for part in gradients])

    alone, among_all = gradient(False), gradient(True)
    assert alone.norm() > 0
    torch.testing.assert_close(alone, among_all, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))


def test_adapters_start_by_the_seed_of_the_run(tmp_path):
    def adapters(seed):
        torch.manual_seed(torch.seed())  # whatever the process did before
        model, processor = training.tiny()
        settings = training.config(tmp_path, lora_rank=2, seed=seed)
        return weights_of(Trainer(model, processor, training.records(), config=settings))

    first, again, other = adapters(1), adapters(1), adapters(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items() if "lora_A" in name)


def test_adapters_on_the_head_are_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="`lora_targets`: expected modules before the language-model head"):
        run(tmp_path, lora_rank=2, lora_targets=["q_proj", "lm_head"])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lora_and_gradient_checkpointing_train_adapters_only(tmp_path):
    before, _ = training.tiny()
    changes = {"lora_rank": 2, "gradient_checkpointing": True, "freeze_vision": True, "beta": 0.1, "max_steps": 2}
    trainer = run(tmp_path, **changes)
    assert (tmp_path / "final" / "adapter_config.json").is_file()
    frozen = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in weights_of(trainer).items()}
    assert all(torch.equal(p, frozen[n]) for n, p in before.state_dict().items())
    assert any("lora_B" in n and p.abs().max() > 0 for n, p in frozen.items())
    assert not any("visual" in n and "lora" in n for n in frozen)
    assert lines(tmp_path)[1]["kl/ref"] > 0
