"""The cost of recording in a whole model: python -m benchmarks.whole_model

A forward of Qwen2.5-VL and of Qwen3-VL with the layer shapes of Qwen2.5-VL-7B (fewer layers, a small vocabulary, random
weights), 16 x 64 frame keys among 1,560 tokens: plain, with the frame mass of 3 layers recorded, and with eager
attention and `output_attentions`, from whose matrices the same mass is taken, as the released trainer does. Features of
the video come ready, as in training: the vision tower is in none of the times.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from appo.recording.arguments import response_rows
from appo.recording.recorder import record_frame_mass
from appo_kernels.testing import max_error
from benchmarks import harness

FRAMES, FRAME_KEYS, RESPONSE, LENGTH = 16, 64, 384, 1560
TAPPED, HEAD_DIM = 3, 128
VIDEO, START, END = 5, 3, 4  # token ids
RECORDED, PLAIN, EAGER = "ours: sdpa, mass recorded", "bound: sdpa, plain forward", "eager, output_attentions, mass"
FAMILIES = ("Qwen2.5-VL", "Qwen3-VL")
# Most CPUs have no fast products in bf16: these layers would take minutes.
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def build(family: str, options: argparse.Namespace) -> Any:
    """``options.layers`` layers of the real widths, and the smallest vision tower, which is not used. Qwen3-VL is given
    the heads of the other, so that both figures are of the same attention."""
    import transformers

    hidden = options.hidden
    heads, key_heads = hidden // HEAD_DIM, max(1, hidden // HEAD_DIM // 7)
    text = {
        "hidden_size": hidden, "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
    }
    ids = {"video_token_id": VIDEO, "image_token_id": 6, "vision_start_token_id": START, "vision_end_token_id": END}
    if family == "Qwen3-VL":
        rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
        text |= {"head_dim": HEAD_DIM, "rope_parameters": rope}
        vision |= {"deepstack_visual_indexes": [], "num_position_embeddings": 64}
        config, kind = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    else:
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
        vision |= {"fullatt_block_indexes": [0]}
        config, kind = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    built = config(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            return kind(built).eval()
    finally:
        torch.set_default_dtype(previous)


def inputs_of(model: Any, family: str, device: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the model's forward, and frame ids (1, S). Qwen3-VL has the time in text before each frame."""
    gap = 2 if family == "Qwen3-VL" else 0
    text = LENGTH - RESPONSE - FRAMES * FRAME_KEYS - FRAMES * gap
    ids, frames = [], []
    ids += [10] * (text // 2)
    frames += [-1] * (text // 2)
    # Qwen3-VL marks each frame, Qwen2.5-VL the whole video.
    for frame in range(FRAMES):
        if gap:
            ids += [10, START]
            frames += [-1, -1]
        elif frame == 0:
            ids[-1] = START
        ids += [VIDEO] * FRAME_KEYS
        frames += [frame] * FRAME_KEYS
    rest = LENGTH - len(ids)
    ids += [END] + [11] * (rest - 1)
    frames += [-1] * rest
    input_ids = torch.tensor([ids], device=device)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    width = model.config.get_text_config().hidden_size
    features = torch.randn(FRAMES * FRAME_KEYS, width, generator=generator).to(device, dtype) * 0.02
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    grid = torch.tensor([[FRAMES, 16, 16]], device=device)
    output = BaseModelOutputWithPooling(pooler_output=[features])
    if gap:
        output.deepstack_features = []
    arguments = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == VIDEO).int() * 2,
        "video_grid_thw": grid,
        "mm_encoder_outputs": {"video": output},
        "use_cache": False,
    }
    return arguments, torch.tensor([frames], dtype=torch.int32, device=device)


def case(family: str, options: argparse.Namespace) -> harness.Case:
    torch.manual_seed(0)
    model = build(family, options)
    arguments, frame_ids = inputs_of(model, family, options.device)
    rows = response_rows(LENGTH - RESPONSE, RESPONSE)
    in_frame = (frame_ids[..., None] == torch.arange(FRAMES, device=options.device)).float()

    def use(name: str) -> Callable[[], None]:
        return lambda: model.set_attn_implementation({"text_config": name})

    @torch.no_grad()
    def plain() -> Tensor:
        return model.base_model(**arguments).last_hidden_state

    @torch.no_grad()
    def recorded() -> Tensor:
        with record_frame_mass(model, frame_ids, rows=rows, layers=TAPPED, reduction="sum") as recorder:
            model.base_model(**arguments)
        return recorder.mass

    @torch.no_grad()
    def eager() -> Tensor:
        matrices = model.base_model(**arguments, output_attentions=True).attentions[-TAPPED:]
        return torch.stack([(m[:, :, rows].float() @ in_frame[:, None]).mean(1) for m in matrices]).mean(0)

    text = model.config.get_text_config()
    work = (
        f"{options.layers} layers, hidden {options.hidden:,}, intermediate {options.intermediate:,}, "
        f"{text.num_attention_heads}/{text.num_key_value_heads} heads, {LENGTH:,} tokens, "
        f"{FRAMES} x {FRAME_KEYS} frame keys, {RESPONSE} rows of {TAPPED} layers"
    )
    entries = [
        harness.Entry(RECORDED, "ours", recorded, use("sdpa")),
        harness.Entry(PLAIN, "bound", plain, use("sdpa")),
        harness.Entry(EAGER, "peer", eager, use("eager")),
    ]
    return harness.Case("recording", family, options.dtype, work, options.device, lambda: None, entries)


def check(results: dict[str, Any]) -> None:
    """The recorded mass is that of eager's matrices, which differ by what the layers below round."""
    got, expected = (results[name] for name in (RECORDED, EAGER))
    error, allowed = max_error(got, expected), 1e-5 if results[PLAIN].dtype == torch.float32 else 1e-2
    if not error <= allowed:
        raise AssertionError(f"recorded mass and eager's differ by {error:.1e}, allowed {allowed:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--family", choices=FAMILIES, help="only this one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=3584, help="a multiple of 7 x 128")
    parser.add_argument("--intermediate", type=int, default=18_944)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", help="of the result files; default: whole-model-<device>; '-': none")
    options = parser.parse_args()
    options.dtype = options.dtype or DTYPES[options.device]
    torch.set_num_threads(options.threads)
    rows = []
    for family in [options.family] if options.family else FAMILIES:
        one = case(family, options)
        found = harness.measure_large(one, check, rounds=options.rounds)
        print(f"\n{one.title}: {one.work}\n{harness.table(found)}", flush=True)
        rows += found
        del one
    if options.name != "-":
        name = options.name or f"whole-model-{options.device}"
        old = harness.resumed(name) or {"rows": []}
        print(f"\nwritten: {harness.save(name, harness.merged(old['rows'], rows), device=options.device)}")


if __name__ == "__main__":
    main()
