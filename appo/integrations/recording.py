"""Frame mass in a scoring forward of padded rows."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from appo.config import APPOConfig
from appo.models.loaded import unwrapped
from appo.recording.arguments import response_rows
from appo.recording.frame_ids import frame_ids
from appo.recording.hooks import last_layers
from appo.recording.recorder import FrameMassRecorder, record_frame_mass


class NoMass(SimpleNamespace):
    """A recorder of nothing: ``mass`` (B, N, 0)."""

    mass: Tensor

    def __enter__(self) -> "NoMass":
        return self

    def __exit__(self, *error: Any) -> None: ...


def record_responses(
    model: Any, input_ids: Tensor, length: int, config: APPOConfig, *, video_grid_thw: Tensor | None = None
) -> FrameMassRecorder | NoMass:
    """A recorder, as ``config`` asks, of the last N = ``length`` tokens of ``input_ids`` (B, P + N).

    A context manager around a forward of these rows; its ``mass`` (B, N, F) is there after it.
    """
    if not config.records_mass:
        return NoMass(mass=torch.zeros(len(input_ids), length, 0, device=input_ids.device))
    return record_frame_mass(
        model,
        frame_ids(input_ids, unwrapped(model).config, video_grid_thw=video_grid_thw),
        rows=response_rows(input_ids.shape[1] - length, length),
        layers=last_layers(model, config.layers),
        reduction=config.mass_reduction,
    )


def logit_arguments(model: Any, temperature: float) -> dict[str, Any]:
    """Arguments by which operators turn products with the head into the logits that tokens are sampled from."""
    text_config = unwrapped(model).config.get_text_config()
    return {"temperature": temperature, "softcap": getattr(text_config, "final_logit_softcapping", None)}
