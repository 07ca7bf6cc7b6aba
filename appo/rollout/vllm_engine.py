"""Rollouts by vLLM in the trainer's process, which then needs vLLM in its own environment."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from appo.data.prompts import Prompt
from appo.models.loaded import end_ids, vision_token_ids
from appo.rollout.engine import Completion, Sampling
from appo.rollout.vllm_requests import check_prompt, media_of, sampling_arguments
from appo.rollout.vllm_worker import whole_prompts
from appo.rollout.weight_files import weights_of

WHERE = "vLLM in this process"


class VLLMRollout:
    """Samples with a vLLM engine that shares this process and its device; one engine for each process.

    On a GPU the engine sleeps while the trainer computes: its weights go to host memory and its cache is dropped.

    Args:
        model: the model in training, for its special tokens; weights come by ``update_weights``.
        processor: its processor. model_path: the folder or hub name it was loaded from.
        arguments: further arguments of ``vllm.LLM``; tensor parallel over the trainer's processes is
            ``{"tensor_parallel_size": n, "distributed_executor_backend": "external_launcher"}``.
        dtype: of the weights that are handed over.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        model_path: str,
        *,
        arguments: dict[str, Any] | None = None,
        logprobs_mode: str = "raw_logprobs",
        dtype: torch.dtype | None = None,
    ) -> None:
        # Its worker is to be in this process, where the weights are; read when vLLM is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "`engine: vllm` needs vLLM in this environment (pip install vllm); where its versions of torch and "
                "transformers do not fit, give it an environment of its own and take `engine: vllm-server`."
            ) from error
        tokenizer = getattr(processor, "tokenizer", processor)
        self.suppressed, self.end_ids = vision_token_ids(model, tokenizer), end_ids(model, tokenizer)
        self.version, self.dtype = -1, dtype
        self.sleeps = torch.cuda.is_available()
        settings: dict[str, Any] = {
            "limit_mm_per_prompt": {"video": 16, "image": 64},
            "logprobs_mode": logprobs_mode,
            "generation_config": "vllm",
            "trust_remote_code": False,
            "mm_device_do_normalize": False,  # pixels as the processor makes them, which is what the trainer sees
            "enable_sleep_mode": self.sleeps,
            **whole_prompts(),
        }
        self.llm = LLM(model=model_path, **(settings | (arguments or {})))
        if self.sleeps:
            self.llm.sleep(level=1)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Completion]]:
        """See ``Rollout``. Raises EngineError when vLLM reads a prompt otherwise than the trainer."""
        from vllm import SamplingParams

        inputs, parameters = [], []
        for prompt, seed in zip(prompts, seeds, strict=True):
            media, processor = media_of(prompt)
            inputs.append(
                {"prompt": prompt.text, "multi_modal_data": media, "mm_processor_kwargs": processor}
                if media
                else {"prompt_token_ids": prompt.input_ids.tolist()}
            )
            arguments = sampling_arguments(sampling, seed, suppressed=self.suppressed, end_ids=self.end_ids)
            parameters.append(SamplingParams(**arguments))
        if self.sleeps:
            self.llm.wake_up()
        results = self.llm.generate(inputs, parameters, use_tqdm=False)
        if self.sleeps:
            self.llm.sleep(level=1)
        for result, prompt in zip(results, prompts, strict=True):
            check_prompt(result.prompt_token_ids, prompt, WHERE)
        return [
            [self._completion(output) for output in sorted(result.outputs, key=lambda output: output.index)]
            for result in results
        ]

    def _completion(self, output: Any) -> Completion:
        logprobs = [each[token].logprob for token, each in zip(output.token_ids, output.logprobs, strict=True)]
        return Completion(
            torch.tensor(output.token_ids, dtype=torch.int64),
            torch.tensor(logprobs, dtype=torch.float32),
            output.finish_reason,
            self.version,
        )

    def update_weights(self, model: nn.Module, version: int) -> None:
        """Hand the weights over one by one. Every process calls it; see ``Rollout``."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        # The worker is in this process: it iterates itself, so that no second copy of the model is ever whole.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_of(model, self.dtype)})
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_prefix_cache()
        self.version = version
        if self.sleeps:
            self.llm.sleep(level=1)

    def close(self) -> None:
        """Give back what the engine holds."""
        self.llm.llm_engine.engine_core.shutdown()
