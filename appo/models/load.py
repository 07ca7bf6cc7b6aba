"""Loading what transformers saved, without running code that comes with it, and what settings and model demand of each
other."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch

from appo.config import APPOConfig, ConfigError
from appo.constraints import shown
from appo.models.layouts import layout_of
from appo.models.loaded import unwrapped
from appo.packages import why_not_flash
from appo.recording.hooks import check_attention as check_recorded
from appo.recording.hooks import last_layers

_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def from_pretrained(kind: Any, name: str, **options: Any) -> Any:
    """``kind.from_pretrained`` of a folder or hub name; Python files in it are never run.

    Raises ConfigError where it cannot be loaded, and where it needs code of its own.
    """
    folder = Path(name)
    if not folder.exists() and not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"`model`: expected a folder that exists or a hub name, got {shown(name)}.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`model`: expected a folder, got the file {name}. Pass the folder it is in.")
    if (folder / "checkpoints").is_dir() or (folder.parent.name == "checkpoints" and folder.is_dir()):
        run = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
        what = "run folder" if run == folder else "checkpoint of a run"
        raise ConfigError(
            f"`model`: expected a model, got the {what} {name}. Pass {run / 'final'}"
            + (f", or {run / 'best'}." if (run / "best").is_dir() else ".")
            + ("" if (run / "final").is_dir() else " The run has to end for it: it goes on with the same command.")
        )
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # files of any origin, and libraries with errors of their own
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"`model`: {name} needs Python code that comes with it, which is never run here. Use a model whose "
                "code is part of transformers."
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if folder.exists():
            raise ConfigError(f"`model`: the folder {name!r} cannot be loaded: {reason}") from error
        raise ConfigError(
            f"`model`: no folder {name!r} here; as a hub name it cannot be loaded: {reason}. Paths start from the "
            "working directory, in a settings file from the file's folder."
        ) from error


def read_config(name: str) -> Any:
    """The configuration of what reads and writes text in a folder or hub name: of a model that speaks too
    (Qwen-Omni) its thinker's. Raises ConfigError."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, name)
    return getattr(config, "thinker_config", config)


def read_model(name: str, **options: Any) -> Any:
    """The model of `read_config` with its weights. Raises ConfigError."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    config = read_config(name)
    # The automatic class would look for the configuration of the whole.
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), AutoModelForImageTextToText)
    return from_pretrained(kind, name, **options)


def without_weights(name: str, **options: Any) -> Any:
    """The model of `read_model` with parameters on the meta device: for a process that gets them from another."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText, GenerationConfig

    config = read_config(name)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False, **options)
    model.tie_weights()  # which moving to that device has undone
    with contextlib.suppress(OSError):  # a model may have none
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def check_attention(config: APPOConfig) -> None:
    """Raise ConfigError for attention of a package that is not there, or that does not take ``dtype``."""
    name, _, number = config.attn_implementation.rpartition("_")
    if name != "flash_attention":
        return
    if reason := why_not_flash(int(number)):
        raise ConfigError(
            f"`attn_implementation`: expected sdpa here, got {config.attn_implementation}: {reason}. `appo doctor` "
            "says what there is."
        )
    if config.dtype == "float32":
        raise ConfigError(
            f"`dtype`: expected bfloat16 or float16 with attn_implementation = {config.attn_implementation}, whose "
            "kernels take no other, got float32. Change either."
        )


def check_fits(config: APPOConfig, model: Any, processor: Any) -> None:
    """Settings that need the model to be judged. Raises ConfigError."""
    if config.records_mass:
        try:
            check_recorded(model, last_layers(model, config.layers))
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("record_frame_mass: ")) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            f"`model`: expected a processor of text and video beside the model, got {type(processor).__name__}. "
            "Save it with processor.save_pretrained into the model's folder."
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "`model`: expected a tokenizer with a pad token, got none. Set tokenizer.pad_token and save it."
        )
    least = layout_of(unwrapped(model).config).sizes(processor).factor ** 2
    if config.max_pixels < least:
        raise ConfigError(f"`max_pixels`: expected at least the {least} pixels of one token, got {config.max_pixels}.")
