"""The Triton kernels in Triton's own interpreter, fp16 and fp32. Run by test_interpreter.py, with TRITON_INTERPRET=1.

The interpreter multiplies the raw bits of bf16 numbers in a matrix product, so bf16 is left to the compiled kernels.
"""

import attention_layouts as layouts
import backend_calls as calls
import block_mask_cases
import block_mask_reference
import guarded_memory
import pytest
import surrogate_cases
import torch
from triton.runtime import interpreter

import appo_kernels
from appo_kernels import testing
from appo_kernels.attention import triton_block_mask, triton_mass
from appo_kernels.attention.arguments import AttentionLayout
from appo_kernels.ops.frame_mass import streaming
from appo_kernels.ops.frame_mass import triton as frame_mass
from appo_kernels.ops.group_divergence import group_divergence
from appo_kernels.ops.group_divergence import triton as divergence_triton
from appo_kernels.ops.token_logprobs import token_logprobs
from appo_kernels.ops.weighted_surrogate import (
    linear_weighted_surrogate,
    logits_weighted_surrogate,
    weighted_surrogate,
)
from appo_kernels.ops.weighted_surrogate import reference as surrogate_reference
from appo_kernels.ops.weighted_surrogate import triton as surrogate_triton
from appo_kernels.vocabulary import triton_rows

SCALE = 0.21


@pytest.fixture(autouse=True)
def nothing_beyond_is_touched(monkeypatch):
    """Kernels run on copies of their tensors that end where a page begins that nobody may touch: a lane that reads or
    writes behind an array, whatever becomes of it, ends the process, as it may on a GPU."""
    run = interpreter.InterpretedFunction.run

    def on_copies(kernel, *arguments, **named):
        with guarded_memory.copies([*arguments, *named.values()]) as copy:
            return run(kernel, *map(copy, arguments), **{name: copy(value) for name, value in named.items()})

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", on_copies)


# Seven query heads to a key/value head, and a padded head size.
@pytest.mark.parametrize(
    ("dtype", "head_dim", "query_heads", "key_heads"), [(torch.float16, 64, 7, 1), (torch.float32, 40, 2, 1)]
)
def test_attention(dtype, head_dim, query_heads, key_heads):
    layout = layouts.hostile()
    inputs = calls.tensors(layout, query_heads, key_heads, head_dim, dtype)
    grads = calls.upstream(layout, inputs)
    options = {"scale": SCALE, "grads": grads, "weights": torch.rand(2, layout.num_frames)}
    expected = calls.expected_attention(layout, inputs, **options)
    results = [calls.attention(layout, inputs, backend, **options) for backend in ("triton", "torch")]
    calls.compare(results[0], expected, results[1])


def test_nothing_behind_a_head_is_read():
    """A padded head size, whole tiles, no bounds: NaN behind each row must not come in with the padding."""
    layout = layouts.everything_visible()
    inputs = calls.tensors(layout, 2, 1, 40, torch.float32)
    wide = [torch.full((*t.shape[:3], 48), float("nan")) for t in inputs]
    spaced = [w[..., :40].copy_(t) for w, t in zip(wide, inputs, strict=True)]
    grads = calls.upstream(layout, inputs)
    expected = calls.expected_attention(layout, inputs, scale=SCALE, grads=grads)
    results = [calls.attention(layout, spaced, backend, scale=SCALE, grads=grads) for backend in ("triton", "torch")]
    calls.compare(results[0], expected, results[1])


# The mass of each head, and its mean over heads, by one program or by one for each key/value head: ends of the kernel.
@pytest.mark.parametrize(("per_head", "split"), [(False, False), (False, True), (True, False)])
def test_frame_mass(per_head, split, monkeypatch):
    monkeypatch.setattr(triton_mass, "multiprocessors", lambda device: 1000 if split else 0)
    layout = layouts.hostile()
    query, key, value = calls.tensors(layout, 4, 2, 32, torch.float16)
    _, lse, _ = calls.attention(layout, (query, key, value), "torch", scale=SCALE)
    shape = (2, 4, layout.rows, 6) if per_head else (2, layout.rows, 6)
    operands = layout.operands(SCALE, torch.rand(2, 6))
    results = []
    for module, given in ((streaming, lse), (frame_mass, lse), (frame_mass, None)):
        mass, new_lse = torch.zeros(shape), torch.full_like(lse, float("nan")) if given is None else None
        mass_BHRF = mass if per_head else mass[:, None]
        module.forward(query, key, operands, given, mass_BHRF, new_lse, per_head)
        results.append(mass)
    for got in results[1:]:
        testing.assert_as_good_as(got, results[0].double(), results[0], atol=3e-6, name="mass")


# The last key that the second row sees: of the first tile, of others, one before the end; more tiles than a block has,
# and one tile more than that, which alone needs the mask.
@pytest.mark.parametrize(
    ("last", "first_keys", "second_keys"),
    [(63, 100, 100), (163, 100, 100), (198, 100, 100), (4159, 4160, 4160), (8254, 4160, 4096)],
)
def test_mass_where_rows_miss_the_end(last, first_keys, second_keys):
    """Whether a mask is needed is found from all tiles of a program's frames, here several or more than a block."""
    S = first_keys + second_keys
    ids = layouts.runs(S, (0, 0, first_keys), (1, first_keys, second_keys))[None]
    layout = layouts.LayoutCase(ids, 2, None, layouts.ints([S - 1, last]), None, 2)
    query, key, value = calls.tensors(layout, 1, 1, 32, torch.float16)
    _, lse, _ = calls.attention(layout, (query, key, value), "torch", scale=SCALE)
    results = []
    for module in (streaming, frame_mass):
        results.append(torch.zeros(1, 1, 2, 2))
        module.forward(query, key, layout.operands(SCALE), lse, results[-1], None, False)
    testing.assert_as_good_as(results[1], results[0].double(), results[0], atol=3e-6, name="mass")


def test_one_key_more_than_a_tile_of_small_frames():
    """Small frames share tiles: here one tile of theirs and a single key, which every pass must take too."""
    S, rows = 65, 3
    ids = (torch.arange(S, dtype=torch.int32) // 5)[None]
    layout = layouts.LayoutCase(ids, 13, None, layouts.ints(torch.full((rows,), S - 1)), None, rows)
    inputs = calls.tensors(layout, 2, 1, 32, torch.float32)
    grads = calls.upstream(layout, inputs)
    expected = calls.expected_attention(layout, inputs, scale=SCALE, grads=grads)
    results = [calls.attention(layout, inputs, backend, scale=SCALE, grads=grads) for backend in ("triton", "torch")]
    calls.compare(results[0], expected, results[1])
    mass = torch.zeros(1, 1, rows, 13)
    frame_mass.forward(*inputs[:2], layout.operands(SCALE), expected[1].float(), mass, None, False)
    testing.assert_as_good_as(mass[0], expected[2], results[1][2], atol=3e-6, name="mass")


def test_one_column_more_than_a_block():
    """A vocabulary that ends one column behind a block of the kernel that folds rows: the likeliest token."""
    V = triton_rows.FOLD_COLUMNS + 1
    hidden, weight = torch.randn(2, 8), torch.randn(V, 8)
    weight[-1] = 2 * hidden[0]
    results = [
        token_logprobs(hidden.to(dtype), weight.to(dtype), torch.tensor([V - 1, 0]), backend=backend)
        for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton"))
    ]
    for expected, framework, got in zip(*results, strict=True):
        testing.assert_as_good_as(got, expected, framework, factor=3.0, atol=3e-6)


def test_logits(monkeypatch):
    V = 321  # two programs of 128 columns and one of 65: a block of 64, and a single column
    hidden, weight, bias = torch.randn(6, 48), torch.randn(V, 48) / 3, torch.randn(V)
    targets = torch.randint(V, (6,))
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        values = token_logprobs(*leaves[:2], targets, bias=leaves[2], temperature=0.7, softcap=8.0, backend=backend)
        (values.logprobs.sum() + 2 * values.entropy.sum() - values.lse.sum()).backward()
        results.append([*values, *(leaf.grad for leaf in leaves)])
    for expected, framework, got in zip(*results, strict=True):
        testing.assert_as_good_as(got, expected, framework, factor=3.0, atol=3e-6)
    for name, columns in (("COLUMNS", 64), ("CHUNK", 128)):  # several programs for a slot, with several blocks each
        monkeypatch.setattr(divergence_triton, name, columns)
    lse = results[0][2].view(2, 3)
    slots = torch.tensor([[[0, 1, -1], [2, -1, 1]]])
    for kind in ("kl", "k3"):
        options = {"kind": kind, "bias": bias, "temperature": 0.7, "softcap": 8.0}
        expected = group_divergence(
            hidden.double().view(2, 3, 48),
            weight.double(),
            lse,
            slots,
            backend="torch",
            **options | {"bias": bias.double()},
        )
        got = group_divergence(hidden.view(2, 3, 48), weight, lse.float(), slots, backend="triton", **options)
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


# Token- and sequence-level; the gradient in a tensor of its own, and in the place of the logits.
@pytest.mark.parametrize(("level", "inplace"), [("token", False), ("sequence", True)])
def test_logits_weighted_surrogate(level, inplace):
    """Rows of a slice, one masked and full of NaN; the last one has the last target."""
    B, T, V = 2, 3, 70
    storage = torch.randn(B, T + 1, V)
    storage[1, 1] = float("nan")
    targets, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    targets[-1, -1], mask[1, 1] = V - 1, False
    old, advantages = torch.full((B, T), -4.0), torch.tensor([1.5, -0.5])
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")):
        logits = (storage.to(dtype).requires_grad_() * 1)[:, :T]
        logits.retain_grad()
        loss, metrics = logits_weighted_surrogate(
            logits, targets, old.to(dtype), advantages.to(dtype), mask, entropy_coef=0.1, temperature=0.8, level=level,
            inplace=inplace, backend=backend,
        )  # fmt: skip
        loss.backward()
        results.append((loss, torch.stack(list(metrics.values())), logits.grad))
    for expected, framework, got in zip(*results, strict=True):
        known = ~expected.isnan()
        testing.assert_as_good_as(got[known], expected[known], framework[known], factor=3.0, atol=3e-6)


def test_a_block_masked_by_the_smallest_number():
    """A mask of finfo.min, not -inf, over a whole block of columns: its sums overflow, and count for nothing."""
    logits = torch.randn(1, 1, triton_rows.FOLD_COLUMNS + 70)
    logits[..., :-70] = torch.finfo(torch.float32).min
    one, targets = torch.ones(1, 1), torch.tensor([[logits.shape[2] - 1]])
    results = [
        logits_weighted_surrogate(
            logits.to(dtype), targets, -one, one[0], one.bool(), entropy_coef=0.1, backend=backend
        )
        for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton"))
    ]
    torch.testing.assert_close(results[1].metrics["entropy"], results[0].metrics["entropy"])
    torch.testing.assert_close(results[1].loss.double(), results[0].loss)


# Both operators that have a product in their kernels.
@pytest.mark.parametrize("op", ["frame_mass", "frame_attention"])
def test_bf16_attention_is_refused(op):
    """The interpreter's tl.dot takes the bits of bf16 for integers: results would be off by powers of ten."""
    query, ids = torch.randn(1, 1, 4, 32, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.int64)
    value = {"value": query} if op == "frame_attention" else {}
    with pytest.raises(ValueError, match=rf"^{op}: `backend`: .*interpreter cannot multiply bf16"):
        getattr(appo_kernels, op)(query, query, frame_ids=ids, num_frames=1, backend="triton", **value)


# Every kind at every level that it has; the KL term, its ratio and two-sided clipping once for each.
KINDS = [
    (kind, level)
    for kind in ("clip", "cispo", "sapo", "dppo_tv", "gpg", "gspo_token")
    for level in (("token",) if kind == "dppo_tv" else ("token", "sequence"))
]
TERMS = [{}, {"beta": 0.1, "delta": 1.4}, {"beta": 0.1, "kl_ratio": True}]


@pytest.mark.parametrize("options", TERMS, ids=str)
@pytest.mark.parametrize(("kind", "level"), KINDS)
def test_weighted_surrogate(kind, level, options):
    """Responses of two parts of a program's tokens and one token more, which counts in the first; one of them masked
    entirely, garbage where masked."""
    case = surrogate_cases.per_token(B=3, T=2 * surrogate_triton.BLOCK + 1, dtype=torch.float32)
    case["mask"][0] = True
    kind_and_level = {"kind": kind, "level": level}

    def run(case, function=weighted_surrogate, **more):
        loss, metrics = function(**case, **kind_and_level, **options, **more)
        return loss, torch.stack(list(metrics.values())), torch.autograd.grad(loss, case["logprobs"])[0]

    expected = run(surrogate_cases.cast(case, torch.float64), surrogate_reference.weighted_surrogate)
    framework = run(case, surrogate_reference.weighted_surrogate)
    poisoned = surrogate_cases.poisoned(case)
    got = run(poisoned, backend="triton")
    assert not got[2][~case["mask"]].any()
    for name, a, b, c in zip(("loss", "metrics", "gradient"), got, expected, framework, strict=True):
        known = ~b.isnan()
        assert torch.equal(a.isnan(), b.isnan())
        testing.assert_as_good_as(a[known], b[known], c[known], factor=3.0, atol=3e-6, name=name)


def test_weighted_surrogate_of_nothing():
    """No token, no response, no valid token: the loss is exactly 0 and so are its sums."""
    for B, T in ((0, 4), (2, 0), (2, 5)):
        case = surrogate_cases.per_token(B=2, T=5, dtype=torch.float32)
        case = {n: x[:B, :T] if x.dim() == 2 else x[:B] for n, x in surrogate_cases.cast(case, torch.float32).items()}
        case["mask"] = torch.zeros(B, T, dtype=torch.bool)
        result = weighted_surrogate(**case, backend="triton")
        assert result.loss == 0 and result.metrics["clip_low"] == 0 and result.metrics["effective_tokens"] == 0
        assert result.metrics["ratio_max"] == 0 and result.metrics["entropy"].isnan()


def test_gradients_are_scaled_in_place():
    """By the gradient of the loss, again by another one, not at all by 1, in every dtype, ends of blocks included."""
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(4097, generator=torch.Generator().manual_seed(0)).to(dtype)
        gradient = values.clone()
        one, half = torch.tensor(1.0), torch.tensor(0.5)
        surrogate_triton.scale_([gradient], one)
        assert torch.equal(gradient, values)
        surrogate_triton.scale_([gradient], half)
        assert torch.equal(gradient, values * 0.5)
        spaced = torch.zeros(4, 6, dtype=dtype)[:, ::2]
        surrogate_triton.scale_([spaced.fill_(2)], half)
        assert (spaced == 1).all()


def test_a_second_backward_says_when_it_cannot_be():
    case = surrogate_cases.from_hidden(dtype=torch.float32)
    case.pop("bias")
    loss = linear_weighted_surrogate(**case, backend="triton").loss
    leaves = [case["hidden"], case["weight"]]
    once = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    thrice = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    torch.testing.assert_close(list(thrice), [3 * gradient for gradient in once])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


# Tiles smaller and larger than frames and than a block of the kernel's keys; one row to a tile and several.
@pytest.mark.parametrize(
    ("size", "tile_rows", "dtype"), [(3, 4, torch.int64), (8, 1, torch.int32), (128, 16, torch.int64)]
)
def test_block_mask(size, tile_rows, dtype):
    # The interpreter is slow: a fifth of the examples for each size of a tile, the long one for the largest.
    examples = block_mask_cases.examples()[size % 5 :: 5]
    for example in (*examples, *([block_mask_cases.long()] if size == 128 else ())):
        ids, given = example.frame_ids, example.given
        bounds = block_mask_reference.row_bounds(2, example.rows, example.keys, *given)
        plan = block_mask_reference.key_plan(ids, example.frames, bounds, size)
        mask = block_mask_reference.block_mask(plan, example.frames, bounds, example.rows, tile_rows, size)
        layout = AttentionLayout(ids.to(dtype), *(None if b is None else b.to(dtype) for b in given), None, 1.0)
        got_plan, got = triton_block_mask.block_mask(
            layout, 2, example.rows, example.keys, example.frames, size, tile_rows
        )
        assert (bounds is None) == (got_plan.bounds is None)
        assert bounds is None or torch.equal(got_plan.bounds, bounds)
        assert torch.equal(got_plan.frame_tiles, plan.frame_tiles) and torch.equal(got_plan.small, plan.small)
        exists = plan.tiles[..., 1] > 0
        assert torch.equal(got_plan.tiles[..., 1], plan.tiles[..., 1])
        assert torch.equal(got_plan.tiles[exists], plan.tiles[exists])
        assert torch.equal(got_plan.order, plan.order) and torch.equal(got_plan.frames, plan.frames)
        assert torch.equal(got.kinds, mask.kinds) and torch.equal(got.kv_num_blocks, mask.kv_num_blocks)
        blocks, expected = triton_block_mask.row_blocks(got.kinds), block_mask_reference.row_blocks(mask)
        assert torch.equal(blocks[1], expected[1])
        for places, counts, wanted in (
            (got.kv_indices, got.kv_num_blocks, mask.kv_indices), (*blocks, expected[0])
        ):  # fmt: skip
            known = torch.arange(places.shape[2]) < counts[..., -1:]  # what is behind is never read
            assert torch.equal(places[known], wanted[known])
