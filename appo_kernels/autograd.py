"""Code that the autograd functions of all operators share."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a ``backward``: it raises when called to be differentiated itself (create_graph=True).

    torch's own ``once_differentiable`` raises only where the incoming gradient requires one: the gradient penalty of a
    plain loss would be silently constant.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Any) -> Any:
            # torch.compile refuses second derivatives itself, and traces a backward with gradients enabled.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{op}: `create_graph`: expected False, got True: the operator has no second derivatives. "
                    "Take a gradient penalty of another function, or of this one's definition in torch operations."
                )
            return backward(ctx, *gradients)

        return once

    return decorate
