"""slime's hooks with data of its types (`Sample`, `rollout_data`): slime is on no registry and not installed."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appo import frame_ids, perception_slots, select_frames, token_weights
from appo.config import APPOConfig
from appo.integrations.slime import GroupScorer, token_advantages, weighted_rewards
from appo.tasks.tiny import build_tiny
from appo_kernels.ops.group_divergence import reference

G, TEMPERATURE = 3, 0.9
ARGS = SimpleNamespace(grpo_std_normalization=True, context_parallel_size=1)


@dataclass
class Sample:
    """The fields of slime's that the hooks read, named and typed as there (commit 624b824)."""

    group_index: int | None = None
    index: int | None = None
    tokens: list[int] = field(default_factory=list)
    multimodal_train_inputs: dict[str, Any] | None = None
    response_length: int = 0
    reward: float | None = None
    loss_mask: list[int] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def get_reward_value(self, args: Any) -> float:
        assert self.reward is not None
        return self.reward


def group(model: Any, processor: Any, index: int, frames: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(index)
    video = torch.randint(0, 256, (frames, 3, 28, 28), dtype=torch.uint8, generator=generator)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which colour"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], videos=[video], do_sample_frames=False, return_tensors="pt")
    media = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    samples = []
    for member in range(G):
        response = torch.randint(8, 90, (4 + 2 * member,), generator=generator).tolist()
        mask = [1, 0] + [1] * (len(response) - 2) if member == 1 else None
        samples.append(
            Sample(index, G * index + member, inputs["input_ids"][0].tolist() + response, media, len(response),
                   float(member == index), mask)
        )  # fmt: skip
    return samples


def test_what_cannot_be_recorded_or_served_is_refused_before_anything_is_scored() -> None:
    model, _ = build_tiny(0)
    with pytest.raises(ValueError, match="`layers`: expected 1 to 4"):
        GroupScorer(model, APPOConfig(layers=99))
    with pytest.raises(ValueError, match="expected entropy_share = "):
        GroupScorer(model, APPOConfig.preset("top-entropy"))


# Two families, whose attention and positions differ: frames in one run of tokens, and frames apart by timestamps.
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_weights_of_a_group_are_those_of_eager_attention(family: str) -> None:
    model, processor = build_tiny(0, family=family)
    samples = group(model, processor, 1, 8)
    config = APPOConfig(strategy="all", top_tokens=2, top_frames=2, slot_tokens=3)
    GroupScorer(model, config, temperature=TEMPERATURE)(samples, [sample.reward for sample in samples])
    model.set_attn_implementation("eager")
    longest = max(sample.response_length for sample in samples)
    mass, logits = torch.zeros(G, longest, 4), torch.zeros(G, longest, model.config.get_text_config().vocab_size)
    mask = torch.zeros(G, longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids, length = torch.tensor(sample.tokens)[None], sample.response_length
        media = sample.multimodal_train_inputs
        with torch.no_grad():
            out = model(
                input_ids=ids, output_attentions=True,
                mm_token_type_ids=(ids == model.config.video_token_id).int() * 2, **media,
            )  # fmt: skip
        frames = frame_ids(ids, model.config, video_grid_thw=media["video_grid_thw"])
        in_frame = (frames.ids[..., None] == torch.arange(4)).float()[0]
        attention = torch.stack(out.attentions[-3:]).mean((0, 2))[0, -length - 1 : -1]
        mass[row, :length] = attention @ in_frame / in_frame.sum(0)
        logits[row, :length] = out.logits[0, -length - 1 : -1] / TEMPERATURE
        mask[row, :length] = torch.tensor(sample.loss_mask or [1] * length).bool()
    found = select_frames(mass, mask, torch.tensor([0.0, 1.0, 0.0]), strategy="all", top_tokens=2, top_frames=2)
    slots = perception_slots(mass, mask, found, top_tokens=3)
    divergence = reference.group_divergence_from_logits(logits, logits.logsumexp(-1), slots)
    wanted = token_weights(divergence, slots, mask)
    assert wanted.max() > 1.1
    for sample, row in zip(samples, wanted, strict=True):
        torch.testing.assert_close(
            torch.tensor(sample.metadata["token_weights"]), row[: sample.response_length], rtol=1e-3, atol=1e-3
        )


def test_text_alone_has_weights_of_one() -> None:
    model, _ = build_tiny(0)
    samples = [Sample(0, i, [9, 10, 11, 12 + i, 30][: 4 + i % 2], None, 1 + i % 2, 1.0) for i in range(2)]
    GroupScorer(model)(samples, [1.0, 0.0])
    assert [sample.metadata["token_weights"] for sample in samples] == [[1.0], [1.0, 1.0]]


# As slime hands data on: rows of two groups, apart, sent to a process each as lists of CPU tensors.
@pytest.mark.parametrize("scaled", [True, False])
def test_weighted_advantages_reach_the_loss(scaled: bool) -> None:
    args = SimpleNamespace(grpo_std_normalization=scaled, context_parallel_size=1)
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    samples = [
        Sample(i % 2, i, [], None, 2 + i, rewards[i], metadata={"token_weights": [1.0 + i] * (2 + i)}) for i in range(6)
    ]
    raw, weighted = weighted_rewards(args, samples)
    own = torch.tensor(rewards).view(3, 2)
    wanted = own - own.mean(0)
    if scaled:
        wanted = wanted / own.std(0)
    assert raw == rewards
    for i, (row, advantage) in enumerate(zip(weighted, wanted.flatten(), strict=True)):
        torch.testing.assert_close(row, advantage * (1.0 + i) * torch.ones(2 + i), rtol=5e-4, atol=0)
    mine = [4, 1]
    data: dict[str, Any] = {
        "rewards": [weighted[i] for i in mine], "response_lengths": [2 + i for i in mine],
        "kl": [torch.zeros(2 + i) for i in mine], "loss_masks": [torch.ones(2 + i) for i in mine],
    }  # fmt: skip
    token_advantages(args, data)
    assert all(torch.equal(a, weighted[i]) for a, i in zip(data["advantages"], mine, strict=True))
    assert len(data["returns"]) == 2


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="expected 3 weights in sample 7, got none"):
        weighted_rewards(ARGS, [Sample(0, 7, [], None, 3, 1.0)])
    with pytest.raises(ValueError, match="got 2"):
        weighted_rewards(ARGS, [Sample(0, 7, [], None, 3, 1.0, metadata={"token_weights": [1.0, 1.0]})])
    data: dict[str, Any] = {"rewards": [0.5], "response_lengths": [3], "loss_masks": [torch.ones(3)]}
    with pytest.raises(ValueError, match="custom-reward-post-process-path"):
        token_advantages(ARGS, data)
    with pytest.raises(ValueError, match="context_parallel_size"):
        token_advantages(SimpleNamespace(context_parallel_size=2), data)
