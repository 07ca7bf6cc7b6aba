"""A group behind one prompt, from scoring to gradients, and separate sequences: python -m benchmarks.group_step

What a step of `Trainer` computes for a group of responses, from log-probabilities and frame mass of three layers to
the gradients of all weights, in fp32 with the text layers of Qwen2.5-VL: packed behind one prompt, packed with a dense
mask, split into two micro-batches, and as padded sequences of their own. The optimizer, the same for all, is left out.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.data.prompts import Prompt
from appo.data.records import Record
from appo.method.advantages import group_advantages
from appo.train.groups import Group, Part, batch_parts, loss_operands, whole_groups
from appo.train.packing import Sequences
from appo.train.policy import Policy
from appo.train.rules import choose_frames, weigh_tokens
from appo.train.scoring import score_parts, weigh_groups
from appo_kernels import linear_weighted_surrogate
from appo_kernels.ops.group_attention import reference
from benchmarks import harness, whole_model

SEPARATE, DENSE = "separate sequences", "packed, dense mask"
PACKED, SPLIT = "ours: packed, behind one prompt", "ours: the same in two micro-batches"
TEXT_ID, PAD = 10, 0


@dataclass(frozen=True)
class Size:
    """A model's width, and a group: ``frames`` of ``height`` x ``width`` tokens, G responses of N tokens."""

    hidden: int
    intermediate: int
    frames: int
    height: int
    width: int
    text: int
    responses: int
    length: int
    layers: int = 4
    every: bool = True  # also two micro-batches and a dense mask

    @property
    def prompt(self) -> int:
        return self.frames * self.height * self.width + self.text


SIZES = {
    "width 256": Size(256, 704, frames=16, height=8, width=14, text=208, responses=8, length=100),
    "Qwen2.5-VL-7B": Size(3584, 18_944, frames=2, height=8, width=8, text=144, responses=4, length=48, every=False),
}


class DenseMask(Policy):
    """The same row, with the mask that torch's attention would need."""

    def sequences(self, batch: Any) -> Sequences:
        made = super().sequences(batch)
        assert made.layout is not None
        seen = reference.visible(made.layout).to(made.input_ids.device)
        return replace(made, attention_mask=seen[None, None], layout=None)


@cache
def prompt_of(size: Size) -> Prompt:
    """Text, a video, text; made once, so that no step's time has it."""
    half, in_frame = size.text // 2, size.height * size.width
    video = slice(half, half + size.frames * in_frame)
    ids, frames = torch.full((size.prompt,), TEXT_ID), torch.full((size.prompt,), -1, dtype=torch.int32)
    ids[video.start - 1], ids[video], ids[video.stop] = whole_model.START, whole_model.VIDEO, whole_model.END
    frames[video] = torch.arange(size.frames, dtype=torch.int32).repeat_interleave(in_frame)
    grid = torch.tensor([[size.frames, 2 * size.height, 2 * size.width]])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    return Prompt(
        record=Record(id="0", question="", answer="A", kind="multiple choice"),
        input_ids=ids,
        token_types=(ids == whole_model.VIDEO).long() * 2,
        vision={"pixel_values_videos": pixels, "video_grid_thw": grid},
        frame_ids=frames,
        num_frames=size.frames,
    )


def group_of(size: Size) -> Group:
    """Responses of random tokens, one in two of them right."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.responses, size.length)
    ids, mask = torch.randint(20, 500, shape, generator=generator), torch.ones(shape, dtype=torch.bool)
    rewards = (torch.arange(size.responses) % 2).float()
    return Group(
        prompt_of(size), ids, mask, torch.zeros(shape), mask[:, -1], [""] * size.responses, rewards, rewards,
        {},
    )  # fmt: skip


def step(policy: Policy, model: Any, size: Size, config: APPOConfig, pieces: int) -> dict[str, Tensor]:
    """Gradients of all weights; those to compare are returned, none is left, so that all entries allocate them."""
    group = group_of(size)
    numbers = torch.arange(size.responses).tensor_split(pieces)
    parts = [[Part(group, tuple(chosen.tolist()))] for chosen in numbers] if pieces > 1 else [whole_groups([group])]
    for some in parts:
        score_parts(some, batch_parts(some, PAD, "cpu"), policy, policy, config)
    assert group.old_logprobs is not None and group.mass is not None
    group.target_frames = choose_frames(group, config)
    weigh_groups([group], policy, weigh_tokens, config)
    group.advantages = group_advantages(group.rewards, scale=config.advantage_scale)
    for some in parts:
        loss_of(some, policy, config, group.tokens).backward()
    gradient = model.get_decoder().layers[0].self_attn.q_proj.weight.grad
    model.zero_grad(set_to_none=True)
    return {"log-probabilities": group.old_logprobs, "mass": group.mass, "gradient": gradient}


def loss_of(parts: Sequence[Part], policy: Policy, config: APPOConfig, tokens: int) -> Tensor:
    batch = batch_parts(parts, PAD, "cpu")
    operands = loss_operands(parts, "cpu", rollout_logprobs=False)
    arguments = operands | config.loss_arguments() | policy.logit_arguments(config) | {"num_items": tokens}

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_weighted_surrogate(
            hidden, weight, batch.completion_ids, mask=batch.mask, bias=bias, **arguments
        ).loss

    return policy(batch, head)


def case(name: str, size: Size) -> harness.Case:
    torch.manual_seed(0)
    options = argparse.Namespace(
        hidden=size.hidden, intermediate=size.intermediate, layers=size.layers, dtype="float32", device="cpu"
    )
    model = whole_model.build("Qwen2.5-VL", options).train()
    config = APPOConfig.from_dict({"preset": "paper"})
    policies = {PACKED: Policy(model, "on"), DENSE: DenseMask(model, "on"), SEPARATE: Policy(model, "off")}

    def run(name: str, pieces: int = 1) -> Callable[[], object]:
        return partial(step, policies[name], model, size, config, pieces)

    text = model.config.get_text_config()
    work = (
        f"{size.layers} layers, hidden {size.hidden:,}, intermediate {size.intermediate:,}, {text.num_attention_heads}/"
        f"{text.num_key_value_heads} heads; P {size.prompt:,}, G {size.responses}, N {size.length}"
    )
    entries = [
        harness.Entry(PACKED, "ours", run(PACKED)),
        harness.Entry(SPLIT, "ours", run(PACKED, 2)),
        harness.Entry(DENSE, "peer", run(DENSE)),
        harness.Entry(SEPARATE, "peer", run(SEPARATE)),
    ]
    if not size.every:
        entries = [entries[0], entries[-1]]
    return harness.Case("group step", name, "float32", work, "cpu", lambda: None, entries)


def check(results: dict[str, Any]) -> None:
    """Log-probabilities, mass and gradients of all are those of separate sequences."""
    for name, found in results.items():
        for what, expected in results[SEPARATE].items():
            distance = float((found[what] - expected).norm() / expected.norm())
            if not distance < 1e-5:
                raise AssertionError(f"{name}: {what} is {distance:.1e} from that of separate sequences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="group-step-cpu", help="of the result files; '-': none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.sizes:
        one = case(name, SIZES[name])
        found = harness.measure_large(one, check, rounds=options.rounds)
        print(f"\n{one.title}: {one.work}\n{harness.table(found)}", flush=True)
        if options.name != "-":
            old = harness.resumed(options.name) or {"rows": []}
            print(f"written: {harness.save(options.name, harness.merged(old['rows'], found), device='cpu')}")
        del one


if __name__ == "__main__":
    main()
