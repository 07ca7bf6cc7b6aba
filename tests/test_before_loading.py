"""What a run cannot have here is said before its weights are read."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import training
from filelock import FileLock
from test_cli import nothing_is_loaded, refused, run

from appo import packages
from appo.config import APPOConfig, ConfigError
from appo.models import load
from appo.rollout.vllm_requests import EngineError
from appo.train import setup
from appo.train.before_loading import check_run

__all__ = ["nothing_is_loaded"]  # a fixture


# A setting that needs a package or a server, and what the error says. None of them is in this environment.
MISSING = [
    (["vllm_python=wrong/path", "engine=vllm-server"], "`vllm_python`: .*wrong/path is no program"),
    ([f"vllm_python={sys.executable}", "engine=vllm-server"], "`vllm_python`: .* has no vLLM"),
    (["engine=vllm"], r"`engine`: .*pip install 'appo\[vllm\]'"),
    (["optimizer=adamw_8bit"], r"`optimizer`: .*pip install 'appo\[bitsandbytes\]'"),
    (["liger=true"], "`liger`: expected false here"),
    (["attn_implementation=flash_attention_2"], r"`attn_implementation`: .*pip install 'appo\[flash-attn\]'"),
    (["attn_implementation=flash_attention_3"], "`attn_implementation`: expected sdpa here.*flash-attn-3"),
    (
        ["weight_transfer=nccl", "engine=vllm-server", "engine_urls=[http://127.0.0.1:1]"],
        "`weight_transfer`: expected file here, got nccl: torch sees no GPU",
    ),
    (["asynchronous=true"], "`asynchronous`: expected an engine beside the model"),
]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without optional packages and without a GPU."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(packages, "version", lambda name: "not installed")
    monkeypatch.setattr(packages, "VLLM_NAMES", ("no-such-package",))


@pytest.mark.usefixtures("nothing_is_loaded", "bare")
@pytest.mark.parametrize(("settings", "said"), MISSING)
def test_train_says_what_is_not_there(settings: list[str], said: str, tmp_path: Path) -> None:
    import re

    file = tmp_path / "run.yaml"
    file.write_text(f"model: some/model\ndata: train.json\noutput: {tmp_path / 'run'}\n")
    assert re.search(said, refused("train", file, *settings))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: some/model\ndata: train.json\noutput: {tmp_path / 'run'}\nengine: vllm-server\n")
    code, printed = run("train", file, "engine_urls=[http://127.0.0.1:1]")
    assert code == 1 and printed.startswith("appo: vLLM server http://127.0.0.1:1: does not answer"), printed
    with pytest.raises(EngineError, match="does not answer"):
        check_run(APPOConfig.load(file, ["engine_urls=[http://127.0.0.1:1]"]))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_folder_with_another_run_or_other_settings(tmp_path: Path) -> None:
    file, output = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(f"model: some/model\ndata: train.json\noutput: {output}\n")
    (output / "checkpoints" / "step-000001").mkdir(parents=True)
    dataclasses.replace(APPOConfig.load(file), seed=7).save(output / "config.yaml")
    assert "holds a run with other settings: seed = 7, now 0" in refused("train", file)
    with FileLock(output / ".lock"):
        assert "another run is in" in refused("train", file, "seed=7")


def test_no_weights_are_read_for_what_does_not_fit_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that the model has not, by its configuration; a tokenizer without a pad token."""
    model, processor = training.tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(setup, "read_model", None)
    with pytest.raises(ConfigError, match="`layers`: expected 1 to"):
        setup.load_model(training.config(tmp_path / "run", model=str(tmp_path), layers=99))
    processor.tokenizer.pad_token = None
    processor.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a tokenizer with a pad token"):
        setup.load_model(training.config(tmp_path / "run", model=str(tmp_path)))


def test_flash_attention_takes_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "why_not_flash", lambda number: None)
    load.check_attention(APPOConfig(attn_implementation="flash_attention_2"))
    with pytest.raises(ConfigError, match="`dtype`: expected bfloat16 or float16 with attn_implementation"):
        load.check_attention(APPOConfig(attn_implementation="flash_attention_2", dtype="float32"))
