"""Sizes of vision-language models: what `appo plan` and the benchmarks need to know of a model without loading it."""

from dataclasses import dataclass, replace
from typing import Any

from appo.constraints import check_fields, setting


@dataclass(frozen=True)
class Vision:
    """A vision tower of the Qwen family. window: side in merged patches that a windowed layer sees, 0: all of them."""

    depth: int = setting(at_least=1)
    hidden: int = setting(at_least=1)
    intermediate: int = setting(at_least=1)
    heads: int = setting(at_least=1)
    out_hidden: int = setting(at_least=0)
    patch: int = setting(14, at_least=1)  # pixels
    temporal_patch: int = setting(2, at_least=1)  # video frames of one grid step
    merge: int = setting(2, at_least=1)  # patches of a side that become one token
    gated: bool = setting(True)  # three matrices in the feed-forward layer, or two
    full_attention: int = setting(4, at_least=0)  # layers without a window
    window: int = setting(4, at_least=0)
    deepstack: int = setting(0, at_least=0)  # further mergers, of hidden states half-way
    positions: int = setting(0, at_least=0)  # learned position embeddings

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def parameters(self) -> int:
        h, i = self.hidden, self.intermediate
        attention = 4 * h * h + 4 * h
        feed_forward = 3 * h * i + 2 * i + h if self.gated else 2 * h * i + i + h
        norms = 2 * h if self.gated else 4 * h  # RMS norms have no bias
        patches = 3 * self.temporal_patch * self.patch**2 * h + (0 if self.gated else h)
        return (
            patches + self.positions * h + self.depth * (attention + feed_forward + norms) + self._mergers(norms // 2)
        )

    def _mergers(self, norm: int) -> int:
        wide = self.hidden * self.merge**2
        layers = wide * wide + wide + wide * self.out_hidden + self.out_hidden
        return layers + norm + self.deepstack * (layers + norm // self.hidden * wide)


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Qwen family with its vision tower; sizes in numbers, not bytes."""

    name: str
    layers: int = setting(at_least=1)
    hidden: int = setting(at_least=1)
    intermediate: int = setting(at_least=1)
    heads: int = setting(at_least=1)
    key_heads: int = setting(at_least=1)
    head_dim: int = setting(at_least=1)
    vocabulary: int = setting(at_least=1)
    tied: bool = setting()  # the output head is the input embedding
    vision: Vision = setting()
    query_bias: bool = setting(True)  # biases of query, key and value (Qwen2.5)
    query_norm: bool = setting(False)  # norms of query and key (Qwen3)
    frame_text: int = setting(0, at_least=0)  # text tokens before each frame: Qwen3-VL writes its time
    frame_tokens: int = setting(0, at_least=0)  # of each frame, whatever its pixels; 0: as these say

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        q, kv, h = self.query_width, self.key_width, self.hidden
        attention = 2 * h * q + 2 * h * kv + (q + 2 * kv if self.query_bias else 0)
        return attention + (2 * self.head_dim if self.query_norm else 0) + 3 * h * self.intermediate + 2 * h

    @property
    def head_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def text_parameters(self) -> int:
        tables = self.head_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + self.hidden + tables

    @property
    def parameters(self) -> int:
        return self.text_parameters + self.vision.parameters


_QWEN2_5_TOWER = Vision(depth=32, hidden=1280, intermediate=3420, heads=16, out_hidden=0)
_QWEN3_TOWER = Vision(
    depth=27, hidden=1152, intermediate=4304, heads=16, out_hidden=0, patch=16, gated=False, full_attention=27,
    window=0, deepstack=3, positions=2304,
)  # fmt: skip


def _qwen2_5(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, key_heads: int, **other: Any
) -> Architecture:
    tower = replace(_QWEN2_5_TOWER, out_hidden=hidden, intermediate=other.pop("tower_intermediate", 3420))
    sizes = {"head_dim": 128, "vocabulary": 152_064, "tied": False} | other
    return Architecture(name, layers, hidden, intermediate, heads, key_heads, vision=tower, **sizes)


def _qwen3(name: str, layers: int, hidden: int, intermediate: int, heads: int, **other: Any) -> Architecture:
    tower = replace(_QWEN3_TOWER, out_hidden=hidden, **other.pop("tower", {}))
    sizes = {"head_dim": 128, "vocabulary": 151_936, "tied": False, "query_bias": False, "query_norm": True} | other
    return Architecture(name, layers, hidden, intermediate, heads, 8, vision=tower, frame_text=8, **sizes)


_SMALL_TOWER = {"depth": 24, "hidden": 1024, "intermediate": 4096, "full_attention": 24}

# From the config.json files of the published models.
ARCHITECTURES = {
    model.name: model
    for model in (
        _qwen2_5("Qwen2.5-VL-3B", 36, 2048, 11_008, 16, 2, vocabulary=151_936, tied=True),
        _qwen2_5("Qwen2.5-VL-7B", 28, 3584, 18_944, 28, 4),
        _qwen2_5("Qwen2.5-VL-32B", 64, 5120, 27_648, 40, 8, tower_intermediate=3456),
        _qwen2_5("Qwen2.5-VL-72B", 80, 8192, 29_568, 64, 8, tower_intermediate=3456),
        _qwen3("Qwen3-VL-2B", 28, 2048, 6144, 16, tied=True, tower=_SMALL_TOWER),
        _qwen3("Qwen3-VL-4B", 36, 2560, 9728, 32, tied=True, tower=_SMALL_TOWER),
        _qwen3("Qwen3-VL-8B", 36, 4096, 12_288, 32),
        _qwen3("Qwen3-VL-32B", 64, 5120, 25_600, 64),
    )
}
