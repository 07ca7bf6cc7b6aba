"""Inputs and peers that the benchmarks of frame_mass and frame_attention share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.shapes import DEFAULT_ATTENTION, AttentionShape

# Entries that compute every row's attention are left out above this: minutes on a CPU.
CPU_MOST_FLOP = 700e9
# Attention matrices larger than this stay out: a CPU has other work, a GPU would measure its allocator.
MOST_MATRIX_BYTES = {"cpu": 5 << 29, "cuda": 16 << 30}


@dataclass
class Attention:
    """query (B, Hq, S, d), key and value (B, Hkv, S, d) of whole sequences, causal; the last R rows are responses."""

    shape: AttentionShape
    query: Tensor
    key: Tensor
    value: Tensor
    frame_ids: Tensor  # (B, S) int32
    last_key: Tensor  # (B, R) int32
    in_frame: Tensor  # (B, S, F) fp32, 1 where a key is of a frame

    @property
    def rows(self) -> Tensor:
        return self.query[:, :, -self.shape.rows :]

    @property
    def device(self) -> str:
        return self.query.device.type

    @property
    def whole(self) -> bool:
        """True if attention over all rows is affordable here."""
        return self.device == "cuda" or self.shape.attention_flop <= CPU_MOST_FLOP

    @property
    def row_matrix(self) -> bool:
        """True if (B, Hq, R, S) scores of the response rows fit, three times in fp32."""
        shape = self.shape
        return 12 * shape.batch * shape.heads * shape.rows * shape.keys <= MOST_MATRIX_BYTES[self.device]

    @property
    def matrix(self) -> bool:
        """True if the attention matrix, which eager attention keeps in fp32 and in its dtype, fits."""
        shape = self.shape
        return self.whole and 6 * shape.batch * shape.heads * shape.keys**2 <= MOST_MATRIX_BYTES[self.device]


def dtypes(shape: AttentionShape, device: str) -> tuple[torch.dtype, ...]:
    """A CPU takes half a minute for a product in bf16 that is not flash attention's: there bf16 is for one shape."""
    one = device == "cpu" and shape.name != DEFAULT_ATTENTION[0]
    return (torch.float32,) if one else (torch.float32, torch.bfloat16)


def attention_inputs(shape: AttentionShape, dtype: torch.dtype, device: str) -> Attention:
    generator = torch.Generator(device).manual_seed(0)  # on a GPU minutes of a host's time at the largest shape

    def random(heads: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.keys, shape.head_dim, generator=generator, device=device).to(dtype)

    query, key, value = random(shape.heads), random(shape.key_heads), random(shape.key_heads)
    frame_ids = torch.full((shape.batch, shape.keys), -1, dtype=torch.int32)
    start = shape.text // 2
    of_frames = torch.arange(shape.frames, dtype=torch.int32).repeat_interleave(shape.frame_keys)
    frame_ids[:, start : start + len(of_frames)] = of_frames
    last_key = torch.arange(shape.keys - shape.rows, shape.keys, dtype=torch.int32).expand(shape.batch, -1)
    in_frame = (frame_ids[..., None] == torch.arange(shape.frames)).float()
    return Attention(shape, query, key, value, *(t.to(device) for t in (frame_ids, last_key.contiguous(), in_frame)))


def repeated(work: Attention, tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(work.shape.heads // work.shape.key_heads, 1)


def flash(work: Attention) -> tuple[Tensor, Tensor]:
    """torch's flash attention, causal, every row: out (B, Hq, S, d) and lse (B, Hq, S)."""
    key, value = repeated(work, work.key), repeated(work, work.value)
    if work.device == "cuda" and work.query.dtype == torch.float32:  # flash attention there has no fp32
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            work.query, key, value, None, True, is_causal=True
        )
        return found[0], found[1][..., : work.shape.keys].float()
    if work.device == "cuda":
        found = torch.ops.aten._scaled_dot_product_flash_attention(work.query, key, value, is_causal=True)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(work.query, key, value, is_causal=True)
    return found[0], found[1].reshape(work.shape.batch, work.shape.heads, work.shape.keys).float()


def eager(work: Attention) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, with the mass of the response rows taken from its matrix."""
    key, value, shape = repeated(work, work.key), repeated(work, work.value), work.shape
    scores = work.query @ key.transpose(-1, -2) * shape.head_dim**-0.5
    scores = scores + torch.full((shape.keys, shape.keys), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    weights = scores.float().softmax(-1).to(work.query.dtype)
    return weights @ value, (weights[:, :, -shape.rows :].float() @ work.in_frame[:, None]).mean(1)


def naive_replay(work: Attention, lse: Tensor) -> Tensor:
    """The mass from a given lse, written down plainly: scores of the response rows with all keys, (B, Hq, R, S)."""
    shape = work.shape
    scores = (work.rows @ repeated(work, work.key).transpose(-1, -2)).float() * shape.head_dim**-0.5
    hidden = torch.arange(shape.keys, device=scores.device) > work.last_key[:, None, :, None]
    probabilities = (scores - lse[..., None]).exp_().masked_fill_(hidden, 0)
    return (probabilities @ work.in_frame[:, None]).mean(1)


def one_hot_values(work: Attention) -> Tensor:
    """The mass by attention itself: values that are one-hot in the frame. One more attention pass over the rows, in the
    dtype of the model."""
    shape = work.shape
    value = work.in_frame[:, None].to(work.query.dtype).expand(-1, shape.heads, -1, -1)
    visible = torch.arange(shape.keys, device=work.key.device) <= work.last_key[:, None, :, None]
    return scaled_dot_product_attention(work.rows, repeated(work, work.key), value, attn_mask=visible).float().mean(1)


def flex(work: Attention) -> tuple[Any, str]:
    """FlexAttention with one-hot values, compiled: a function without arguments, or None and why it does not run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, first = work.shape, work.shape.keys - work.shape.rows
    value = work.in_frame[:, None].to(work.query.dtype).expand(-1, shape.key_heads, -1, -1).contiguous()
    rows = work.rows.contiguous()

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q + first

    try:
        torch._dynamo.reset()  # beyond eight shapes of one function it would run uncompiled
        mask = create_block_mask(
            causal, None, None, shape.rows, shape.keys, device=work.device, _compile=work.device == "cuda"
        )
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            return compiled(rows, work.key, value, block_mask=mask, enable_gqa=True).float().mean(1)

        run()
    except Exception as error:  # whatever the compiler or the kernel refuses, the table says so
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    return run, ""


def matrix_product(work: Attention) -> Any:
    """The lower bound of a replay: response rows with the keys of frames, into a buffer that is there already."""
    shape, count = work.shape, work.shape.frames * work.shape.frame_keys
    start = shape.text // 2
    if work.device == "cuda":
        rows, key = work.rows.contiguous(), repeated(work, work.key)[:, :, start : start + count].transpose(-1, -2)
        buffer = torch.empty(shape.batch, shape.heads, shape.rows, count, device="cuda", dtype=rows.dtype)
        return lambda: torch.matmul(rows, key, out=buffer)
    # One head at a time and in fp32: the fastest on a CPU, whose products in bf16 are slower.
    rows = work.rows.float().contiguous()
    columns = work.key[:, :, start : start + count].float()
    pieces = 8192  # keys at a time, so that the product stays within the cache as any implementation would have it
    buffer = torch.empty(shape.rows, min(count, pieces))

    def run() -> None:
        for b in range(shape.batch):
            for h in range(shape.heads):
                keys = columns[b, h * shape.key_heads // shape.heads]
                for part in keys.split(pieces):
                    torch.mm(rows[b, h], part.t(), out=buffer[:, : len(part)])

    return run
