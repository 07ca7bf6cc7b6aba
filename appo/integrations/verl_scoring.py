"""The token weights of a micro-batch of whole groups in verl's layout: what its engine adds to a scoring forward."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.model import extract_multi_modal_inputs

from appo.config import APPOConfig
from appo.integrations.packed import PackedMass, PackedRows
from appo.integrations.weights import GroupWeights, group_weights
from appo.recording.frame_ids import frame_ids
from appo.recording.hooks import last_layers
from appo_kernels import TokenLogprobs

# Beside the fields of APPOConfig that `group_weights` and the recorder read:
SETTINGS = {
    "group_size": "responses of a prompt, which lie one after another",
    "accuracy": "name in reward_extra_info that says which responses are right; None: the sum of rm_scores",
    "frame_mass": "width F of the frame mass that is returned as well; 0: none is",
}


class Scoring:
    """Of a micro-batch of B sequences, in whole groups: open ``recorder`` around its forward, which calls ``weigh``.

    Raises:
        ValueError: an engine whose forward does not compute log-probabilities of whole packed rows here.
    """

    def __init__(self, engine: Any, micro_batch: TensorDict, settings: dict[str, Any]) -> None:
        own = dict(settings)
        self.group_size, accuracy, self.width = (own.pop(name) for name in ("group_size", "accuracy", "frame_mass"))
        self.config = APPOConfig(**own)
        for name, wanted in (("use_remove_padding", True), ("use_fused_kernels", True)):
            if tu.get_non_tensor_data(micro_batch, name, False) is not wanted:
                raise ValueError(f"`model.{name}`: expected {wanted} for token weights. Set it.")
        ids = micro_batch["input_ids"]
        self.device = next(engine.module.parameters()).device
        lengths = ids.offsets().diff().tolist()
        self.packed = PackedRows(lengths, micro_batch["responses"].offsets().diff().tolist(), self.device)
        self.input_ids = ids.values().to(self.device)
        self.mask = self.packed.per_response(torch.cat(micro_batch["response_mask"].unbind()).to(self.device)).bool()
        self.rewards = _rewards(micro_batch, accuracy).to(self.device)
        media = extract_multi_modal_inputs(micro_batch.get("multi_modal_inputs", []))
        grid = media.get("video_grid_thw")
        # The engine pads the row to what its kernels like.
        padding = engine._get_packed_pad_size(len(self.input_ids))
        row = torch.nn.functional.pad(self.input_ids, (0, padding), value=-1)[None]
        self.recorder = PackedMass(
            engine.module,
            frame_ids(row, engine.model_config.hf_config, video_grid_thw=grid),
            self.packed,
            layers=last_layers(engine.module, self.config.layers),
            reduction=self.config.mass_reduction,
        )
        self.found: GroupWeights | None = None

    def weigh(self, hidden: Tensor, weight: Tensor, scored: TokenLogprobs, temperature: float) -> None:
        """hidden (T, D) of the row, weight (V, D) of the head, scored (T,): of the token that follows each."""
        with torch.no_grad():
            rows, padded = self.packed.rows, self.packed.per_response
            self.found = group_weights(
                self.recorder.mass, self.mask, self.rewards, padded(hidden[rows]), weight,
                self.packed.targets(self.input_ids), config=self.config, group_size=self.group_size,
                scored=TokenLogprobs(*(padded(values[rows].float()) for values in scored)), temperature=temperature,
            )  # fmt: skip

    def outputs(self) -> dict[str, Tensor]:
        """Nested tensors, one row per sequence: token_weights (N,), and frame_mass (N, width) where asked for."""
        if self.found is None:
            raise ValueError(
                "`model.fused_kernel_options.impl_backend`: expected a forward that calls FusedLinearForPPO, which "
                '"torch" does. Set it.'
            )
        outputs = {"token_weights": self._nested(self.found.weights)}
        if self.width:
            mass = self.recorder.mass
            if mass.shape[2] > self.width:
                raise ValueError(f"`frame_mass`: expected at least {mass.shape[2]} frames, got {self.width}. Raise it.")
            outputs["frame_mass"] = self._nested(torch.nn.functional.pad(mass, (0, self.width - mass.shape[2])))
        return outputs

    def _nested(self, values: Tensor) -> Tensor:
        rows = [row[:length] for row, length in zip(values, self.packed.response_lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _rewards(micro_batch: TensorDict, accuracy: str | None) -> Tensor:
    """(B,) of each response."""
    if accuracy is None:
        return torch.stack([row.sum() for row in micro_batch["rm_scores"].unbind()]).float()
    rewards = []
    for index, fields in enumerate(tu.get(micro_batch, "extra_fields")):
        known = fields.get("reward_extra_info") or {}
        if accuracy not in known:
            raise ValueError(
                f"`appo.accuracy`: expected one of {', '.join(sorted(known)) or 'no names'} in the reward_extra_info "
                f"of sequence {index}, got {accuracy!r}. Return it from the reward function."
            )
        rewards.append(float(known[accuracy]))
    return torch.tensor(rewards)
