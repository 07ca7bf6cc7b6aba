"""What is measured of looking: mass by layer and head, along a response, on frames that decide."""

import csv
import dataclasses
import json
from types import SimpleNamespace

import models
import pytest
import torch
import training
from torch import Tensor

from appo import frame_ids
from appo.recording.arguments import response_rows
from appo.recording.heads import record_head_mass
from appo.reports.inspect_clip import draw_heads
from appo.train.evaluate import evaluate
from appo.train.groups import Group
from appo.train.logs import Meter
from appo.train.looking import head_shares, measure_looking, quarters, record_mass
from appo.train.policy import Policy
from appo.train.trainer import Trainer

RESPONSE = 6


def group_of(mass: Tensor, mask: Tensor, ids: list[int], labelled: list[int], reduction: str) -> Group:
    prompt = SimpleNamespace(
        frame_ids=torch.tensor(ids), num_frames=mass.shape[-1], labelled_frames=lambda: labelled, record=None
    )
    empty = torch.zeros(len(mask))
    return Group(
        prompt=prompt, completion_ids=mask.long(), mask=mask, rollout_logprobs=mask.float(), finished=empty > 0,
        texts=[], rewards=empty, accuracy=empty, rewards_by_name={}, mass=mass, mass_reduction=reduction,
    )  # fmt: skip


# Shorter than four tokens, a multiple of four, neither; one token.
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 21])
def test_quarters_are_in_order_and_as_equal_as_can_be(length):
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, :length] = mask[1] = True
    first = quarters(mask)[0]
    assert (first[length:] == -1).all() and first[0] == 0
    assert (first[:length].diff() >= 0).all() and int(first.max()) <= 3
    counts = torch.bincount(first[:length], minlength=4)
    assert counts.max() - counts.min() <= 1


# What a run records: sums over the keys of a frame, or means, which are multiplied back.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_shares_are_counted_token_by_token(reduction):
    generator = torch.Generator().manual_seed(0)
    ids = [-1, 0, 0, 0, 1, 2, 2, -1]  # 3, 1 and 2 tokens
    shares = torch.rand(2, 9, 3, generator=generator) / 3
    shares[0, 2] = 0  # a token that looks at no frame
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    recorded = shares.clone() if reduction == "sum" else shares / torch.tensor([3.0, 1.0, 2.0])
    recorded[~mask] = float("nan")  # what stands at padding is nobody's
    meter = Meter()
    measure_looking(meter, group_of(recorded, mask, ids, [0, 2], reduction))
    found = meter.means()
    tokens = [(g, n) for g in range(2) for n in range(9) if mask[g, n]]
    looked = {at: float(shares[at].sum()) for at in tokens}
    assert found["mass/frames"] == pytest.approx(sum(looked.values()) / len(tokens))
    for part in range(4):
        own = [v for (g, n), v in looked.items() if n * 4 // (9, 5)[g] == part]
        assert found[f"mass/quarter_{part + 1}"] == pytest.approx(sum(own) / len(own))
    labelled = [float(shares[at][[0, 2]].sum()) / value for at, value in looked.items() if value > 0]
    assert found["mass/labelled"] == pytest.approx(sum(labelled) / len(labelled))
    assert found["mass/labelled_chance"] == pytest.approx(5 / 6)
    without = Meter()
    measure_looking(without, group_of(recorded, mask, ids, [], reduction))
    assert "mass/labelled" not in without.means()


# Rows that count and rows that do not, all layers and some, with attention weights as the measure.
@pytest.mark.parametrize("build", [models.qwen2_5_vl, models.qwen3_vl])
@pytest.mark.parametrize("layers", [None, 2, [0, -1]])
def test_heads_are_those_of_eager_weights(build, layers):
    tiny = build()
    videos = [models.random_video(3, 28, 28), models.random_video(5, 28, 42, seed=1)]
    inputs = tiny.inputs(videos, ["What?", "And what in this longer question?"], "B " * RESPONSE)
    frames = frame_ids(inputs["input_ids"], tiny.config, video_grid_thw=inputs["video_grid_thw"])
    length = inputs["input_ids"].shape[1]
    rows = response_rows(length - RESPONSE, RESPONSE)
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    tiny.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tiny.model(**inputs, output_attentions=True).attentions
        tiny.model.set_attn_implementation("sdpa")
        with record_head_mass(tiny.model, frames, rows=rows, valid=valid, layers=layers) as recorder:
            with pytest.raises(RuntimeError, match="expected a forward"):
                _ = recorder.heads
            tiny.model(**inputs)
    tapped = {None: [0, 1, 2, 3], 2: [2, 3]}.get(layers if not isinstance(layers, list) else "list", [0, 3])
    assert recorder.layers == tapped
    for place, layer in enumerate(tapped):
        for sequence in range(2):
            own = weights[layer][sequence, :, rows][:, valid[sequence]]  # (Hq, R', S)
            for frame in range(int(frames.num_frames.max())):
                expected = own[..., frames.ids[sequence] == frame].sum(-1).mean(-1)
                torch.testing.assert_close(recorder.heads[place, sequence, :, frame], expected, atol=2e-6, rtol=1e-4)


def test_a_mask_of_another_shape_is_refused():
    tiny = models.qwen2_5_vl()
    inputs = tiny.inputs([models.random_video(2, 28, 28)], ["What?"], "B " * RESPONSE)
    frames = frame_ids(inputs["input_ids"], tiny.config, video_grid_thw=inputs["video_grid_thw"])
    with pytest.raises(ValueError, match="`valid`"):
        record_head_mass(tiny.model, frames, rows=slice(-4, -1), valid=torch.ones(1, 5, dtype=torch.bool))


def sampled(tmp_path, **changes):
    model, processor = training.tiny()
    settings = training.config(tmp_path, **changes)
    trainer = Trainer(model, processor, training.records(), config=settings)
    trainer.policy.eval()
    record = training.records()[0]
    return trainer, trainer.reward(trainer.sample([trainer.build_prompt(record)], [0]))[0]


def test_heads_do_not_depend_on_how_a_group_is_laid_out(tmp_path):
    trainer, group = sampled(tmp_path)
    found = []
    for share in ("on", "off"):
        policy = Policy(trainer.model, share)
        found.append(head_shares(group, policy, policy, trainer.pad_id, torch.device("cpu")))
    first, second = found
    torch.testing.assert_close(first.mass, second.mass, atol=1e-5, rtol=1e-4)
    assert first.mass.shape == (4, trainer.model.config.text_config.num_attention_heads, group.prompt.num_frames)
    # Their mean over heads and the recorded layers is the mass that training uses.
    record_mass([group], policy, policy, trainer.config, trainer.pad_id, torch.device("cpu"))
    assert float(group.mass.sum(-1)[group.mask].mean()) == pytest.approx(float(first.video[-3:].mean()), rel=1e-3)


def test_what_inspection_writes_of_heads(tmp_path):
    trainer, group = sampled(tmp_path)
    picture, table = draw_heads(trainer, group, tmp_path / "out")
    assert picture.read_bytes().startswith(b"\x89PNG")
    shares = head_shares(group, trainer.policy, trainer.unwrapped, trainer.pad_id, torch.device("cpu"))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == shares.video.numel() and len({(row["layer"], row["head"]) for row in rows}) == len(rows)
    video = [float(row["video"]) for row in rows]
    assert video == sorted(video, reverse=True)
    for row in rows:
        place = shares.layers.index(int(row["layer"])), int(row["head"])
        assert float(row["video"]) == pytest.approx(float(shares.video[place]), rel=1e-4)
        if shares.labelled_share is not None:
            assert float(row["labelled_share"]) == pytest.approx(float(shares.labelled_share[place]), rel=1e-4)


def test_a_run_and_an_evaluation_say_what_was_looked_at(tmp_path):
    model, processor = training.tiny()
    settings = training.config(tmp_path, max_steps=2, heads_every=2, eval_looking=True)
    Trainer(model, processor, training.records(), config=settings, eval_dataset=training.records()[:2]).train()
    (line,) = [json.loads(line) for line in (tmp_path / "heads.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and len(line["video"]) == len(line["layers"]) == 4
    assert all(0 < share < 1 for heads in line["video"] for share in heads)
    for file in ("metrics.jsonl", "eval.jsonl"):
        values = json.loads((tmp_path / file).read_text().splitlines()[-1])
        assert all(0 < values[f"mass/{name}"] < 1 for name in ("frames", "quarter_1", "quarter_4"))
    # A model that is trained with GRPO can be asked as well.
    config = training.config(tmp_path, method="grpo", eval_looking=True)
    assert 0 < evaluate(model, processor, training.records()[:1], config)["mass/frames"] < 1


def test_an_evaluation_that_goes_on_counts_what_was_looked_at_before(tmp_path):
    """A clip whose deciding frames are known, one without, and text: kept answers give the same means as asked ones."""
    model, processor = training.tiny()
    config = training.config(tmp_path, eval_looking=True, eval_batch=2, eval_samples=2)
    first, second, third = training.records()[:3]
    records = [first, dataclasses.replace(second, time_spans=()), training.without_media(third)]
    answers = {}
    whole = evaluate(
        model, processor, records, config, keep=lambda answer: answers.setdefault(answer["place"], []).append(answer)
    )
    stored = json.loads(json.dumps(answers))  # as a file holds them
    known = {int(place): stored[place] for place in list(stored)[:2]}
    assert evaluate(model, processor, records, config, known=known) == pytest.approx(whole)
    assert 0 < whole["mass/frames"] < 1 and "looked" not in answers[2][0]
