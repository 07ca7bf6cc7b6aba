"""Credit on a model: gradients against a dense computation, weights against training's, units that go on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from training import config, records, tiny

from appo.config import ConfigError
from appo.credit import command
from appo.credit.blocks import blocks, gradients, load_blocks, save_blocks
from appo.credit.collect import Collector, load_unit, save_unit
from appo.credit.evidence import find_evidence, token_places
from appo.credit.gradients import HitCounts, evidence_aucs, group_gradients, hit_counts, trained_parameters
from appo.credit.report import compare, hits, noise, totals
from appo.credit.sketch import CountSketch
from appo.credit.u_statistics import batch_cosine
from appo.credit.weightings import BASE, WEIGHTINGS
from appo.data.records import DataError
from appo.method.attention_policy import attention_loss
from appo.tasks import telling_spans
from appo.train.groups import batch_parts, whole_groups
from appo.train.trainer import Trainer


def first_word(text, record):
    """A stand-in for what a response tells: its first three characters, and none where there are fewer."""
    return {"seen": (0, 3), "sentence": (0, 5)} if len(text) >= 5 else None


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(*tiny(), records(), config=config(tmp_path_factory.mktemp("credit")))


@pytest.fixture(scope="module")
def collector(trainer):
    return Collector(trainer, find=first_word, size=512, identity={"test": 1})


@pytest.fixture(scope="module")
def units(collector):
    return [collector.unit(0), collector.unit(1)]


def scored_group(trainer):
    trainer.sampler.load_state_dict([])
    groups = trainer.reward(trainer.rollout(4))
    group = next(group for group in groups if group.informative)
    trainer.score(whole_groups([group]))
    trainer.advantage([group])
    return group


def test_gradients_are_those_of_plain_autograd(trainer):
    """Sum of W A log p over dense logits, one response and token after the other; and linear in the weights."""
    group = scored_group(trainer)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(group.mask.shape, generator=generator)
    sketch = CountSketch(trained_parameters(trainer), size=1024)
    rows = {"one": torch.ones_like(weights), "w": weights, "both": 1 + 2 * weights, "none": torch.zeros_like(weights)}
    found = group_gradients(trainer, group, rows, sketch)
    batch = batch_parts(whole_groups([group]), trainer.pad_id, "cpu")

    def head(hidden, weight, bias):
        return (hidden @ weight.T / trainer.config.temperature).log_softmax(-1)

    logprobs = trainer.policy(batch, head)
    total = 0.0
    for i, valid in enumerate(group.mask):
        for t in valid.nonzero().flatten().tolist():
            token = int(group.completion_ids[i, t])
            total = total + float(weights[i, t]) * float(group.advantages[i]) * logprobs[i, t, token]
    expected = sketch(torch.autograd.grad(total / len(group.mask), trained_parameters(trainer), allow_unused=True))
    torch.testing.assert_close(found["w"], expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found["both"], found["one"] + 2 * found["w"], atol=1e-4, rtol=1e-3)
    assert not found["none"].any() and found["one"].any()
    assert all(parameter.grad is None for parameter in trained_parameters(trainer))


def test_weights_are_those_that_training_uses(trainer, collector):
    group = scored_group(trainer)
    copy = replace(group)
    found = collector.weights(copy, find_evidence(group, trainer.processor.tokenizer, first_word))
    trainer.select([group])
    trainer.weigh([group])  # the run's strategy is "all"
    torch.testing.assert_close(found["all"], group.weights * group.mask)
    assert torch.equal(found[BASE], group.mask.float())
    assert set(found) == {name for name, row in WEIGHTINGS.items() if row.make}
    for i, valid in enumerate(group.mask):
        for name in ("shuffled", "entropy-sorted"):
            assert torch.equal(found[name][i][valid].sort().values, found["all"][i][valid].sort().values), name
    lengths = group.mask.sum(1).float()
    torch.testing.assert_close(found["grpo-response-mean"].sum(1), lengths.mean().expand(len(lengths)))
    fifth = found["80/20"][group.mask]
    assert set(fifth.tolist()) <= {0.0, 1.0} and fifth.mean() == pytest.approx(0.2, abs=0.1)


def test_evidence_tokens_overlap_their_places(trainer):
    tokenizer, group = trainer.processor.tokenizer, scored_group(trainer)
    text = "<think> look i see red at step two so the colour is red there</think><answer>A</answer>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    starts, ends = token_places(ids, tokenizer)
    words = [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert words[:6] == ["<think>", "look", "i", "see", "red", "at"] and words[-2:] == ["A", "</answer>"]
    padded = torch.full((4, len(ids) + 3), tokenizer.pad_token_id)
    padded[:, : len(ids)] = torch.tensor(ids)
    mask = torch.arange(len(ids) + 3).expand(4, -1) < len(ids)
    colour = next(record for record in records() if record.meta["task"] == "colour")
    changed = replace(group, completion_ids=padded, mask=mask, texts=[text, text, "", text])
    changed = replace(changed, prompt=replace(group.prompt, record=colour))
    evidence = find_evidence(changed, tokenizer, telling_spans)
    assert evidence.present.tolist() == [True, True, False, True]
    assert [words[t] for t in evidence.tokens[0].nonzero().flatten().tolist()] == ["red", "red", "A"]
    assert [words[t] for t in evidence.places["when"][1].nonzero().flatten().tolist()] == ["two"]
    assert int(evidence.sentence[0].sum()) == 12 and not evidence.tokens[2].any()
    with pytest.raises(DataError, match="`seen`: expected a place within"):
        find_evidence(changed, tokenizer, lambda text, record: {"seen": (3, 999)})


def test_hits_and_aucs_by_hand():
    weights = torch.tensor([[1.0, 3.0, 1.0, 9.0], [2.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    evidence = torch.tensor([[False, True, False, False], [False, True, False, False]])
    assert hit_counts(weights, mask, evidence) == HitCounts(evidence_bonus=2.0, bonus=3.0, above_mean=1.0, evidence=2.0)
    assert evidence_aucs(weights, mask, evidence) == pytest.approx([1.0, (0 + 0.5 + 0.5) / 3])
    assert evidence_aucs(weights, mask, evidence & False) == []


def test_units_are_the_same_whenever_they_are_measured(collector, units, tmp_path):
    again = collector.unit(1)
    assert torch.equal(again.sketches, units[1].sketches) and again.records == units[1].records
    assert again.hits == units[1].hits and units[0].records != units[1].records
    save_unit(units[0], tmp_path / "unit-00000.pt")
    loaded = load_unit(tmp_path / "unit-00000.pt", collector.key)
    scale = units[0].sketches.abs().amax(-1, keepdim=True)
    assert bool(((loaded.sketches - units[0].sketches).abs() <= 1e-3 * scale).all())
    with pytest.raises(ConfigError, match="another measurement"):
        load_unit(tmp_path / "unit-00000.pt", collector.key | {"test": 2})


def test_the_comparison_has_every_row_and_its_own_baseline(units):
    result = compare(
        [blocks(units[:1]), blocks(units[1:])], reference="only-told", draws=50, pairs={"H": ("oracle", BASE)}
    )
    assert set(result["rows"]) == set(WEIGHTINGS)
    assert result["rows"][BASE]["difference"]["value"] == 0
    assert result["tests"]["H"]["p_holm"] == result["tests"]["H"]["p"]
    found = gradients(units)
    torch.testing.assert_close(
        torch.tensor(found["oracle"]), torch.tensor(found[BASE] + 1.7 * found["only-told"]), atol=1e-5, rtol=1e-5
    )
    precise = hits([units])["only-told"]
    assert precise["precision"] == 1.0 and precise["recall"] == 1.0 and precise["auc"] == 1.0
    assert totals([units])["groups"] == 8


def test_units_as_blocks_count_the_same_pairs_of_groups(units, tmp_path):
    """Against the groups one by one, on all groups and where every draw takes whole units; through a file too."""
    groups, whole = blocks(units), blocks(units, whole=True)
    sizes = [len(unit.records) for unit in units]
    assert whole.sizes.tolist() == sizes and groups.sizes.tolist() == [1.0] * sum(sizes)
    assert {"ral", "oracle"} < set(whole.names) == set(WEIGHTINGS)
    save_blocks(tmp_path / "raw.npz", {"one": whole, "two": groups})
    loaded = load_blocks(tmp_path / "raw.npz")["one"]
    draws = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    for name in ("oracle", "all"):
        one = batch_cosine([groups.products(name, BASE)], [draws.repeat(sizes, axis=1)], 16)
        for other in (whole, loaded):
            found = batch_cosine([other.products(name, BASE)], [draws], 16)
            np.testing.assert_allclose(found, one, rtol=1e-4, equal_nan=True)
    assert noise([whole])["all"] == pytest.approx(noise([groups])["all"])
    with pytest.raises(ValueError, match="blocks: `reference`: expected one of all, only-told, grpo, sentence"):
        whole.products("all", "soft")


def test_equal_weights_take_one_backward(trainer):
    group = scored_group(trainer)
    ones = torch.ones(group.mask.shape)
    calls = []

    class Counting(CountSketch):
        def __call__(self, values):
            calls.append(1)
            return super().__call__(values)

    rows = {"a": ones, "b": ones + torch.where(group.mask, 0.0, 5.0), "c": 2 * ones, "d": 2 * ones}
    found = group_gradients(trainer, group, rows, Counting(trained_parameters(trainer), size=64))
    assert len(calls) == 2 and torch.equal(found["a"], found["b"]) and torch.equal(found["c"], found["d"])
    torch.testing.assert_close(found["c"], 2 * found["a"])


def test_ral_changes_no_gradient_in_the_first_update():
    """What the row says: the divergence from the attention that sampled is at its least, whatever the advantage."""
    mass = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) / 5
    now = mass.clone().requires_grad_()
    loss, _ = attention_loss(now, mass, advantages=torch.tensor([1.0, -2.0, 0.5]), mask=torch.ones(3, 4).bool())
    loss.backward()
    assert float(now.grad.abs().max()) < 1e-6
    moved = (mass * torch.tensor([0.5, 1.0, 1.0, 1.0, 1.5])).requires_grad_()
    attention_loss(moved, mass, advantages=torch.tensor([1.0, -2.0, 0.5]), mask=torch.ones(3, 4).bool())[0].backward()
    assert float(moved.grad.abs().max()) > 1e-3


def test_without_known_places_no_row_needs_them(trainer):
    collector = Collector(trainer, size=64)
    assert not {"only-told", "oracle", "sentence"} & set(collector.weightings)
    unit = collector.unit(0)
    assert not unit.hits and len(unit.names) == len([row for row in collector.weightings.values() if row.make])


def test_a_run_is_measured_goes_on_and_refuses_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "LEAST_GROUPS", 2)
    run, (model, processor) = tmp_path / "run", tiny()
    model.save_pretrained(run / "final")
    processor.save_pretrained(run / "final")
    data = records()[0].media[0].path.parent.parent / "train.json"
    config(run, data=str(data), model="gone").save(run / "config.yaml")
    told = tmp_path / "told.py"
    told.write_text("def places(text, record):\n    return [(0, 3)] if len(text) > 3 else None\n")
    lines = []
    path = command.measure_run(run, tmp_path / "out", groups=4, told=f"{told}:places", show=lines.append)
    content = json.loads(path.with_suffix(".json").read_text())
    assert set(content["comparison"]["rows"]) == set(WEIGHTINGS) and "| oracle |" in path.read_text()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("unit-*.pt")}
    command.measure_run(run, tmp_path / "out", groups=4, told=f"{told}:places", show=lines.append)
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("unit-*.pt")}
    with pytest.raises(ConfigError, match="another measurement"):
        command.measure_run(run, tmp_path / "out", groups=4, told=f"{told}:places", overrides=["alpha=1.0"])
    with pytest.raises(ConfigError, match=r"`told`: .*no function `none` in it"):
        command.measure_run(run, tmp_path / "other", groups=4, told=f"{told}:none")
    with pytest.raises(ConfigError, match="is not finished"):
        (run / "final").rename(run / "elsewhere")
        command.measure_run(run, tmp_path / "other", groups=4)
