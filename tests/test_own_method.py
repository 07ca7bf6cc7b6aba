"""docs/own_method.md: every block of it is run, and its worked examples are the methods that they say they are."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from torch import Tensor

from appo.config import APPOConfig
from appo.integrations.weights import Responses
from appo.method.attention_policy import attention_loss
from appo.train.groups import loss_operands, whole_groups
from appo.train.trainer import Trainer
from appo.yaml_files import dump_yaml

PAGE = (Path(__file__).parents[1] / "docs/own_method.md").read_text()
G = 4


def blocks(heading: str) -> list[str]:
    """The Python of a section of the page."""
    (section,) = [part for part in re.split(r"^### ", PAGE, flags=re.MULTILINE) if part.startswith(heading)]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def run(*code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    return names


def written(folder: Path, code: str) -> Path:
    """A block as the file that its first line names."""
    path = folder / code.split()[1]
    path.write_text(code)
    return path


def trainer(cls: type[Trainer], folder: Path, attention_loss: Any = attention_loss, **options: Any) -> Trainer:
    model, processor = training.tiny()
    config = training.config(folder / "run", **options)
    return cls(model, processor, training.records(), config=config, attention_loss=attention_loss)


def test_every_block_is_in_a_section_that_is_tested() -> None:
    assert PAGE.count("```python") == sum(len(blocks(f"{number}. ")) for number in range(1, 7)) == 6


def test_the_rule_and_its_test() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        run(*blocks("1. "), *blocks("2. "))


# By the settings of a run, and in a group that a trainer has made.
def test_a_rule_in_a_file_trains(tmp_path: Path) -> None:
    path = written(tmp_path, blocks("1. ")[0])
    made = trainer(Trainer, tmp_path, method=f"{path}:looks_most", mass_reduction="sum")
    made.step(1)
    scored = [group for group in made.groups if group.scored]
    for group in scored:
        expected = run(*blocks("1. "))["looks_most"](group, None, made.config)
        assert group.weights is not None and group.mass is not None
        assert torch.equal(group.weights[group.mask], expected[group.mask])
        assert 0 < float(group.weights[group.mask].mean()) < 1
    assert scored


def response_logprobs_of(causal: Any, arguments: dict[str, Tensor], length: int) -> Tensor:
    """(G, N) of the last tokens, from all logits."""
    with torch.no_grad():
        logits = causal(**arguments).logits
    targets = arguments["input_ids"][:, -length:, None]
    return logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, targets)[..., 0]


def test_a_subclass_is_started_from_a_settings_file(tmp_path: Path) -> None:
    path = written(tmp_path, blocks("3. ")[0])
    names = run(*blocks("3. "))
    config = training.config(tmp_path / "run", max_steps=1)
    (tmp_path / "run.yaml").write_text(dump_yaml(config.public() | {"model": "tiny", "data": "records"}))
    names["load_model"], names["load_records"] = lambda config: training.tiny(), lambda path: training.records()
    assert names["start"](names["VPPOTrainer"], tmp_path / "run.yaml", f"method={path}:dependent") == tmp_path / "run"
    assert "max_steps: 1" in (tmp_path / "run" / "config.yaml").read_text()


# The prompt once for its group, and with each response; a group in parts.
@pytest.mark.parametrize("settings", [{"share_prompt": "on"}, {"share_prompt": "off", "micro_tokens": 60}])
def test_vppo_is_its_definition(settings: dict[str, Any], tmp_path: Path) -> None:
    """Against log-probabilities of the same responses behind a grey video, from all logits, by transformers alone."""
    path = written(tmp_path, blocks("3. ")[0])
    made = trainer(run(blocks("3. ")[0])["VPPOTrainer"], tmp_path, method=f"{path}:dependent", **settings)
    made.step(1)
    scored = [group for group in made.groups if group.scored]
    made = trainer(Trainer, tmp_path / "again")  # the weights that scored
    causal = made.unwrapped.causal
    for group in scored:
        prompt, length = group.prompt, group.mask.shape[1]
        inputs = {name: torch.cat([value] * G) for name, value in prompt.vision.items()}
        grey = {name: torch.zeros_like(value) if "pixel" in name else value for name, value in inputs.items()}
        ids = torch.cat([prompt.input_ids.expand(G, -1), group.completion_ids], 1)
        assert prompt.token_types is not None
        types = torch.nn.functional.pad(prompt.token_types.expand(G, -1), (0, length))
        mask = torch.nn.functional.pad(group.mask.long(), (len(prompt), 0), value=1)

        arguments = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
        seen, blind = (response_logprobs_of(causal, arguments | media, length) for media in (inputs, grey))
        torch.testing.assert_close(group.more["blind"][group.mask], blind[group.mask], rtol=1e-4, atol=1e-4)
        difference = (blind - seen).clamp(-20, 20)
        score = (difference.exp() - 1 - difference).clamp(0, 10)
        means = torch.stack([row[valid].mean() for row, valid in zip(score, group.mask, strict=True)])
        place = (means - means.min()) / (means.max() - means.min())
        factor = 0.9 + place * 0.1 / place.mean()
        assert group.weights is not None
        for row, values, valid, of in zip(group.weights, score, group.mask, factor, strict=True):
            kept = row[valid] > 0
            assert int(kept.sum()) == -(-4 * int(valid.sum()) // 10)
            torch.testing.assert_close(row[valid][kept], of.expand(int(kept.sum())), rtol=1e-3, atol=1e-3)
            if not bool(kept.all()):
                assert float(values[valid][kept].min()) >= float(values[valid][~kept].max()) - 1e-4
    assert scored


def test_ral_is_the_preset(tmp_path: Path) -> None:
    """Value and gradient of the page's loss are those of `attention_loss`, alone and in two steps of training."""
    attract = run(blocks("4. ")[0])["attract"]
    generator = torch.Generator().manual_seed(0)
    mass, old = (torch.rand(4, 6, 4, generator=generator).softmax(-1)[..., :3] for _ in range(2))
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 3])[:, None]
    arguments = {"advantages": torch.tensor([1.0, -0.5, 2.0, -1.0]), "mask": mask, "num_items": 20}
    results = []
    for function in (attract, attention_loss):
        leaf = torch.where(mask[..., None], mass, torch.nan).requires_grad_()
        loss, logged = function(leaf, old, aggregation="dapo", max_length=None, **arguments)
        results.append((loss, logged, torch.autograd.grad(loss, leaf)[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    steps = []
    for name, function in (("own", attract), ("preset", attention_loss)):
        made = trainer(Trainer, tmp_path / name, preset="ral", attention_loss=function)
        steps.append([made.step(number) for number in (1, 2)])
    for found, expected in zip(*steps, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-7)
        assert found["attention/divergence"] > 0


def test_advantages_of_tokens(tmp_path: Path) -> None:
    made = trainer(run(blocks("5. ")[0])["Confident"], tmp_path, method="grpo")
    assert made.step(1)["grad_norm"] > 0
    scored = [group for group in made.groups if group.scored]
    for group in scored:
        assert group.advantages is not None and group.advantages.shape == group.mask.shape
    assert scored


def test_an_advantage_for_each_token_is_that_of_its_response_where_they_are_equal(tmp_path: Path) -> None:
    """The same loss and gradient; groups of both kinds in one batch."""
    made = trainer(Trainer, tmp_path, method="grpo")
    groups = [group for group in made.reward(made.rollout(4)) if group.informative][:2]
    made.score(whole_groups(groups))
    made.advantage(groups)
    losses = []
    for widen in (0, 1, 2):
        for group in groups[:widen]:
            assert group.advantages is not None
            of_response = group.advantages if group.advantages.dim() == 1 else group.advantages[:, 0]
            group.advantages = of_response[:, None].expand(group.mask.shape).clone()
        advantages = loss_operands(whole_groups(groups), "cpu", rollout_logprobs=False)["advantages"]
        assert advantages is not None and advantages.dim() == 1 + (widen > 0)
        made.policy.zero_grad()
        loss = made.loss(whole_groups(groups), 100.0, 8.0)
        loss.backward()
        losses.append(torch.cat([p.grad.flatten() for p in made.policy.parameters() if p.grad is not None]))
    for found in losses[1:]:
        torch.testing.assert_close(found, losses[0], rtol=1e-5, atol=1e-8)


# A method that this repository does not have, written from the page alone: GTPO, arXiv 2508.04349, as others' code has
# its equations 3, 5 and 6. Right responses gain where they were unsure, wrong ones lose where they were sure.
GTPO = """
import torch
from appo.train.trainer import Trainer


class GTPO(Trainer):
    def advantage(self, groups):
        for group in groups:
            group.advantages = torch.zeros(len(group.mask))
            if group.scored:
                group.advantages = shaped(group.entropy, group.accuracy >= self.config.threshold, group.mask)


def shaped(entropy, right, mask, alpha=(1.0, 0.1)):
    advantages = torch.zeros_like(entropy)
    for members, score, sign in ((right, entropy, 1.0), (~right, 1 / (entropy + 1e-6), -1.0)):
        own = mask & members[:, None]
        if own.sum() > 1:
            share = score.masked_fill(~own, 0)
            share = share / share.sum(0).clamp(min=1e-8) * own.sum(0)
            rewards = (sign * (alpha[0] + alpha[1] * share))[own]
            advantages[own] = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    return advantages
"""


def test_a_readers_method(tmp_path: Path) -> None:
    names = run(GTPO)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    entropy = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) + 0.1
    entropy = entropy.masked_fill(~mask, torch.nan)
    right = torch.tensor([True, False, True, False])
    found = names["shaped"](entropy, right, mask)
    for members, sign in ((right, 1), (~right, -1)):
        rewards = {}
        for i in members.nonzero().flatten().tolist():
            for t in range(int(mask[i].sum())):
                present = [k for k in members.nonzero().flatten().tolist() if mask[k, t]]
                score = {k: float(entropy[k, t]) if sign > 0 else 1 / (float(entropy[k, t]) + 1e-6) for k in present}
                rewards[i, t] = sign * (1.0 + 0.1 * score[i] / sum(score.values()) * len(present))
        values = torch.tensor(list(rewards.values()))
        for (i, t), value in rewards.items():
            expected = (value - values.mean()) / values.std()
            assert float(found[i, t]) == pytest.approx(float(expected), abs=1e-4)
    assert not bool(found[~mask].any())
    made = trainer(names["GTPO"], tmp_path, method="grpo")
    assert made.step(1)["grad_norm"] > 0


def test_a_rule_reads_the_same_of_both_kinds_of_groups() -> None:
    """The names of `Scored`, which a rule may read in any trainer, are those of the table."""
    named = set(re.findall(r"`group\.(\w+)`", PAGE[PAGE.index("What it may read") : PAGE.index("### 1.")]))
    alone = {"prompt", "rewards", "texts", "completion_ids", "more"}
    assert named - alone == set(Responses.__dataclass_fields__)
    assert isinstance(APPOConfig().threshold, float)
