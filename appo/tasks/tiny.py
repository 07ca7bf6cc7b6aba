"""A tiny vision-language model and its processor, built from nothing: what the demo trains and tests run on.

Everything is a class of transformers, so that the code that serves Qwen2.5-VL-7B serves this model too; only
the sizes and the tokenizer, one token per word, are our own. Random weights: ``appo.tasks.warmup`` teaches it to
answer.
"""

import string
from typing import Any, NoReturn

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from appo.tasks.questions import DIRECTIONS, NUMBERS
from appo.tasks.render import COLOURS, SHAPES

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (
    PAD,
    START,
    END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<time>", "</time>")
# The place of a word is its id, and the number of words decides what a seed draws: to keep models as they are, a new
# word takes the place of one that no text uses.
TASKS = ("colour", "order", "count", "direction", "blink")
WORDS = [
    "a", "all", "and", "answer", "are", "assistant", "at", "between", "blink", "both", "bright",
    "by", "change", "choose", "clip", "colour", "comes", "count", "dark", "data", "do", "each",
    "finally", "first", "flash", "flashes", "for", "format", "four", "from", "give", "has", "how",
    "i", "in", "inside", "is", "it", "its", "jump", "last", "letter", "look", "many", "me",
    "moment", "more", "no", "nothing", "object", "objects", "of", "on", "one", "only", "option",
    "options", "or", "order", "question", "reason", "same", "second", "seconds", "see", "seen",
    "shape", "shapes", "short", "show", "shows", "so", "step", "system", "tags", "than", "that",
    "the", "then", "there", "these", "they", "think", "this", "thought", "time", "to", "cue",
    "two", "user", "video", "was", "watch", "way", "were", "what", "when", "where", "which",
    "while", "white", "who", "why", "with", "within", "you", "your", "black", "grey",
]  # fmt: skip

# A piece is a tag, word, digit, line break or punctuation mark. Spaces go; the decoder puts one before each word.
PIECES = r"</?[a-z]+>|[A-Za-z]+|\d|\n|[^\sA-Za-z\d]"
STARTS_WORD = r"^(?=[a-z]|[A-Z][a-z])"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# 0.02, made for large models, leaves the signals of narrow layers so small that learning starts late.
INITIALIZER_RANGE = 0.05
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": INITIALIZER_RANGE,
}
VISION = {
    "initializer_range": INITIALIZER_RANGE,
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; words it does not have become ``<unk>``. Pads on the left.

    Tags are ordinary tokens, so that decoding with ``skip_special_tokens`` keeps them:
    ``<think> at step two i see red so the colour is red</think><answer>A</answer>`` comes back as it is.
    """
    words = [*TASKS, *COLOURS, *NUMBERS, *DIRECTIONS, *SHAPES, *WORDS]
    pieces = ["<unk>", "\n", *TAGS, *string.ascii_uppercase, *string.digits, *".,:;?!()<>-'\"", *words]
    pieces += [word.capitalize() for word in words if len(word) > 1]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    inner.decoder = decoders.Sequence([decoders.Replace(Regex(STARTS_WORD), " "), decoders.Fuse()])
    inner.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny(seed: int = 0, *, family: str = "qwen2_5_vl", **text_options: Any) -> tuple[Any, Any]:
    """(model, processor) with random fp32 weights that depend on the seed alone.

    family: "qwen2_5_vl", about 1.1 M parameters, patches of 7 pixels merged 2 x 2, so that a frame of 28 x 28
    pixels is 4 tokens and 16 frames are 8 temporal grid steps; or "qwen3_vl", the same sizes with patches of
    8 pixels and timestamps in the prompt. text_options: settings of the text model to change, such as
    ``num_key_value_heads=1``.

    Both are saved with ``save_pretrained`` and loaded by AutoModelForImageTextToText and AutoProcessor like
    any other.
    """
    if family not in FAMILIES:
        _unknown(family)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = FAMILIES[family](tokenizer, text_options)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast, text_options: dict[str, Any]) -> tuple[Any, Any]:
    patch = 7
    text = text_settings(tokenizer, {"rope_type": "default", "mrope_section": [4, 6, 6]}, text_options)
    config = Qwen2_5_VLConfig(
        text_config=text,
        # At 2 samples a grid step and 4 a second, 2 tokens a second make neighbouring grid steps neighbouring
        # positions.
        vision_config={
            **VISION,
            **patches(patch),
            "out_hidden_size": text["hidden_size"],
            "window_size": 28,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        **special_ids(tokenizer),
    )
    size = pixels(patch)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=patch, size=size, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen2_5_VLForConditionalGeneration(config).float(), processor


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast, text_options: dict[str, Any]) -> tuple[Any, Any]:
    patch = 8
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = text_settings(tokenizer, rope, text_options)
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": 32},
        vision_config={
            **VISION,
            **patches(patch),
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **special_ids(tokenizer),
    )
    size = pixels(patch)
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            patch_size=patch, size={**size, "longest_edge": 64 * size["longest_edge"]}, cap_pixels_per_frame=True
        ),
        chat_template=CHAT_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config).float(), processor


FAMILIES = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}


def text_settings(tokenizer: PreTrainedTokenizerFast, rope: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Of the text model; ``options`` replace the demo's."""
    return {
        **TEXT,
        "vocab_size": len(tokenizer),
        "rope_parameters": {**rope, "rope_theta": 10_000.0},
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }


def patches(patch: int) -> dict[str, Any]:
    """Of the vision tower: patches of ``patch`` pixels, merged 2 x 2, two samples a grid step."""
    return {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}


def pixels(patch: int) -> dict[str, Any]:
    """Frames of one token to 64: a clip of 28 x 28 pixels is taken as it comes."""
    return {"shortest_edge": (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Ids of the tokens around and in place of media, as a config names them."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names, strict=True)}


def _unknown(family: str) -> NoReturn:
    raise ValueError(
        f"build_tiny: `family`: expected one of {tuple(FAMILIES)}, got {family!r}. The demo uses the first."
    )
