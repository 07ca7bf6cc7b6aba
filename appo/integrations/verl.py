"""APPO in verl: a plugin whose engine weighs tokens in the pass that finds the old log-probabilities.

verl loads it in every process (entry point ``verl.plugins``, or VERL_USE_EXTERNAL_MODULES=appo.integrations.verl);
``trainer.v1.trainer_mode=appo`` chooses the trainer that asks for weights (`appo.integrations.verl_trainer`). Without
it the engine does what verl's does. ``model.use_fused_kernels=True`` is then `token_logprobs` in any case.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import fsdp_utils
from verl.utils import tensordict_utils as tu
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from appo.integrations.verl_scoring import Scoring
from appo.models.loaded import unwrapped
from appo.models.packed_attention import narrowed
from appo_kernels import token_logprobs

# Of the forward under way, where it is asked for weights.
_SCORING: ContextVar[Scoring | None] = ContextVar("appo_scoring", default=None)


def fused_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``FusedLinearForPPO.forward``: (log_probs, entropy) of ``input_ids`` (..., T), without logits."""
    hidden, weight = narrowed(hidden_states.reshape(-1, hidden_states.shape[-1]), vocab_weights)
    weight = weight.to(hidden.dtype)
    found = token_logprobs(hidden, weight, input_ids.reshape(-1).long(), temperature=float(temperature))
    if (scoring := _SCORING.get()) is not None:
        scoring.weigh(hidden, weight, found, float(temperature))
    return found.logprobs.view(input_ids.shape), found.entropy.view(input_ids.shape)


class APPOEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine, which weighs tokens where a batch asks for it, and trains on weighted advantages.

    A batch that has the entry "appo" (settings: `appo.integrations.verl_scoring.SETTINGS`) and is not trained on comes
    back with ``token_weights`` (B, N of each), and ``frame_mass`` (B, N, F) where asked for, beside ``log_probs``; all
    from one forward over packed rows. One that has the column ``token_weights`` has its advantages multiplied by it
    before any of verl's losses sees them: `ppo_loss` hands no further column on.
    """

    def _build_module(self) -> Any:
        with _attention_of_transformers(self.model_config.hf_config.model_type):
            return super()._build_module()

    def _build_fsdp_module(self, module: Any) -> Any:
        if not self.model_config.use_fused_kernels:
            return super()._build_fsdp_module(module)
        with _head_in_the_root():
            return super()._build_fsdp_module(module)

    def forward_step(
        self, micro_batch: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> Any:
        settings = tu.get_non_tensor_data(micro_batch, "appo", None)
        if settings is None or loss_function is not None:
            if "token_weights" in micro_batch and "advantages" in micro_batch:
                micro_batch = micro_batch.copy()
                micro_batch["advantages"] = _product(micro_batch["advantages"], micro_batch["token_weights"])
            return super().forward_step(micro_batch, loss_function, forward_only)
        scoring = Scoring(self, micro_batch, settings)
        token = _SCORING.set(scoring)
        try:
            with scoring.recorder:
                loss, output = super().forward_step(micro_batch, None, forward_only)
        finally:
            _SCORING.reset(token)
        output["model_output"].update(scoring.outputs())
        return loss, output


def _product(advantages: Tensor, weights: Tensor) -> Tensor:
    """Of two nested tensors whose rows are of equal length, each with offsets of its own."""
    parts = zip(advantages.unbind(), weights.unbind(), strict=True)
    return torch.nested.as_nested_tensor([a * w.to(a) for a, w in parts], layout=torch.jagged)


@contextlib.contextmanager
def _attention_of_transformers(model_type: str) -> Iterator[None]:
    """verl gives Qwen2-VL and Qwen2.5-VL an attention of its own, for sequence parallelism, that nothing can record.

    Without sequence parallelism transformers' does the same: the packed row is told by ``position_ids``.
    """
    if model_type not in ("qwen2_vl", "qwen2_5_vl"):
        yield
        return
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention

    kinds: tuple[Any, ...] = (Qwen2_5_VLAttention, Qwen2VLAttention)
    forwards = [kind.forward for kind in kinds]
    try:
        yield
    finally:
        for kind, forward in zip(kinds, forwards, strict=True):
            kind.forward = forward


@contextlib.contextmanager
def _head_in_the_root() -> Iterator[None]:
    """Under FSDP2 verl shards the head as a unit of its own, whose weight is in shards where no forward of the head is
    called, as with fused kernels. In the root's unit it is whole through the forward, and its gradient is reduced."""
    select = fsdp_utils._select_fsdp2_wrap_targets

    def without_head(model: Any, *args: Any) -> list[Any]:
        head = unwrapped(model).get_output_embeddings()
        return [module for module in select(model, *args) if module is not head]

    fsdp_utils._select_fsdp2_wrap_targets = without_head
    try:
        yield
    finally:
        fsdp_utils._select_fsdp2_wrap_targets = select


def register() -> None:
    """Put the engine and the log-probabilities in the place of verl's; more than once is harmless."""
    FusedLinearForPPO.forward = fused_forward
    # Its strategies are compared by name all over verl, so that the engine has to go by those of verl's own.
    for backend in ("fsdp", "fsdp2"):
        for device in ("cuda", "npu", "cpu"):
            EngineRegistry._engines["language_model"][backend][device] = APPOEngine


register()
if importlib.util.find_spec("transfer_queue") is not None:  # verl's trainer needs it, its workers alone may lack it
    import appo.integrations.verl_trainer  # noqa: F401
