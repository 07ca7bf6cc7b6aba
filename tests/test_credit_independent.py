"""The credit measurement against a script that has its definitions alone (benchmarks/credit/independent.py)."""

import pytest
import torch
from training import config, records, tiny

from appo.credit.collect import Collector, save_unit, unit_path
from appo.credit.evidence import find_evidence
from appo.tasks import telling_spans
from appo.train.groups import whole_groups
from appo.train.trainer import Trainer
from benchmarks import harness
from benchmarks.credit import independent


def sentence(text, record):
    """Every third word, for a model that has not learned to tell."""
    words, place, spans = text.split(" "), 0, {}
    for number, word in enumerate(words):
        if word and number % 3 == 0:
            spans[str(number)] = (place, place + len(word))
        place += len(word) + 1
    return spans or None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with one measured unit."""
    folder = tmp_path_factory.mktemp("independent")
    model, processor = tiny()
    model.save_pretrained(folder / "warm")
    processor.save_pretrained(folder / "warm")
    settings = config(folder, model=str(folder / "warm"), data="")
    trainer = Trainer(model, processor, records(), config=settings)
    collector = Collector(trainer, find=sentence)
    save_unit(collector.unit(0), unit_path(folder, 0))
    return folder, trainer, collector


# Both registered studies.
@pytest.mark.parametrize("name", ["credit-verbose-48x4", "credit-frames"])
def test_the_committed_figures_follow_from_the_committed_inner_products(name, capsys):
    path = harness.RESULTS / f"{name}.npz"
    assert independent.figures(path, draws=150) < 1
    assert "oracle" in capsys.readouterr().out


def test_weights_and_gradients_are_those_of_matrices_and_autograd(folder, monkeypatch):
    folder, trainer, collector = folder
    model = independent.eager(trainer.config)
    trainer.sampler.load_state_dict([])
    groups = [group for group in trainer.reward(trainer.rollout(4)) if group.informative]
    trainer.score(whole_groups(groups))
    tokenizer = trainer.processor.tokenizer
    told = {id(group): find_evidence(group, tokenizer, sentence) for group in groups}
    ours = [collector.weights(group, told[id(group)]) for group in groups]
    made = []

    def weights_of(dense, group, words):
        place = len(made) % len(groups)
        found = real(dense, group, words)
        found["only-told"] = [row[valid].float() for row, valid in zip(
            told[id(groups[place])].tokens, group.mask, strict=True)]  # fmt: skip
        found["oracle"] = [1 + 1.7 * row for row in found["only-told"]]
        for name in set(independent.ROWS) - {"oracle"}:
            flat = torch.cat(found[name])
            torch.testing.assert_close(flat, ours[place][name][group.mask], atol=2e-3, rtol=2e-3, msg=name)
        made.append(found)
        return found

    real = independent.weights_of
    monkeypatch.setattr(independent, "weights_of", weights_of)
    ids, dense = independent.dense_gradients(trainer, model, 0, most=4)
    assert len(made) == len(groups) == len(ids) > 1
    sketches = independent.sketched(unit_path(folder, 0), ids)
    error = independent.gram_error(dense, sketches)
    assert float(error.square().mean().sqrt()) < (2 / 8192) ** 0.5
    moved = independent.gram_error(dense, sketches * torch.linspace(1, 1.2, len(independent.ROWS))[:, None])
    assert float(moved.square().mean().sqrt()) > 0.05
    with pytest.raises(SystemExit, match="expected groups of"):
        independent.sketched(unit_path(folder, 0), [*ids[1:], ids[0]])


TELLING = "<think> look i see red at step two so the colour is blue there </think> <answer> A </answer>"


# Told once; two times of the moment; the sentence twice; a word that is no option; two answers; no answer.
@pytest.mark.parametrize(
    "text",
    [
        TELLING,
        TELLING.replace("step two", "step two then five"),
        TELLING.replace("there", "i see red at step two so the colour is blue"),
        TELLING.replace("is blue", "is look"),
        TELLING.replace("there", "</think> <answer> B </answer>"),
        TELLING.replace("<answer>", ""),
    ],
)
def test_telling_tokens_are_those_of_the_package(text):
    record = next(record for record in records() if record.meta["task"] == "colour")
    options = [option.split(". ", 1)[1] for option in record.options]
    words = text.split(" ")
    spans = telling_spans(text, record)
    starts = [sum(len(word) + 1 for word in words[:place]) for place in range(len(words))]
    expected = [starts.index(spans[name][0]) for name in ("seen", "said", "letter")] if spans else []
    assert independent.telling_tokens(words, [*options]) == expected
