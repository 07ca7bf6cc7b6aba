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
    adapters work inside it). The function takes the place of the head's own forward: a head that FSDP has in shards is
    whole there, and its gradient is reduced as that of any other module.
    """
    plain = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(
        self: Any, *args: Any, response_head: ResponseHead | None = None, response_length: int = 0, **inputs: Any
    ) -> Any:
        if response_head is None:
            return plain(*args, **inputs)
        hidden = self.base_model(*args, **{**inputs, "use_cache": False}).last_hidden_state
        head = self.get_output_embeddings()  # looked up at each call, since wrappers replace it

        def instead(rows: Tensor) -> Any:
            weight, bias = (None if x is None else x.to(rows.dtype) for x in (head.weight, head.bias))
            assert weight is not None
            return response_head(rows, weight, bias)

        before = vars(head).get("forward")  # of hooks of others
        head.forward = instead
        try:
            return head(hidden[:, -response_length - 1 : -1])
        finally:
            del head.forward
            if before is not None:
                head.forward = before

    model.forward = types.MethodType(forward, model)
