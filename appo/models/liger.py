"""liger-kernel's RMSNorm and SwiGLU in a transformers model (the setting ``liger``)."""

from typing import Any

import torch

from appo.config import ConfigError
from appo.models.loaded import unwrapped

# Its losses and its rotary embedding stay off: the policy's loss never makes logits, and the rotary function would be
# replaced for every model of the process.
LEFT_OUT = ("cross_entropy", "fused_linear_cross_entropy", "rope")


def why_not(model_type: str | None = None) -> str | None:
    """The reason that its kernels cannot be used here, for models of a type where one is given; None where they can."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error}); pip install 'appo[liger]'"
    if not torch.cuda.is_available():
        return "its kernels run on GPUs, and torch sees none"
    if model_type is not None and model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for models of the type {model_type!r}"
    return None


def check(model_type: str | None = None) -> None:
    """Raise ConfigError with the reason that its kernels cannot be used, where there is one."""
    if reason := why_not(model_type):
        raise ConfigError(f"`liger`: expected false here, got true: {reason}.")


def use_liger(model: Any) -> None:
    """Replace norms and gated layers of ``model`` (also one wrapped by peft). Raises ConfigError with the reason."""
    plain = unwrapped(model)
    check(plain.config.model_type)
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=plain, **dict.fromkeys(LEFT_OUT, False))
