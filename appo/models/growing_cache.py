"""transformers' cache of keys and values with room for tokens to come: a token is written, nothing is copied for it.

`DynamicCache` makes a new tensor of all keys for each token, which reads and writes them once more than attention does.
`StaticCache` has the room of the longest response from the first token on, and attention over all of it; its fixed
shapes are for compiled forwards of as many rows, and rows leave here. docs/engines.md has the times of each.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

STEP = 128  # tokens of room that are made at a time: all keys are copied once for as many tokens


class GrowingLayer(DynamicLayer):
    """Keys and values (B, Hkv, t, d) of one layer, views of tensors with room for ``longest`` tokens at most."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.rooms: list[Tensor | None] = [None, None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the newest tokens' and return all of them; tensors that were returned before keep their values."""
        if not self.get_seq_length():  # a prompt's stay as the model made them
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            assert self.keys is not None and self.values is not None
            self.keys = self._appended(0, self.keys, key_states)
            self.values = self._appended(1, self.values, value_states)
        return self.keys, self.values

    def _appended(self, which: int, held: Tensor, new: Tensor) -> Tensor:
        room, length = self.rooms[which], held.shape[2] + new.shape[2]
        # Rows that left or were repeated are in tensors of their own.
        if (
            room is None
            or room.data_ptr() != held.data_ptr()
            or room.shape[0] != held.shape[0]
            or length > room.shape[2]
        ):
            B, heads, _, width = held.shape
            room = held.new_empty(B, heads, max(length, min(held.shape[2] + STEP, self.longest)), width)
            room[:, :, : held.shape[2]] = held
            self.rooms[which] = room
        room[:, :, held.shape[2] : length] = new
        return room[:, :, :length]


def growing_cache(config: Any, longest: int) -> DynamicCache:
    """A cache for a model of ``config`` and at most ``longest`` tokens a row; layers of other kinds (windows, linear
    attention) are transformers' own."""
    cache = DynamicCache(config=config.get_text_config())
    cache.layers = [GrowingLayer(longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
