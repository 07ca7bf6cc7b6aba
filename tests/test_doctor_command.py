"""Optional packages: used where they can be, and otherwise the reason is said."""

import sys
from types import ModuleType

import pytest
import torch
import training

from appo import doctor, packages
from appo.config import ConfigError
from appo.models import liger
from appo.train.setup import prepare_model


@pytest.fixture
def installed(monkeypatch):
    """liger-kernel, played: it writes down what it was asked for."""
    calls = []
    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2_5_vl": None}
    patch._apply_liger_kernel_to_instance = lambda **options: calls.append(options)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_liger_replaces_norms_and_gated_layers_alone(installed, tmp_path):
    """Its losses would make logits; its rotary function is one for all models of the process."""
    model, _ = training.tiny()
    prepare_model(model, training.config(tmp_path, liger=True))
    (options,) = installed
    assert options.pop("model") is model
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}


def test_liger_under_adapters_is_in_the_model_itself(installed, tmp_path):
    model, _ = training.tiny()
    adapted = prepare_model(model, training.config(tmp_path, lora_rank=4))
    liger.use_liger(adapted)
    assert installed[0]["model"] is adapted.get_base_model()


# What it needs, each missing alone: the package, a GPU, a model that it knows.
@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("package", "liger-kernel cannot be imported"),
        ("gpu", "its kernels run on GPUs, and torch sees none"),
        ("type", "no kernels for models of the type 'qwen3_vl'"),
    ],
)
def test_why_liger_cannot_be_used(missing, reason, installed, monkeypatch, tmp_path):
    if missing == "package":
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    if missing == "gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = training.tiny(family="qwen3_vl" if missing == "type" else "qwen2_5_vl")
    with pytest.raises(ConfigError, match=f"`liger`: expected false here.*{reason}"):
        prepare_model(model, training.config(tmp_path, liger=True))
    assert not installed


def test_the_report_says_what_is_used_and_why_not(monkeypatch, tmp_path):
    monkeypatch.delenv("APPO_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = doctor.report().splitlines()
    assert "  transformers: yes" in lines and "  sdpa, eager, flex_attention: yes" in lines
    assert "  weight_transfer file: yes" in lines and "  weight_transfer nccl: no: torch sees no GPU" in lines
    assert any(line.startswith("liger: no: ") for line in lines)
    for number in (2, 3, 4):
        (line,) = [line for line in lines if line.startswith(f"  flash_attention_{number}")]
        assert ": no: " in line
    (server,) = [line for line in lines if line.startswith("  vllm-server")]
    assert "APPO_VLLM_PYTHON is not set" in server


def test_an_environment_of_vllm_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("APPO_VLLM_PYTHON", "no-such-python")
    assert "no-such-python is no program" in packages.vllm_of_environment()
    monkeypatch.setenv("APPO_VLLM_PYTHON", sys.executable)
    monkeypatch.setattr(packages, "VLLM_NAMES", ("no-such-package",))
    assert "has no vLLM" in packages.vllm_of_environment()
    monkeypatch.setattr(packages, "VLLM_NAMES", ("torch",))
    found = packages.vllm_of_environment()
    assert f"'{torch.__version__.split('+')[0]}" in found and found.startswith("yes, ")


def test_flash_attention_that_is_installed(monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: True)
    assert packages.why_not_flash(2) is None
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(packages.metadata, "version", lambda name: "2.8.3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert packages.why_not_flash(2) == "flash-attn 2.8.3 runs on GPUs, and torch sees none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not on this GPU" in packages.why_not_flash(2)
