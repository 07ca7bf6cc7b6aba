"""A function of a model's response rows, run inside its forward, so that DDP, FSDP and PEFT see what is used."""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

# hidden (B, N, D) of the rows that predict the last N tokens, weight (V, D), bias (V,) or None
ResponseHead = Callable[[Tensor, Tensor, Tensor | None], Any]


def add_response_head(model: Any) -> None:
    """Let ``model(..., response_head=function, response_length=N)`` return ``function(hidden, weight, bias)``.

    Without the keyword the forward is what it was. ``model`` is a transformers model with a head, bare of PEFT (whose
    adapters work inside it). The head is looked up at each call, since FSDP replaces it; a sharded one is gathered.
    """
    plain = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(
        self: Any, *args: Any, response_head: ResponseHead | None = None, response_length: int = 0, **inputs: Any
    ) -> Any:
        if response_head is None:
            return plain(*args, **inputs)
        hidden = self.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state
        rows = hidden[:, -response_length - 1 : -1]
        head = self.get_output_embeddings()
        weight, bias = (None if x is None else _whole(x).to(rows.dtype) for x in (head.weight, head.bias))
        assert weight is not None
        return response_head(rows, weight, bias)

    model.forward = types.MethodType(forward, model)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that FSDP2 has sharded, gathered."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
