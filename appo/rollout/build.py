"""The rollout engine that a run's settings name."""

import json
from pathlib import Path
from typing import Any

import torch

from appo.config import APPOConfig, ConfigError
from appo.models.layouts import layout_of
from appo.models.loaded import unwrapped
from appo.models.positions import CONCERNED
from appo.packages import vllm_here, vllm_of
from appo.rollout.engine import Rollout
from appo.rollout.model_engine import TransformersRollout
from appo.rollout.vllm_process import Server
from appo.rollout.weight_transfer import why_not_transfer

# Log-probabilities at another temperature than 1 are those of the distribution that was sampled from.
LOGPROBS_MODES = {True: "raw_logprobs", False: "processed_logprobs"}


def check_engine(config: APPOConfig) -> None:
    """What can be said of ``config.engine`` before a model is loaded.

    Raises ConfigError where vLLM or a way of transfer is not there, EngineError for a server that does not answer.
    """
    if config.engine == "vllm" and vllm_here() is None:
        raise ConfigError(
            "`engine`: expected vLLM in this environment for vllm, got none: pip install 'appo[vllm]'. Where its "
            "versions of torch and transformers do not fit, give it an environment of its own and take vllm-server."
        )
    if config.engine != "vllm-server":
        return
    if config.vllm_python and (why_none := vllm_of(config.vllm_python)[1]):
        raise ConfigError(
            f"`vllm_python`: expected the interpreter of an environment with vLLM: {why_none}. Make one: `python -m "
            "venv vllm-env && vllm-env/bin/pip install vllm`."
        )
    if reason := why_not_transfer(config.weight_transfer):
        raise ConfigError(f"`weight_transfer`: expected file here, got {config.weight_transfer}: {reason}.")
    for url in config.engine_urls:
        Server(url.rstrip("/"), config.engine_token).info(config.engine_timeout)


def check_served(config: APPOConfig, model_config: Any) -> None:
    """Raise ConfigError for positions and models, by their configuration, that ``config.engine`` does not have."""
    if config.engine == "transformers":
        return
    layout = layout_of(model_config)
    if layout.why_not_vllm:
        raise ConfigError(
            f"`engine`: expected transformers with {layout.models}, got {config.engine}: {layout.why_not_vllm}."
        )
    if config.video_positions != "original" and model_config.model_type in CONCERNED:
        raise ConfigError(
            f"`video_positions`: expected original with engine = {config.engine}, the positions that vLLM gives text "
            f"behind a video, got {config.video_positions}. A model trained with others needs engine=transformers."
        )


def build_engine(config: APPOConfig, model: Any, processor: Any) -> Rollout:
    """The engine of ``config.engine`` (docs/engines.md), with whatever it starts started.

    Raises ConfigError for positions and models that vLLM does not have, EngineError naming the server and what is
    wrong with it, ImportError where vLLM is to run in this process and is not installed.
    """
    if config.engine == "transformers":
        return TransformersRollout(model, processor, batch_tokens=config.rollout_tokens)
    check_served(config, unwrapped(model).config)
    arguments = {"dtype": config.dtype, "max_model_len": None} | json.loads(config.vllm_arguments)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    # What is handed over is what the trainer's forward computes in.
    dtype = getattr(torch, config.dtype)
    mode = LOGPROBS_MODES[config.temperature == 1]
    if config.engine == "vllm":
        from appo.rollout.vllm_engine import VLLMRollout

        return VLLMRollout(model, processor, config.model, arguments=arguments, logprobs_mode=mode, dtype=dtype)
    from appo.rollout.vllm_server import VLLMServerRollout

    return VLLMServerRollout(
        model,
        processor,
        Path(config.output) / "engine",
        urls=config.engine_urls,
        python=config.vllm_python,
        model_path=config.model,
        arguments=arguments,
        token=config.engine_token,
        timeout=config.engine_timeout,
        retries=config.engine_retries,
        logprobs_mode=mode,
        dtype=dtype,
        weight_transfer=config.weight_transfer,
    )
