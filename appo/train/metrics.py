"""The numbers of a step: what groups and losses say about reward, entropy, clipping, weights and frames looked at."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from appo.train.groups import Group, Part, ResponseBatch, token_weights_of
from appo.train.logs import Meter
from appo.train.looking import measure_looking
from appo_kernels import SurrogateOutput


def measure_groups(meter: Meter, groups: Sequence[Group]) -> None:
    """Rewards and lengths of all groups; entropy, weights and frames of those that were scored."""
    for group in groups:
        meter.add("reward", group.rewards.mean())
        meter.add("accuracy", group.accuracy.mean())
        for name, values in group.rewards_by_name.items():
            known = ~values.isnan()
            meter.add(f"reward/{name}", values[known].mean(), int(known.sum()))
        lengths = group.mask.sum(1).float()
        meter.add("length/mean", lengths.mean())
        meter.maximum("length/max", lengths.max())
        meter.add("length/clipped", 1 - group.finished.float().mean())
        if group.entropy is not None:
            meter.add("entropy", group.entropy[group.mask].mean(), group.tokens)
        if group.weights is not None:
            weights = group.weights[group.mask]
            meter.add("weight/mean", weights.mean(), group.tokens)
            meter.maximum("weight/max", weights.max())
            meter.add("weight/share", (weights > 1).float().mean(), group.tokens)
        if group.mass is not None:
            measure_looking(meter, group)
        if group.target_frames is not None and group.weights is not None:
            measure_frames(meter, group)


def measure_rewards(meter: Meter, groups: Sequence[Group]) -> None:
    """The shares of groups whose rewards say nothing, and of responses that a reward could not read."""
    for group in groups:
        meter.add("groups/no_signal", float(not group.informative))
        for name, unreadable in group.unreadable.items():
            meter.add(f"reward/{name}/unreadable", float(unreadable.float().mean()))


def measure_frames(meter: Meter, group: Group) -> None:
    """The number of frames picked, and the share of them that decide the question (where that is known).

    frames/precision: of the picked frames, the share that decide; frames/recall: of those that decide, the share that
    was picked. "chance" after either: what as many frames drawn at random would have on average.
    """
    picked = set() if group.target_frames is None else set(group.target_frames.tolist())
    meter.add("frames/target", len(picked))
    meter.add("frames/empty", float(not picked))
    labelled = set(group.prompt.labelled_frames())
    if labelled:
        meter.add("frames/recall", len(picked & labelled) / len(labelled))
        meter.add("frames/recall_chance", len(picked) / group.prompt.num_frames)
        if picked:
            meter.add("frames/precision", len(picked & labelled) / len(picked))
            meter.add("frames/precision_chance", len(labelled) / group.prompt.num_frames)


def measure_loss(meter: Meter, result: SurrogateOutput, parts: Sequence[Part]) -> None:
    """Clip rates, ratio and KL of one loss over the tokens of ``parts``; clip rates also of those with W > 1."""
    tokens = sum(int(part.take(part.group.mask).sum()) for part in parts)
    weighted = sum(int((part.take(token_weights_of(part.group)) > 1).sum()) for part in parts) / max(tokens, 1)
    values = {name: float(value) for name, value in result.metrics.items()}
    meter.add("loss", result.loss.detach(), tokens)
    meter.add("clip/low", values["clip_low"], tokens)
    meter.add("clip/high", values["clip_high"], tokens)
    clipped = values["clip_low"] + values["clip_high"]
    if weighted > 0:
        meter.add("clip/weighted", values["clip_weighted"], tokens * weighted)
        clipped -= values["clip_weighted"] * weighted
    if weighted < 1:
        meter.add("clip/unweighted", max(0.0, clipped / (1 - weighted)), tokens * (1 - weighted))
    meter.add("kl/approx", values["approx_kl"], tokens)
    meter.add("kl/ref", values["ref_kl"], tokens)
    meter.maximum("ratio/max", values["ratio_max"])
    meter.add("tokens/effective", values["effective_tokens"])
    if "attention_divergence" in values:
        meter.add("attention/divergence", values["attention_divergence"], tokens)


def measure_padding(meter: Meter, batch: ResponseBatch, *, shared: bool) -> None:
    """The share of positions of an update's forwards that hold no token; packed groups (``shared``) have none."""
    real = sum(
        prompt + length
        for prompt, lengths in zip(batch.prompt_lengths, batch.lengths, strict=True)
        for length in lengths
    )
    places = sum(batch.sizes) * (max(batch.prompt_lengths) + batch.mask.shape[1])
    meter.add("padding", 0.0 if shared else 1 - real / places, places)


def speed(meter: Meter, groups: Sequence[Group], accelerator: Accelerator) -> dict[str, float]:
    """The numbers of a step over all processes, and how fast it was; every process calls it.

    time/tokens_per_second, time/samples_per_second: tokens (of prompts, each once a group, and of responses) and
    responses of the step, for each process. time/share/rollout, score, update: of the step's time.
    """
    meter.total("tokens", sum(len(group.prompt) + group.tokens for group in groups))
    meter.total("samples", sum(len(group.mask) for group in groups))
    values = meter.result(accelerator)
    seconds = values["time/step"]
    fast = {f"time/{name}_per_second": values.pop(name) / seconds for name in ("tokens", "samples")}
    phases = [phase for phase in ("rollout", "wait", "score", "update") if f"time/{phase}" in values]
    return values | fast | {f"time/share/{phase}": values[f"time/{phase}"] / seconds for phase in phases}


def token_texts(group: Group, processor: Any) -> list[list[str]]:
    """The valid tokens of each response, one by one, as text."""
    decode = processor.tokenizer.decode
    rows = zip(group.completion_ids, group.mask, strict=True)
    return [[decode([token]) for token in ids[mask].tolist()] for ids, mask in rows]


def sample_record(group: Group, processor: Any) -> dict[str, Any]:
    """One group in full, for people: each response with its tokens, their weights and the frames that were picked."""
    completions = []
    for row, tokens in enumerate(token_texts(group, processor)):
        valid = group.mask[row]
        completions.append(
            {
                "text": group.texts[row],
                "reward": float(group.rewards[row]),
                "accuracy": float(group.accuracy[row]),
                "tokens": tokens,
                "weights": None if group.weights is None else group.weights[row][valid].tolist(),
                "frames": None if group.target_frames is None else group.target_frames.tolist(),
            }
        )
    record = group.prompt.record
    return {
        "id": record.id,
        "question": record.question,
        "options": list(record.options),
        "answer": record.answer,
        "labelled_frames": group.prompt.labelled_frames(),
        "completions": completions,
    }
