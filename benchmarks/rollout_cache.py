"""Keys of responses while they are sampled: one token more, in three caches: python -m benchmarks.rollout_cache

Update and attention of every layer, for rows behind prompts that are kept once (`appo.models.prompt_cache`), without
the rest of the model: transformers' `DynamicCache` (a new tensor of all keys for each token), its `StaticCache` (room
for the longest response from the start; attention over all of it, whose mask is left out here, or over the tokens that
are there), and ours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, StaticCache

from appo.models.growing_cache import growing_cache
from appo.models.prompt_cache import PromptCache

DYNAMIC, STATIC_ALL, STATIC, OURS = "DynamicCache", "StaticCache, attention over all", "StaticCache, over t", "ours"


def caches(config: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    return {
        DYNAMIC: lambda: DynamicCache(config=config),
        STATIC_ALL: lambda: StaticCache(config=config, max_cache_len=tokens),
        STATIC: lambda: StaticCache(config=config, max_cache_len=tokens),
        OURS: lambda: growing_cache(config, tokens),
    }


def sample(kind: str, cache: Any, prompts: PromptCache, step: list[Tensor], layers: int, tokens: int) -> Tensor:
    """The attention of each layer for one token after another; the sum of all, to compare the caches by."""
    query, key, value = step
    found = torch.zeros(())
    for t in range(tokens):
        for layer in range(layers):
            keys, values = cache.update(key + t, value + t, layer)
            if kind == STATIC:
                keys, values = keys[:, :, : t + 1], values[:, :, : t + 1]
            found = found + prompts.attend(layer, query, keys, values, 0.1).sum()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="responses, 8 behind each prompt")
    parser.add_argument("--tokens", type=int, default=384, help="of each response")
    parser.add_argument("--prompt", type=int, default=1150, help="tokens of a prompt")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    heads, key_heads, width = 28, 4, 128  # of Qwen2.5-VL-7B
    config = Qwen2Config(
        num_hidden_layers=given.layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        hidden_size=heads * width,
    )  # fmt: skip
    torch.manual_seed(0)
    groups = given.rows // 8
    keys = [[(torch.randn(1, key_heads, given.prompt, width),) * 2 for _ in range(groups)] for _ in range(given.layers)]
    prompts = PromptCache(keys, [8] * groups)
    step = [torch.randn(given.rows, n, 1, width) for n in (heads, key_heads, key_heads)]
    times: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        sums = {}
        for kind, make in caches(config, given.tokens).items():
            start = time.process_time()
            sums[kind] = sample(kind, make(), prompts, step, given.layers, given.tokens)
            times.setdefault(kind, []).append(1e3 * (time.process_time() - start) / given.tokens / given.layers)
        for kind in (STATIC, OURS):
            torch.testing.assert_close(sums[kind], sums[DYNAMIC])
    print(
        f"{given.rows} rows of {given.tokens} tokens behind prompts of {given.prompt}, {given.layers} layers, fp32, CPU"
    )
    print("| cache | CPU ms a token and layer | of DynamicCache |\n|---|---|---|")
    for kind, found in times.items():
        median = statistics.median(found)
        print(f"| {kind} | {median:.2f} | {median / statistics.median(times[DYNAMIC]):.2f} |")


if __name__ == "__main__":
    main()
