"""Keys and values of prompts, each kept once however many responses are sampled behind it.

While a token is sampled, every response has one query row. Those of a group read their prompt's keys together, as one
matrix product instead of a product for each, and each reads the keys of its own response; the two parts are merged by
their log-sum-exp. What transformers' cache holds is then the responses alone.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appo_kernels import merge_attention


class PromptCache:
    """Of each layer and prompt, key and value (1, Hkv, P, d); ``counts``: how many responses follow each prompt."""

    def __init__(self, layers: Sequence[Sequence[tuple[Tensor, Tensor]]], counts: Sequence[int]) -> None:
        self.layers = layers
        self.counts = list(counts)

    @classmethod
    def of_prefill(cls, cache: Any, lengths: Sequence[int], counts: Sequence[int], dtype: torch.dtype) -> "PromptCache":
        """From transformers' cache after a forward of prompts of ``lengths`` that were padded on the left.

        dtype: that attention computes in. Keys in another one are copied, others stay where they are.
        """
        if not cache.layers[0].keys.is_cuda:  # where products of halves have no fp32 results
            dtype = torch.promote_types(dtype, torch.float32)
        layers = []
        for layer in cache.layers:
            both = [x.to(dtype) for x in (layer.keys, layer.values)]
            rows = zip(*both, lengths, strict=True)
            layers.append([(key[None, :, -length:], value[None, :, -length:]) for key, value, length in rows])
        return cls(layers, counts)

    @property
    def tokens(self) -> int:
        return sum(key.shape[2] for key, _ in self.layers[0])

    def keep(self, rows: Sequence[int]) -> None:
        """Leave only these responses, ascending; prompts stay."""
        ends = list(itertools.accumulate(self.counts))
        kept = [sum(end - count <= row < end for row in rows) for end, count in zip(ends, self.counts, strict=True)]
        self.counts = kept

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the last token of each response on its prompt and on its own t tokens, query among them.

        query (B, Hq, 1, d), key and value (B, Hkv, t, d) -> (B, Hq, 1, d).
        """
        with torch.autocast(query.device.type, enabled=False):  # or it would narrow the products again
            return self._attend(layer, query, key, value, scale)

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the newest tokens on prompt and responses, merged by log-sum-exp."""
        dtype = self.layers[layer][0][0].dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        own = _attend(query, key, value, scale)
        rows = query.transpose(0, 2).split(self.counts, dim=2)  # of each prompt (1, Hq, its responses, d)
        found = [
            _attend(some, *prompt, scale) for some, prompt in zip(rows, self.layers[layer], strict=True) if some.numel()
        ]
        out, lse = torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)
        return merge_attention([own, (out.transpose(0, 2), lse.transpose(0, 2))]).out


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query (B, Hq, n, d) on all of key and value (B, Hkv, S, d) -> out in fp32 or wider, lse (B, Hq, n).

    By plain products: the rows are few.
    """
    (B, Hq, n, d), Hkv = query.shape, key.shape[1]
    # All rows of the query heads of a key head in one product
    rows = query.reshape(B * Hkv, Hq // Hkv * n, d)
    scores = _product(rows, key.flatten(0, 1).mT).mul_(scale)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = scores.sub_(lse).exp_().to(rows.dtype)
    out = _product(weights, value.flatten(0, 1))
    return out.view(B, Hq, n, d), lse.view(B, Hq, n)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of a batch in fp32 or wider."""
    return torch.bmm(a, b) if a.dtype.itemsize >= 4 else torch.bmm(a, b, out_dtype=torch.float32)
