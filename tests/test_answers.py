"""`appo eval`'s file of answers: opened first, a line an answer, gone on with after an interruption; and adapters as
models."""

import json

import pytest
import torch
import training
from typer.testing import CliRunner

from appo.cli import app
from appo.config import APPOConfig, ConfigError
from appo.models.merge import merge_adapters
from appo.shown_settings import shown_settings
from appo.train.answers import AnswerFile
from appo.train.evaluate import evaluate
from appo.train.setup import load_model
from appo.train.trainer import Trainer

RECORDS = 5


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model and its processor."""
    folder = tmp_path_factory.mktemp("model")
    for part in training.tiny():
        part.save_pretrained(folder)
    return folder


def run_eval(saved, output, *more):
    file = training.records()[0].meta["file"]
    settings = [f"{name}={value}" for name, value in training.SETTINGS.items() if isinstance(value, (int, float))]
    arguments = ["eval", "--model", saved, "--data", file, "--limit", RECORDS, "--output", output, "eval_batch=2"]
    return CliRunner().invoke(
        app, [str(a) for a in [*arguments, "dtype=float32", "instructions=false", *settings, *more]]
    )


def test_an_interrupted_evaluation_keeps_its_answers_and_goes_on(saved, tmp_path, monkeypatch):
    whole = run_eval(saved, tmp_path / "whole.jsonl")
    assert whole.exit_code == 0, whole.output
    expected = lines(tmp_path / "whole.jsonl")
    assert [answer["place"] for answer in expected] == list(range(RECORDS))
    import appo.train.evaluate as module

    combine, calls = module.combine, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return combine(*arguments, **options)

    monkeypatch.setattr(module, "combine", interrupted)
    assert run_eval(saved, tmp_path / "parts.jsonl").exit_code == 130
    assert lines(tmp_path / "parts.jsonl") == expected[:2], "a batch of two was answered"
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"place": 2, "run"')  # cut short by a crash
    calls[:] = [0, 0]
    again = run_eval(saved, tmp_path / "parts.jsonl")
    assert again.exit_code == 0 and lines(tmp_path / "parts.jsonl") == expected
    assert len(calls) == 2 + 2, "three records in two batches"
    table = [line for line in whole.output.splitlines() if line.startswith(("accuracy", "format", "length", "records"))]
    assert table and all(line in again.output for line in table), "the means are of all answers"


def test_answers_of_another_model_or_settings_and_other_files_are_not_mixed(saved, tmp_path):
    config = training.config(tmp_path, model=str(saved), eval_samples=0)
    records = training.records()[:2]
    with AnswerFile(tmp_path / "answers.jsonl", records, config) as file:
        model, processor = load_model(config, trained=False)
        evaluate(model, processor, records, config, keep=file.write)
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="another model or other settings"):
        AnswerFile(tmp_path / "answers.jsonl", records, training.config(tmp_path, model="other"))
    with pytest.raises(ConfigError, match="line 1 answers another record"):
        AnswerFile(tmp_path / "answers.jsonl", records[::-1], config)
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    (tmp_path / "mine.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ConfigError, match="line 1 is no answer"):
        AnswerFile(tmp_path / "mine.jsonl", records, config)
    with pytest.raises(ConfigError, match="`output`"):
        AnswerFile(tmp_path / "missing" / "answers.jsonl", records, config)


@pytest.fixture(scope="module")
def adapters(saved, tmp_path_factory):
    """The run folder of two steps with adapters on the saved model, and the model they gave."""
    output = tmp_path_factory.mktemp("run")
    config = training.config(output, model=str(saved), lora_rank=2, max_steps=2)
    model, processor = load_model(config)
    trainer = Trainer(model, processor, training.records(), config=config)
    trainer.train()
    return output, trainer


def logits(model, processor):
    ids = processor.tokenizer("the quick brown fox", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_adapters_go_on_where_they_were(adapters, tmp_path):
    output, trainer = adapters
    config = training.config(tmp_path, model=str(output / "final"), lora_rank=2, max_steps=1)
    model, processor = load_model(config)
    torch.testing.assert_close(logits(model, processor), logits(trainer.model, processor))
    again = Trainer(model, processor, training.records(), config=config)
    names = {name for name, p in again.model.named_parameters() if p.requires_grad}
    assert names and all("lora" in name for name in names)
    before = {name: p.clone() for name, p in again.model.named_parameters()}
    again.train()
    moved = {name for name, p in again.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= names


def test_adapters_without_a_rank_are_merged(adapters, tmp_path):
    output, trainer = adapters
    model, processor = load_model(training.config(tmp_path, model=str(output / "final")))
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model, processor), logits(trainer.model, processor), rtol=1e-4, atol=1e-4)


def test_adapters_of_another_rank_and_a_kl_to_their_model_are_refused(adapters, tmp_path):
    output, _ = adapters
    with pytest.raises(ConfigError, match="`lora_rank`: expected 2"):
        load_model(training.config(tmp_path, model=str(output / "final"), lora_rank=4))
    config = training.config(tmp_path, model=str(output / "final"), lora_rank=2, beta=0.1)
    model, processor = load_model(config)
    with pytest.raises(ConfigError, match="`beta`: expected 0 for a model with trained adapters"):
        Trainer(model, processor, training.records(), config=config)


def test_an_evaluation_is_of_the_dtype_that_is_asked_for(saved):
    config = APPOConfig(model=str(saved), dtype="bfloat16")
    model, _ = load_model(config, trained=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_saved_model_is_asked_as_it_was_trained(adapters, tmp_path):
    """Its frames and length of answers, from its folder; said, and replaced by what is given. Also when merged."""
    output, _ = adapters
    kept = shown_settings(str(output / "final"))
    assert kept["fps"] == 4.0 and kept["max_new_tokens"] == 10 and kept["instructions"] is False
    merge_adapters(output / "final", tmp_path / "merged")
    data = str(training.records()[0].meta["file"])
    for folder in (output / "final", tmp_path / "merged"):
        command = ["eval", "--model", str(folder), "--data", data, "--limit", "1", "max_new_tokens=3"]
        ended = CliRunner().invoke(app, [*command, "--output", str(tmp_path / f"{folder.name}.jsonl")])
        assert ended.exit_code == 0 and f"As the run that saved it ({folder / 'appo.yaml'}): fps=4.0" in ended.stderr
        assert "max_new_tokens" not in ended.stderr
        (answer,) = lines(tmp_path / f"{folder.name}.jsonl")
        assert answer["length"] <= 3
    assert shown_settings("some/hub-name") == {} and shown_settings("") == {}


def test_a_run_folder_and_a_checkpoint_are_no_model(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    for folder, what in ((tmp_path, "run folder"), (tmp_path / "checkpoints" / "step-000001", "checkpoint of a run")):
        with pytest.raises(ConfigError, match=f"expected a model, got the {what} .* Pass {tmp_path / 'final'}"):
            load_model(APPOConfig(model=str(folder)))


def test_a_misspelt_folder_is_said_to_be_none(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="`model`: no folder 'nomodel' here; as a hub name it cannot be loaded"):
        load_model(APPOConfig(model="nomodel"))
