"""Loading models: code that comes with them never runs, and what settings and model demand of each other is checked."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import training
from safetensors.torch import load_file, save_file

import appo
from appo.config import APPOConfig, ConfigError
from appo.models.load import check_fits
from appo.train.setup import load_model
from appo.train.trainer import Trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, processor = training.tiny()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model to spoil."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(APPOConfig(model=str(folder), dtype="float32", **settings))
    return str(error.value)


# Where transformers looks for code that comes with a model: each of its files may name some.
@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("config.json", {"AutoConfig": "evil.Thing", "AutoModelForImageTextToText": "evil.Thing"}),
        ("processor_config.json", {"AutoProcessor": "evil.Thing"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_never_runs(
    folder: Path, name: str, entries: dict[str, Any], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with a yes to transformers' question; a model whose type transformers knows loads with its own code."""
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    change(folder / name, auto_map=entries)
    if not known:
        change(folder / "config.json", model_type="evil", auto_map=entries)
        assert ("Python code that comes with it" if name == "config.json" else "cannot be loaded") in refused(folder)
    else:
        load_model(APPOConfig(model=str(folder), dtype="float32", max_pixels=28 * 28))
    assert not ran.exists()


def test_weights_are_never_unpickled(folder: Path) -> None:
    """A model saved as a pickle is read by torch without running what the pickle says."""
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(folder / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    assert "cannot be loaded" in refused(folder)
    assert not (folder / "ran").exists()


def test_no_file_is_unpickled_and_no_code_of_others_asked_for() -> None:
    """Pickles pass between our own processes only; what lies on a disk is read as weights, JSON or YAML."""
    for path in Path(appo.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            written = ast.unparse(call)
            if re.match(r"pickle\.loads?\(|torch\.load\(", written):
                assert re.search(r"stdout|stdin|weights_only=True", written), f"{path}: {written}"
            if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                runs_none = any(name in written for name in ("PeftModel", "GenerationConfig"))  # weights; JSON
                assert runs_none or "trust_remote_code=False" in written, f"{path}: {written}"


# Files that are broken or of another kind: each named with the folder, none a traceback of another library.
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b'{"model_type": "llama"}'),
        ("config.json", b"{}"),
        ("model.safetensors", b"x" * 100),
        ("model.safetensors", b""),
        ("tokenizer.json", b"{}"),
    ],
)
def test_broken_folders(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert message.startswith(("`model`", "model:")) and len(message) < 800


def test_a_weight_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    assert "cannot be loaded" in refused(folder)


def test_settings_that_need_the_model(saved: Path, tmp_path: Path) -> None:
    assert "`layers`: expected 1 to 4" in refused(saved, layers=9, max_pixels=28 * 28)
    assert "`max_pixels`: expected at least the 196 pixels of one token" in refused_fit(max_pixels=14 * 14 - 1)
    assert APPOConfig(method="grpo", layers=9).layers == 9
    with pytest.raises(ConfigError, match="`layers`"):
        Trainer(*training.tiny(), training.records(), config=training.config(tmp_path, layers=9))


def refused_fit(**settings: Any) -> str:
    model, processor = training.tiny()
    config = APPOConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError) as error:
        check_fits(config, model, processor)
    return str(error.value)


def test_a_processor_without_a_pad_token_or_of_text_alone() -> None:
    model, processor = training.tiny()
    processor.tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="pad token"):
        check_fits(APPOConfig(), model, processor)
    with pytest.raises(ConfigError, match="processor of text and video"):
        check_fits(APPOConfig(), model, processor.tokenizer)
