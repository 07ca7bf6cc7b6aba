"""`appo merge`: LoRA adapters of a run added into the weights of their model, so that it loads without peft."""

import json
import shutil
from pathlib import Path
from typing import Any

from appo.config import ConfigError
from appo.models.load import from_pretrained, read_model
from appo.output_paths import check_output_folder
from appo.shown_settings import copy_shown

ADAPTERS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def merge_adapters(adapters: Path, output: Path, *, model: str | None = None) -> Path:
    """Write the model with the adapters of a folder merged in, and its processor, to ``output``; return it.

    The weights keep the dtype that the model was saved in. model: the model the adapters belong to (default: the one
    that they name). Raises ConfigError for folders that cannot be read or written, or do not fit together.
    """
    named = base_model(adapters)
    name = model or named
    if not name:
        raise ConfigError(
            f"{adapters / CONFIG}: expected the name of the model they belong to, got none. Pass --model."
        )
    check_output_folder("output", output)
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"`output`: expected a new or empty folder, got {output} with files in it. Pass another.")
    from peft import PeftModel
    from transformers import AutoProcessor

    processor = from_pretrained(AutoProcessor, str(adapters if has_processor(adapters) else name))
    base = read_model(name, dtype="auto")
    try:
        merged: Any = PeftModel.from_pretrained(base, str(adapters)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # peft's errors for adapters of another model
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{adapters}: expected adapters of {name}, got some that do not fit: {reason}") from error
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    processor.save_pretrained(partial)
    copy_shown(adapters, partial)
    if output.exists():
        output.rmdir()
    return partial.rename(output)


def base_model(adapters: Path) -> str:
    """The model that a folder of adapters names; empty where it names none."""
    if not adapters.is_dir():
        raise ConfigError(f"{adapters}: no such folder. Pass one of adapters, such as the `final` of a run.")
    if not (adapters / CONFIG).is_file() or not (adapters / ADAPTERS).is_file():
        raise ConfigError(
            f"{adapters}: expected a folder of adapters ({CONFIG}, {ADAPTERS}), such as the `final` of a run with "
            "`lora_rank`, got another. A fully trained model needs no merging."
        )
    try:
        content = json.loads((adapters / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{adapters / CONFIG}: not readable as JSON: {error}") from error
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
