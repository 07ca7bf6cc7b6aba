"""The model as training sees it: final hidden states of the response tokens, and the head that turns them into logits.

No method makes logits. A step gives `Policy` a function of (hidden, weight, bias), which runs inside its forward, so
that gradient synchronisation and parameter sharding of a wrapper around `Policy` see every parameter that is used.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from appo.config import APPOConfig, ConfigError
from appo.models.layouts import layout_of
from appo.models.loaded import check_head, refuse_dense_mask, unwrapped
from appo.models.packed_attention import cannot_pack, use_packed_attention
from appo.recording.hooks import last_layers
from appo.recording.recorder import FrameMassRecorder, record_frame_mass
from appo.train.groups import ResponseBatch
from appo.train.packing import Sequences, packed, separate

logger = logging.getLogger("appo")
T = TypeVar("T")
Head = Callable[[Tensor, Tensor, Tensor | None], T]


class Policy(nn.Module):
    """A vision-language model of transformers, optionally with peft adapters.

    share_prompt: lay a group's responses behind one prompt, in a row without padding ("on"; "off"; "auto": where the
        model allows it, since that never computes more pairs than separate sequences). The text layers then have the
        attention implementation "appo".

    Raises ConfigError for a model whose layout is not known to be right (docs/models.md), or whose forward takes no
    vision features that were computed before (``mm_encoder_outputs``): the tower would run once per response.
    """

    def __init__(self, model: nn.Module, share_prompt: str = "auto") -> None:
        super().__init__()
        self.model: Any = model
        causal = self.causal
        self.layout = layout = layout_of(causal.config)
        if "mm_encoder_outputs" not in inspect.signature(causal.base_model.forward).parameters:
            raise ConfigError(
                f"model: expected a {layout.models} whose forward takes `mm_encoder_outputs`, got one without. Install "
                "a newer transformers."
            )
        if causal.get_output_embeddings() is None:
            raise ConfigError(f"model: expected one with a language-model head, got {type(causal).__name__}.")
        check_head(causal)
        reason = cannot_pack(causal) if layout.shares_prompt else layout.why_not
        if share_prompt == "on" and reason is not None:
            raise ConfigError(f"`share_prompt`: expected a model that allows it, but {reason}. Set it to auto or off.")
        self.share_prompt = share_prompt != "off" and reason is None
        if self.share_prompt:
            use_packed_attention(causal)
        logger.info("responses of a group %s", "share their prompt" if self.share_prompt else reason or "stand alone")
        text_config = causal.config.get_text_config()
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)

    @property
    def causal(self) -> Any:
        """The transformers model itself, without adapters around it."""
        return unwrapped(self.model)

    def forward(self, batch: ResponseBatch, head: Head[T], sequences: Sequences | None = None) -> T:
        """``head(hidden (B, N, D), weight (V, D), bias (V,) or None)`` on the rows that predict the response.

        sequences: those of ``self.sequences(batch)``, for a caller that needs to know them.
        """
        hidden = self._hidden(batch, sequences or self.sequences(batch))
        if torch.is_grad_enabled() and not any("pixel" in name for name in batch.prompts.inputs):
            hidden = hidden + self._no_pixels(hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            # The final norm's fp32 weight widens its output again; the head is to run in the dtype of the forward.
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return head(hidden, *self.output_head(hidden.dtype))

    def _no_pixels(self, hidden: Tensor) -> Tensor:
        """0, with a gradient of 0 for what is trained beside text model and head (the vision tower), which a batch
        without pixels leaves out: processes reduce their gradients together, and wait for those of every one."""
        return sum((p.flatten()[:0].sum() for p in self._trained_vision()), hidden.new_zeros(()))

    def _trained_vision(self) -> list[nn.Parameter]:
        """Parameters that are trained beside text model and head."""
        text = {*self.causal.get_decoder().parameters(), *self.causal.get_output_embeddings().parameters()}
        return [p for p in self.parameters() if p.requires_grad and p not in text]

    def run(self, function: Callable[[], T]) -> T:
        """``function()`` as a forward: a wrapper that shards parameters has the policy's own ones whole meanwhile."""
        return function()

    def output_head(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the language-model head in ``dtype``, inside a forward or `run`."""
        output = self.causal.get_output_embeddings()
        # Master weights may be wider than the hidden states of an autocast forward; the cast carries their gradient.
        bias = getattr(output, "bias", None)
        return output.weight.to(dtype), None if bias is None else bias.to(dtype)

    def logit_arguments(self, config: APPOConfig) -> dict[str, Any]:
        """Arguments by which operators turn products with the head into the logits that tokens are sampled from."""
        return {"temperature": config.temperature, "softcap": self.softcap}

    def sequences(self, batch: ResponseBatch) -> Sequences:
        if self.share_prompt:
            return packed(batch, self.causal)
        # Models whose positions depend on media find them, from the mask as well; others would count padding.
        return separate(batch, counted=not hasattr(self.causal.base_model, "get_rope_index"))

    def recorder(
        self, sequences: Sequences, config: APPOConfig, *, reduction: str | None = None, gradient: bool = False
    ) -> FrameMassRecorder:
        """A recorder of the responses' tokens in the layers of ``config``. reduction: None: that of ``config``."""
        return record_frame_mass(
            self.model,
            sequences.frame_ids,
            rows=sequences.rows,
            layers=last_layers(self.model, config.layers),
            reduction=reduction or config.mass_reduction,
            gradient=gradient,
        )

    def _hidden(self, batch: ResponseBatch, sequences: Sequences) -> Tensor:
        base, arguments = self.causal.base_model, dict[str, Any](self.layout.named_types(sequences.token_types))
        if sequences.position_ids is not None:
            arguments["position_ids"] = sequences.position_ids
        if sequences.layout is not None:
            arguments["group_layout"] = sequences.layout
        else:
            refuse_dense_mask(self.causal, sequences.attention_mask)
        inputs, rows = batch.prompts.inputs, batch.prompts.rows
        # Adapters and checkpointing make every embedding's output require a gradient, that of a frozen tower as well,
        # which would then keep its activations and have a backward.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self._trained_vision())):
            features = self.layout.features(base, inputs, rows, sequences.media_repeats)
        outputs = base(
            input_ids=sequences.input_ids,
            attention_mask=sequences.attention_mask,
            use_cache=False,
            **arguments,
            **features,
        )
        hidden = outputs.last_hidden_state  # (S, L, D)
        places = sequences.rows[..., None].expand(-1, -1, hidden.shape[-1])
        return sequences.per_response(hidden.gather(1, places))
