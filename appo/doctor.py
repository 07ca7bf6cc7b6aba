"""`appo doctor`: what of the optional packages a run here can use, and why not the others."""

import platform

from appo.models import liger
from appo.packages import FLASH, version, vllm_here, vllm_of_environment, why_not_bitsandbytes, why_not_flash
from appo.rollout.weight_transfer import why_not_transfer


def report() -> str:
    """Lines for people."""
    lines = [f"appo {version('appo')}, Python {platform.python_version()}"]
    lines += [f"  {name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft")]
    lines += ["", "Rollouts (engine, docs/engines.md)", "  transformers: yes", f"  vllm: {in_process()}"]
    lines += [f"  vllm-server: {vllm_of_environment()}"]
    lines += [f"  weight_transfer {kind}: {answer(why_not_transfer(kind))}" for kind in ("file", "nccl", "ipc")]
    lines += ["", "Attention (attn_implementation)", "  sdpa, eager, flex_attention: yes"]
    lines += [f"  flash_attention_{number}: {answer(why_not_flash(number))}" for number in FLASH]
    lines += ["", f"liger: {answer(liger.why_not())}", f"bitsandbytes (optimizer): {answer(why_not_bitsandbytes())}"]
    lines += ["", "Operators: python -m appo_kernels.doctor"]
    return "\n".join(lines)


def answer(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def in_process() -> str:
    """vLLM in this environment."""
    found = vllm_here()
    if found is None:
        return "no: vLLM is not installed in this environment; pip install 'appo[vllm]', or take vllm-server"
    return f"yes, {' '.join(found)}"
