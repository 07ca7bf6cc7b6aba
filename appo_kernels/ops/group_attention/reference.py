"""The definition of group_attention: dense, in the dtype of its inputs, differentiated by autograd."""

import torch
from torch import Tensor

from appo_kernels.attention.group_layout import GroupLayout
from appo_kernels.attention.reference import attention_matrix


def visible(layout: GroupLayout) -> Tensor:
    """(T, T) bool: whether the token of a row sees that of a column."""
    table = layout.lengths
    group = torch.arange(len(table)).repeat_interleave(table.sum(1))
    member = torch.arange(table.shape[1]).repeat(len(table)).repeat_interleave(table.flatten())  # 0: prompt
    place = torch.arange(layout.tokens)
    seen = (group[:, None] == group) & (place <= place[:, None])
    return seen & ((member == 0) | (member[:, None] == member))


def group_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """See ``appo_kernels.group_attention``."""
    seen = visible(layout).to(query.device)[None, None]
    probabilities, lse = attention_matrix(query, key, seen, scale)
    return probabilities @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1), lse
