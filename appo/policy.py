"""The model as training sees it: final hidden states of the response tokens, and the head that turns them into logits.

No method makes logits. A step gives `Policy` a function of (hidden, weight, bias), which runs inside its forward, so
that gradient synchronisation and parameter sharding of a wrapper around `Policy` see every parameter that is used.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .types import ResponseBatch

T = TypeVar("T")
Head = Callable[[Tensor, Tensor, Tensor | None], T]


class Policy(nn.Module):
    """A vision-language model of transformers, optionally with peft adapters.

    Raises ValueError for a model whose forward does not take vision features that were computed before
    (``mm_encoder_outputs``): without it the vision tower would run once per response.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        causal = self.causal
        if "mm_encoder_outputs" not in inspect.signature(causal.base_model.forward).parameters:
            raise ValueError(
                f"model: expected one whose forward takes `mm_encoder_outputs` (Qwen2.5-VL, Qwen3-VL), got "
                f"{type(causal).__name__}. Use one of these, or a newer transformers."
            )
        if causal.get_output_embeddings() is None:
            raise ValueError(f"model: expected one with a language-model head, got {type(causal).__name__}.")
        text_config = causal.config.get_text_config()
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)

    @property
    def causal(self) -> Any:
        """The transformers model itself, without adapters around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: ResponseBatch, head: Head[T]) -> T:
        """``head(hidden (B, N, D), weight (V, D), bias (V,) or None)`` on the rows that predict the response."""
        hidden = self._hidden(batch)
        output = self.causal.get_output_embeddings()
        # Master weights may be wider than the hidden states of an autocast forward; the cast carries their gradient.
        bias = getattr(output, "bias", None)
        return head(hidden, output.weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))

    def _hidden(self, batch: ResponseBatch) -> Tensor:
        repeat = batch.group_size
        inputs = batch.prompts.inputs
        response = batch.completion_ids
        ids = torch.cat([inputs["input_ids"].repeat_interleave(repeat, 0), response], 1)
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(repeat, 0), batch.mask.long()], 1)
        arguments: dict[str, Any] = {}
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"].repeat_interleave(repeat, 0)
            arguments["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(response)], 1)
        for name in ("video_grid_thw", "image_grid_thw", "second_per_grid_ts"):
            if name in inputs:
                counts = batch.prompts.images if name.startswith("image") else batch.prompts.videos
                arguments[name] = inputs[name][_repeat_order(counts, repeat, inputs[name].device)]
        outputs = self.causal.base_model(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs=self._vision(batch),
            use_cache=False,
            **arguments,
        )
        return outputs.last_hidden_state[:, batch.rows]

    def _vision(self, batch: ResponseBatch) -> dict[str, Any] | None:
        """Features of every video and image, computed once per prompt and handed to each of its responses."""
        inputs, found = batch.prompts.inputs, {}
        base = self.causal.base_model
        if "pixel_values_videos" in inputs:
            features = base.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
            )
            found["video"] = _repeat_features(features, batch.prompts.videos, batch.group_size)
        if "pixel_values" in inputs:
            features = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
            found["image"] = _repeat_features(features, batch.prompts.images, batch.group_size)
        return found or None


def _repeat_order(counts: list[int], repeat: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices that repeat each prompt's media as a block: counts [2, 1], repeat 2 -> 0 1 0 1 2 2."""
    order, start = [], 0
    for count in counts:
        order += list(range(start, start + count)) * repeat
        start += count
    return torch.tensor(order, dtype=torch.int64, device=device)


def _repeat_features(features: Any, counts: list[int], repeat: int) -> Any:
    """``pooler_output`` (one tensor per video or image) and each level of ``deepstack_features``, repeated."""
    order = _repeat_order(counts, repeat).tolist()
    features.pooler_output = [features.pooler_output[i] for i in order]
    levels = getattr(features, "deepstack_features", None)
    if levels is not None:
        features.deepstack_features = [[level[i] for i in order] for level in levels]
    return features
