"""Credit by its definitions alone (docs/credit.md, docs/method.md), without appo.credit, appo.method or any operator.

    python -m benchmarks.credit.independent figures [--name credit-verbose-48x4]
    python -m benchmarks.credit.independent gradients runs/credit/verbose-48x4-300 [--unit 0 --groups 4]

figures: every cosine and difference of the committed table with its bootstrap interval, from the committed inner
products. gradients: a unit that `python -m benchmarks.credit.measure` wrote, measured again on the same responses:
attention matrices, the logits of all rows, and the whole gradient of each response by itself, where the measurement has
statistics of a packed pass, streamed operators and sketches. Both print how far the two are apart, and exit with 1
where that is more than rounding, sketches and bootstrap draws explain.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForImageTextToText

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.models.positions import use_positions
from appo.train.setup import load_model
from appo.train.trainer import Trainer

RESULTS = Path(__file__).parents[1] / "results"
ROWS = ("grpo", "only-told", "oracle", "80/20", "all", "true-frames", "together", "together-true-frames")
Array = NDArray[np.float64]


# --- figures: from inner products of blocks of groups to cosines and intervals


def mean_product(pairs: Array, same: Array, sizes: Array, times: Array) -> float:
    """<E g, E r>: the mean over ordered pairs of different groups, block b drawn ``times[b]`` times."""
    every = float(times @ pairs @ times) - float((times**2 * same).sum())
    return every / (float(times @ sizes) ** 2 - float((times**2 * sizes).sum()))


def cosine(starts: Sequence[dict[str, Array]], row: str, reference: str, drawn: Sequence[Array], batch: float) -> float:
    """Of a batch's gradient with the exact reference; each of the four moments is averaged over warm starts."""
    moments = []
    for blocks, times in zip(starts, drawn, strict=True):
        sizes = blocks["sizes"]

        def mean(a: str, b: str, blocks: dict[str, Array] = blocks, times: Array = times) -> float:
            return mean_product(blocks[f"{a}|{b}|pairs"], blocks[f"{a}|{b}|same"], blocks["sizes"], times)

        square = float((times * blocks[f"{row}|{row}|same"]).sum() / (times * sizes).sum())
        moments.append((mean(row, reference), mean(reference, reference), mean(row, row), square))
    signal, length, own, square = np.mean(moments, axis=0)
    return float(signal / np.sqrt(length * (own + (square - own) / batch)))


def read_blocks(path: Path) -> list[dict[str, Array]]:
    """One dictionary of arrays for each warm start: "sizes", "ROW|REFERENCE|pairs" and "...|same"."""
    starts: dict[str, dict[str, Array]] = {}
    with np.load(path) as arrays:
        for place in arrays:
            start, name = place.split("|", 1)
            starts.setdefault(start, {})[name] = arrays[place].astype(np.float64)
    return list(starts.values())


def figures(path: Path, draws: int = 400, batch: float = 16) -> float:
    """The largest difference to the table beside ``path``: of a value, or of an interval's end over its length."""
    starts, rng, worst = read_blocks(path), np.random.default_rng(12345), 0.0
    samples = [[np.ones(len(blocks["sizes"])) for blocks in starts]]
    for _ in range(draws):
        picks = [rng.integers(len(blocks["sizes"]), size=len(blocks["sizes"])) for blocks in starts]
        samples.append([np.bincount(pick, minlength=len(pick)).astype(float) for pick in picks])
    with path.with_suffix(".csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["reference"] == "only-told"]
    base = np.array([cosine(starts, "grpo", "only-told", drawn, batch) for drawn in samples])
    for line in table:
        row = {"ral": "grpo"}.get(line["weights"], line["weights"])
        found = np.array([cosine(starts, row, "only-told", drawn, batch) for drawn in samples])
        for name, values in (("cosine", found), ("difference", found - base)):
            low, high = np.percentile(values[1:], [2.5, 97.5])
            theirs = [float(line[key]) for key in (name, f"{name} low", f"{name} high")]
            length = max(theirs[2] - theirs[1], 1e-9)
            off = max(abs(low - theirs[1]), abs(high - theirs[2])) / length if row != "grpo" or name == "cosine" else 0
            worst = max(worst, abs(values[0] - theirs[0]) / 1e-3, off / 0.25)
            print(f"{line['weights']:22s} {name:10s} {values[0]:+.4f} [{low:+.4f}, {high:+.4f}]   table {theirs}")
    return worst


# --- gradients: from responses to gradients


def advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def telling_tokens(words: Sequence[str], options: Sequence[str]) -> list[int]:
    """Places of COLOUR, COLOUR and LETTER in "i see COLOUR at step S (then S)* so the colour is COLOUR", then
    "</think> <answer> LETTER </answer>"; none where they are not there, or not once."""
    sentences = []
    for start in range(len(words) - 8):
        if list(words[start : start + 2]) != ["i", "see"] or list(words[start + 3 : start + 5]) != ["at", "step"]:
            continue
        end = start + 6
        while list(words[end : end + 1]) == ["then"]:
            end += 2
        if list(words[end : end + 4]) == ["so", "the", "colour", "is"] and len(words) > end + 4:
            sentences.append((start + 2, end + 4))
    letters = [
        place + 2
        for place in range(len(words) - 3)
        if list(words[place : place + 2]) == ["</think>", "<answer>"] and words[place + 3] == "</answer>"
    ]
    if len(sentences) != 1 or len(letters) != 1 or letters[0] < sentences[0][1]:
        return []
    return [*sentences[0], *letters] if all(words[place] in options for place in sentences[0]) else []


class Dense:
    """A group's responses, each in a forward of its own with eager attention.

    mass: (n, F) of each response, eq. (2) to (4) of docs/method.md. logprobs: (n, V) of each. frames: F.
    """

    def __init__(self, model: Any, group: Any, config: APPOConfig) -> None:
        self.model, self.prompt, self.config = model, group.prompt, config
        self.ids = [row[valid] for row, valid in zip(group.completion_ids, group.mask, strict=True)]
        video = (self.prompt.input_ids == model.config.video_token_id).nonzero().flatten()
        self.keys = video.view(self.prompt.num_frames, -1)  # (F, keys of a frame)
        with torch.no_grad():
            outputs = [self.forward(ids, output_attentions=True) for ids in self.ids]
        self.logprobs = [self.rows(output.logits[0]).log_softmax(-1) for output in outputs]
        self.mass = [self.look(output.attentions[-config.layers :]) for output in outputs]

    def forward(self, ids: Tensor, **options: Any) -> Any:
        tokens = torch.cat([self.prompt.input_ids, ids])[None]
        types = torch.cat([self.prompt.token_types, torch.zeros_like(ids)])[None]
        return self.model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=types, use_cache=False,
            **self.prompt.vision, **options,
        )  # fmt: skip

    def rows(self, values: Tensor) -> Tensor:
        """The rows that predict each token of the response, of logits at the sampling temperature."""
        return values[len(self.prompt) - 1 : -1].float() / self.config.temperature

    def look(self, attentions: Sequence[Tensor]) -> Tensor:
        layers = torch.stack([layer[0].mean(0)[len(self.prompt) - 1 : -1] for layer in attentions]).mean(0)
        return layers[:, self.keys].mean(-1)

    def gradient(self, weights: Sequence[Sequence[Tensor]], advantage: Tensor) -> list[Tensor]:
        """(1/G) sum of W A log p over all tokens, for each of the rows of weights: every parameter's, one vector."""
        parameters = list(self.model.parameters())
        totals = [torch.zeros(sum(p.numel() for p in parameters)) for _ in weights]
        for i, ids in enumerate(self.ids):
            logprobs = self.rows(self.forward(ids).logits[0]).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for total, row in zip(totals, weights, strict=True):
                value = (row[i] * logprobs).sum() * advantage[i] / len(self.ids)
                parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                filled = (torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True))
                total += torch.cat([part.flatten() for part in filled])
        return totals


def top(values: Tensor, count: int) -> list[int]:
    """Places of the largest values; of equal ones the first."""
    order = sorted(range(len(values)), key=lambda place: (-float(values[place]), place))
    return sorted(order[:count])


def attention_weights(dense: Dense, frames: Sequence[int], *, ours: bool) -> list[Tensor]:
    """W of eq. (10) to (14): the paper's, or ours by share, entropy and mean 1."""
    config, lengths = dense.config, [len(ids) for ids in dense.ids]
    bonus = [torch.zeros(length) for length in lengths]
    entropy = [-(rows.exp() * rows).sum(-1) for rows in dense.logprobs]
    for frame in frames:
        score = [mass[:, frame] / (mass.sum(1) if ours else 1) for mass in dense.mass]
        slots = [top(each, config.slot_tokens) for each in score]
        if ours:
            values = [entropy[i][slots[i]] for i in range(len(slots))]
        else:
            of_slot = torch.zeros(max(map(len, slots)))
            for j in range(len(of_slot)):
                members = torch.stack([dense.logprobs[i][t[j]] for i, t in enumerate(slots) if len(t) > j])
                mixture = members.exp().mean(0).clamp(min=1e-30).log()
                of_slot[j] = (members.exp() * (members - mixture)).sum(-1).mean()
            values = [of_slot[: len(t)] for t in slots]
        low, high = (float(f(torch.cat(values))) for f in (torch.min, torch.max))
        for i, places in enumerate(slots):
            bonus[i][places] += (values[i] - low) / (high - low + 1e-8) / len(frames)
    weights = [1 + config.alpha * each for each in bonus]
    return [each / each.mean() for each in weights] if ours else weights


def weights_of(dense: Dense, group: Any, words: Sequence[Sequence[str]]) -> dict[str, list[Tensor]]:
    """The weights of `ROWS`, one tensor for each response."""
    config = dense.config
    options = [option.split(". ", 1)[1] for option in group.prompt.record.options]
    told = [torch.zeros(len(each)) for each in words]
    for row, each in zip(told, words, strict=True):
        row[telling_tokens(each, options)] = 1.0
    entropy = torch.cat([-(rows.exp() * rows).sum(-1) for rows in dense.logprobs])
    limit = np.quantile(entropy.double().numpy(), 0.8)
    fifth = (entropy.double() >= limit).float().split([len(each) for each in words])
    attention = torch.stack([m.sort(0, descending=True).values[: config.top_tokens].mean(0) for m in dense.mass])
    everyone = sorted({frame for row in attention for frame in top(row, config.top_frames)})
    key = list(group.prompt.labelled_frames())
    return {
        "grpo": [torch.ones(len(each)) for each in words],
        "only-told": told,
        "oracle": [1 + 1.7 * each for each in told],
        "80/20": list(fifth),
        "all": attention_weights(dense, everyone, ours=False),
        "true-frames": attention_weights(dense, key, ours=False),
        "together": attention_weights(dense, top(attention.mean(0), config.top_frames), ours=True),
        "together-true-frames": attention_weights(dense, key, ours=True),
    }


def dense_gradients(trainer: Trainer, model: Any, number: int, most: int) -> tuple[list[str], Tensor]:
    """Ids of the first informative records of unit ``number``, and (groups, rows, parameters) of `ROWS`."""
    trainer.sampler.load_state_dict([])
    trainer.sampler.take(number * trainer.config.prompts_per_step)
    trainer.policy.eval()
    records, found = [], []
    for group in trainer.reward(trainer.rollout(trainer.config.prompts_per_step)):
        if len(records) < most and len(set(group.rewards.tolist())) > 1:
            dense = Dense(model, group, trainer.config)
            words = [[trainer.processor.tokenizer.decode([token]).strip() for token in ids] for ids in dense.ids]
            made = weights_of(dense, group, words)
            records.append(group.prompt.record.id)
            found.append(torch.stack(dense.gradient([made[row] for row in ROWS], advantages(group.rewards))))
    return records, torch.stack(found)


def eager(config: APPOConfig) -> Any:
    """The model of a run with attention matrices, and the run's positions."""
    model = AutoModelForImageTextToText.from_pretrained(config.model, attn_implementation="eager", dtype=torch.float32)
    return use_positions(model, config.video_positions).eval()


def sketched(path: Path, records: Sequence[str]) -> Tensor:
    """(groups, rows, buckets): what the unit has of `ROWS`. Raises SystemExit where its first groups are others."""
    stored = torch.load(path, weights_only=True)
    if stored["records"][: len(records)] != list(records):
        raise SystemExit(f"{path}: expected groups of {records}, got {stored['records'][: len(records)]}.")
    values = (stored["sketches"].float() * stored["scale"])[: len(records)]
    rows = {name: values[:, place] for place, name in enumerate(stored["names"])}
    rows["oracle"] = rows["grpo"] + 1.7 * rows["only-told"]  # gradients are linear in weights
    return torch.stack([rows[name] for name in ROWS], dim=1)


def gram_error(dense: Tensor, sketches: Tensor) -> Tensor:
    """Of all inner products between groups and rows, over the product of the two lengths."""
    one, other = (values.flatten(0, 1).double() for values in (dense, sketches))
    length = one.norm(dim=1).clamp(min=1e-12)
    return (one @ one.T - other @ other.T) / (length[:, None] * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_figures = commands.add_parser("figures", help="cosines and intervals from the committed inner products")
    of_figures.add_argument("--name", default="credit-verbose-48x4", help="of the result files")
    of_gradients = commands.add_parser("gradients", help="a measured unit by plain autograd")
    of_gradients.add_argument("folder", type=Path, help="of a warm start, with config.yaml and units")
    of_gradients.add_argument("--unit", type=int, default=0)
    of_gradients.add_argument("--groups", type=int, default=4, help="the unit's first ones; about 2 s each")
    options = parser.parse_args()
    if options.command == "figures":
        worst = figures(RESULTS / f"{options.name}.npz")
        print(
            f"largest difference: {worst:.2f} of what is allowed (0.001 of a value; a quarter of an interval's length)"
        )
    else:
        config = APPOConfig.load(options.folder / "config.yaml")
        trainer = Trainer(*load_model(config), load_records(config.data), config=config)
        records, dense = dense_gradients(trainer, eager(config), options.unit, options.groups)
        sketches = sketched(options.folder / f"unit-{options.unit:05d}.pt", records)
        error, allowed = gram_error(dense, sketches), (2 / sketches.shape[-1]) ** 0.5
        lengths = (sketches.norm(dim=-1) / dense.norm(dim=-1)).mean(0)
        for row, ratio in zip(ROWS, lengths.tolist(), strict=True):
            print(f"{row:22s} length of the sketch over that of the gradient: {ratio:.4f}")
        worst = float(max(error.square().mean().sqrt() / allowed, error.abs().max() / (5 * allowed)))
        print(
            f"{len(records)} groups: inner products differ by {float(error.square().mean().sqrt()):.4f} of the product "
            f"of lengths (root mean square; a sketch's bound is {allowed:.4f}), at most {float(error.abs().max()):.4f}"
        )
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
