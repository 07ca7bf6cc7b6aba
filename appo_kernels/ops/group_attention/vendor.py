"""The vendor's flash attention that group_attention's backend "torch" is made of: a table, which doctor prints.

A module of the table has

    unsupported(problem)                                   why it cannot serve a call; None when it can
    prepared(*tensors)                                     inputs in the dtype that its calls compute in
    causal(query, key, value, pieces, scale)               each piece of the row on itself -> out, lse
    causal_backward(grad, query, key, value, out, lse, pieces, scale, totals)   writes the three gradients to totals
    full(query, key, value, scale)                         every query on every key -> out, lse
    full_backward(grad, query, key, value, out, lse, scale, totals)             adds the three gradients to totals
    COLUMNS                                                by how many columns a head size may grow

with tensors (1, H, rows, d), Hq a multiple of Hkv, lse (1, Hq, rows) fp32, and pieces that lie one behind the other and
cover the row. The out and lse that a backward gets may be those of more keys than its own.

Not in the table: cuDNN's attention, which has no group of query heads per key head where sequences lie in one row, and
the flash-attn package, which nobody has compared with torch's own here.
"""

from types import ModuleType

import torch

from appo_kernels import dispatch
from appo_kernels.ops.group_attention import flash_cpu, flash_cuda

# device type: (what it is called, module)
TABLE: dict[str, tuple[str, ModuleType]] = {
    "cpu": ("torch's flash attention for CPU", flash_cpu),
    "cuda": ("torch's flash attention, with cumulative lengths", flash_cuda),
}


def unsupported(problem: dispatch.Problem) -> str | None:
    if problem.device.type not in TABLE:
        return f"no flash attention with a log-sum-exp is known on {problem.device.type}, but on {', '.join(TABLE)}"
    return TABLE[problem.device.type][1].unsupported(problem)


def flash(device: torch.device) -> ModuleType:
    return TABLE[device.type][1]


def describe(device: torch.device) -> str:
    return TABLE[device.type][0] if device.type in TABLE else "none"
