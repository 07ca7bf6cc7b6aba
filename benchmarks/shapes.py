"""The shapes that benchmarks run at, each with the reason why, and the rule that makes them fit a CPU.

Heads, hidden sizes and vocabularies are those of published models (`appo.architectures`); videos are given as frames x
keys of a frame:

    16 x 64     the released trainer's setting: 16 frames of 224 x 224 pixels (docs/training.md), 384 response tokens
    64 x 64     four times the frames: what an hour's lecture is sampled to
    768 x 256   Qwen2.5-VL's own limit of 768 frames at 448 x 448 pixels, 2,048 response tokens: long videos

On a GPU the shapes are taken as they are. On a CPU, which has a thousandth of the rate, `on_cpu` cuts what only repeats
work and keeps what decides how an operator behaves: head size, group of query heads per key head, frames, keys and
vocabulary stay; sequences, heads, rows and the hidden size (to 512) are halved, and tokens and slots cut, until one
matrix product over the shape takes at most `CPU_FLOP`. Attention in bf16, which few CPUs are made for, runs at the
first shape only.
"""

from dataclasses import dataclass, replace

from appo.models.architectures import ARCHITECTURES

CPU_FLOP = 80e9  # one to two seconds on two cores


@dataclass(frozen=True)
class AttentionShape:
    """B sequences of `text` prompt tokens, F x frame_keys frame tokens, and R response tokens."""

    name: str
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    frames: int
    frame_keys: int
    rows: int
    text: int = 152

    @property
    def keys(self) -> int:
        return self.text + self.frames * self.frame_keys + self.rows

    @property
    def replay_flop(self) -> float:
        """Of the product of the response rows with the keys of frames."""
        return 2.0 * self.batch * self.heads * self.rows * self.frames * self.frame_keys * self.head_dim

    @property
    def attention_flop(self) -> float:
        """Of both products of full attention, every row with every key."""
        return 4.0 * self.batch * self.heads * self.keys**2 * self.head_dim

    def on_cpu(self) -> "AttentionShape":
        shape, group = self, self.heads // self.key_heads
        while shape.replay_flop > CPU_FLOP:
            if shape.batch > 1:
                shape = replace(shape, batch=shape.batch // 2)
            elif shape.key_heads > 1:
                shape = replace(shape, key_heads=shape.key_heads // 2, heads=group * (shape.key_heads // 2))
            else:
                shape = replace(shape, rows=shape.rows // 2)
        return shape

    def describe(self) -> str:
        return (
            f"B {self.batch}, heads {self.heads}/{self.key_heads}, d {self.head_dim}, "
            f"{self.frames} x {self.frame_keys} of {self.keys:,} keys, {self.rows} rows"
        )


@dataclass(frozen=True)
class GroupShape:
    """A prompt of P tokens and G responses of N tokens; heads of one key head group of Qwen2.5-VL-7B."""

    name: str
    prompt: int
    responses: int
    length: int
    heads: int = 7
    key_heads: int = 1
    head_dim: int = 128

    def on_cpu(self) -> "GroupShape":
        return self

    def describe(self) -> str:
        heads = f"{self.heads}/{self.key_heads}"
        return f"P {self.prompt:,}, G {self.responses}, N {self.length}, heads {heads}, d {self.head_dim}"


@dataclass(frozen=True)
class VocabularyShape:
    """G responses of N tokens, hidden size D, vocabulary V; K target frames with J slots each."""

    name: str
    responses: int
    tokens: int
    hidden: int
    vocabulary: int
    frames: int = 4
    slots: int = 64

    @property
    def total(self) -> int:
        return self.responses * self.tokens

    @property
    def flop(self) -> float:
        """Of one product of all tokens with the head."""
        return 2.0 * self.total * self.hidden * self.vocabulary

    def on_cpu(self) -> "VocabularyShape":
        shape = self
        while shape.hidden > 512 and shape.flop > CPU_FLOP:
            shape = replace(shape, hidden=max(512, shape.hidden // 2))
        if shape.flop > CPU_FLOP:
            tokens = int(shape.tokens * CPU_FLOP / shape.flop) // 16 * 16
            shape = replace(shape, tokens=tokens, slots=min(shape.slots, tokens // 4))
        return shape

    def describe(self) -> str:
        return (
            f"G {self.responses}, N {self.tokens}, D {self.hidden}, V {self.vocabulary:,}, "
            f"K {self.frames}, J {self.slots}"
        )


VIDEOS = {"16x64": (16, 64, 384), "64x64": (64, 64, 384), "768x256": (768, 256, 2048)}
MODELS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-72B", "Qwen3-VL-8B")


def attention_shapes() -> dict[str, AttentionShape]:
    """By name, such as Qwen2.5-VL-7B/16x64. Two sequences: enough to see that nothing is shared between them."""
    shapes = {}
    for model in MODELS:
        sizes = ARCHITECTURES[model]
        for video, (frames, frame_keys, rows) in VIDEOS.items():
            name = f"{model}/{video}"
            heads = (sizes.heads, sizes.key_heads, sizes.head_dim)
            shapes[name] = AttentionShape(name, 2, *heads, frames, frame_keys, rows)
    return shapes


def group_shapes() -> dict[str, GroupShape]:
    """The released trainer's setting, a shorter response, and a video four times as long."""
    sizes = {"16x64": (1150, 8, 384), "16x64, short": (1150, 8, 250), "64x64": (4096, 8, 256)}
    return {name: GroupShape(name, *size) for name, size in sizes.items()}


def vocabulary_shapes() -> dict[str, VocabularyShape]:
    """By name of the model; G = 8 responses of N = 384 tokens (docs/training.md)."""
    return {
        model: VocabularyShape(model, 8, 384, ARCHITECTURES[model].hidden, ARCHITECTURES[model].vocabulary)
        for model in MODELS
    }


# What runs when no shape is named: the model of the paper's main table at its own setting, its smallest and its largest
# relative, the other family; and the two longer videos at the model of the main table.
DEFAULT_ATTENTION = (
    "Qwen2.5-VL-7B/16x64",
    "Qwen2.5-VL-3B/16x64",
    "Qwen2.5-VL-72B/16x64",
    "Qwen3-VL-8B/16x64",
    "Qwen2.5-VL-7B/64x64",
    "Qwen2.5-VL-7B/768x256",
)
DEFAULT_VOCABULARY = ("Qwen2.5-VL-7B",)
DEFAULT_GROUPS = ("16x64", "64x64")
