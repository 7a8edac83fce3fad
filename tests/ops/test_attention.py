"""Attention against fp64: layouts, masks, lengths, norms, rotation; and as a torch op."""

from itertools import pairwise

import pytest
import torch
from ops_helpers import (
    assert_as_exact_as,
    assert_autocast,
    assert_exact,
    assert_same,
    assert_survives,
    normal,
    run,
)
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from pinclip.ops import _attention_cpu
from pinclip.ops.attention import (
    QKNorm,
    _attention,
    _composed,
    _cross_attention,
    attention,
    attention_plan,
)
from pinclip.reference.attention import attention as reference

# 72 and 80 are So400m's and H/14's, 88 and 96 lie between powers of two.
HEAD_DIMS = [64, 72, 80, 88, 96, 128]
# One token; a ViT-B/32 with CLS; around a 64-row tile; CLIP's text; ViTs of 14^2 and 16^2 patches with CLS.
TOKENS = [1, 50, 63, 64, 65, 77, 197, 257]
LENGTHS = torch.tensor([5, 0, 7, 3, 7])  # some, none, all, and two alike
CU_SEQLENS = torch.tensor([0, 0, 3, 10, 13, 13, 14, 35, 35], dtype=torch.int32)  # empty: first, inside, last


def tables(tokens, width, dtype=torch.float64):
    """RoPE tables as models make them."""
    frequency = 100.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def sdpa(qkv, causal=False, keep=None):
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=causal).transpose(1, 2).flatten(2)


def sdpa_by_segment(qkv, cu_seqlens, causal=False):
    parts = [sdpa(qkv[None, a:b], causal)[0] for a, b in pairwise(cu_seqlens.tolist()) if b > a]
    return torch.cat(parts)


def with_norm(function, **options):
    """function(*qkv, q_weight, k_weight), so that the norm's weights are arguments like any other."""
    return lambda *t: function(*t[:-2], qk_norm=QKNorm(*t[-2:], eps=1e-5), **options)


SHORT = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
SOME = torch.tensor([0, 3])
CASES = {
    "packed": ((normal(2, 3, 3, 2, 2),), {}),
    "causal": ((normal(1, 3, 3, 2, 2),), {"causal": True}),
    "lengths": ((normal(2, 4, 3, 2, 2),), {"key_lengths": SOME}),
    "causal lengths": ((normal(2, 4, 3, 2, 2),), {"key_lengths": SOME, "causal": True}),
    "varlen": ((normal(5, 3, 2, 2),), {"cu_seqlens": SHORT}),
    "cross": ((normal(2, 2, 2, 2), *normal(2, 2, 4, 2, 2, seed=1)), {"key_lengths": SOME}),
    "scale": ((normal(1, 3, 3, 2, 2),), {"scale": 0.9}),
    "rope": ((normal(2, 3, 3, 1, 4),), {"rope": tables(5, 4)}),
    "varlen rope": ((normal(5, 3, 1, 4),), {"cu_seqlens": SHORT, "rope": tables(3, 4)}),
}


@pytest.mark.parametrize("function", [reference, attention], ids=["reference", "op"])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(function, case):
    tensors, options = CASES[case]
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(lambda *t: function(*t, **options), leaves)


@pytest.mark.parametrize("function", [reference, attention], ids=["reference", "op"])
@pytest.mark.parametrize("case", ["packed", "varlen rope", "cross"])
def test_gradcheck_qk_norm(function, case):
    tensors, options = CASES[case]
    leaves = [t.clone().requires_grad_() for t in (*tensors, *normal(2, tensors[0].shape[-1], seed=5))]
    assert gradcheck(with_norm(function, **options), leaves)


@pytest.mark.parametrize("case", [case for case in CASES if "rope" not in case])  # rotated before either path
def test_composition_for_other_devices(case):
    """What runs where no kernel is registered is torch's own attention, held to the same truth."""
    tensors, options = CASES[case]
    options = {"cu_seqlens": None, "key_lengths": None, "causal": False, "scale": 0.5} | options
    arguments = [options[name] for name in ("key_lengths", "causal", "scale")]
    for max_seqlen in (None, 3):
        assert_exact(
            lambda *t, longest=max_seqlen: _composed(t, options["cu_seqlens"], longest, *arguments),
            lambda *t: reference(*t, **options),
            tensors,
        )


def test_other_devices_take_the_composition():
    assert attention(torch.empty(2, 5, 3, 2, 8, device="meta")).shape == (2, 5, 16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_packed_fp32(tokens, width, causal):
    qkv = normal(2, tokens, 3, 2, width, dtype=torch.float32)
    assert_as_exact_as(
        lambda t: attention(t, causal=causal),
        lambda t: sdpa(t, causal),
        lambda t: reference(t, causal=causal),
        [qkv],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 64, 77, 257])
@pytest.mark.parametrize("width", [64, 72])
def test_packed_low_precision(tokens, width, dtype):
    qkv = normal(2, tokens, 3, 2, width, dtype=dtype)
    assert_as_exact_as(attention, sdpa, reference, [qkv])
    assert attention(qkv).dtype == dtype


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen(dtype, causal):
    """Short texts beside a fused pin and a ViT's length, with empty segments."""
    cu_seqlens = torch.tensor([0, 0, 8, 9, 74, 74, 151, 348, 356, 356], dtype=torch.int32)
    options = {"cu_seqlens": cu_seqlens, "causal": causal}
    assert_as_exact_as(
        lambda t: attention(t, **options),
        lambda t: sdpa_by_segment(t, cu_seqlens, causal),
        lambda t: reference(t, **options),
        [normal(356, 3, 2, 64, dtype=dtype)],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_padded_is_a_loop(causal):
    qkv = normal(35, 3, 2, 8)
    lengths = CU_SEQLENS.diff()
    inside = torch.arange(21) < lengths[:, None]

    def padded(t):
        dense = t.new_zeros(len(lengths), 21, 3, 2, 8).masked_scatter(inside[:, :, None, None, None], t)
        return attention(dense, key_lengths=lengths, causal=causal)[inside]

    varlen = lambda t: attention(t, cu_seqlens=CU_SEQLENS, causal=causal)  # noqa: E731
    assert_exact(varlen, padded, [qkv])
    assert_exact(varlen, lambda t: sdpa_by_segment(t, CU_SEQLENS, causal), [qkv])


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_fp32(causal):
    lengths = torch.tensor([50, 1, 65, 64], dtype=torch.int32)
    keep = (torch.arange(65) < lengths[:, None])[:, None, None, :]
    keep = keep & torch.ones(65, 65, dtype=torch.bool).tril() if causal else keep
    options = {"key_lengths": lengths, "causal": causal}
    assert_as_exact_as(
        lambda t: attention(t, **options),
        lambda t: sdpa(t, keep=keep),
        lambda t: reference(t, **options),
        [normal(4, 65, 3, 2, 64, dtype=torch.float32)],
    )


def composed(qkv, key_lengths, causal):
    return _composed((qkv,), None, None, key_lengths, causal, 0.5)


@pytest.mark.parametrize("function", [reference, attention, composed])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_leak(function, causal):
    """NaN in the keys and values beyond key_lengths changes no bit of a result or gradient."""
    qkv = normal(5, 7, 3, 2, 8)
    padding = torch.arange(7) >= LENGTHS[:, None]
    poisoned = qkv.clone()
    poisoned[:, :, 1:][padding] = torch.nan
    call = lambda t: function(t, key_lengths=LENGTHS, causal=causal)  # noqa: E731
    results = run(call, [poisoned])
    assert_same(results, run(call, [qkv]))
    assert (results[1][0][:, :, 1:][padding] == 0).all()


@pytest.mark.parametrize("function", [attention, reference], ids=["op", "reference"])
def test_poisoned_padding_under_a_norm(function):
    q, k, v, weights = normal(5, 6, 2, 8), normal(5, 7, 2, 8), normal(5, 7, 2, 8), normal(2, 8)
    padding = torch.arange(7) >= LENGTHS[:, None]
    poisoned = [t.clone().masked_fill(padding[:, :, None, None], torch.nan) for t in (k, v)]
    call = with_norm(function, key_lengths=LENGTHS)
    assert_same(*(run(call, [q, *keys, *weights]) for keys in ((k, v), poisoned)))


def test_rows_without_keys_are_zero():
    qkv = normal(5, 7, 3, 2, 8)
    (out,), (grad,) = run(lambda t: attention(t, key_lengths=LENGTHS), [qkv])
    empty = LENGTHS == 0
    assert (out[empty] == 0).all() and (grad[empty] == 0).all()
    assert (out[~empty] != 0).all()
    tensors = (normal(2, 3, 2, 8), normal(2, 0, 2, 8), normal(2, 0, 2, 8))
    results, gradients = run(attention, tensors)
    assert all((t == 0).all() for t in (*results, *gradients))
    for shape in ((0, 5, 3, 2, 8), (2, 0, 3, 2, 8)):
        assert attention(normal(*shape)).shape == (*shape[:2], 16)
    none = torch.zeros(1, dtype=torch.int32)
    assert attention(normal(0, 3, 2, 8), cu_seqlens=none).shape == (0, 16)


@pytest.mark.parametrize("tokens", [64, 65])
def test_logits_near_minus_120(tokens):
    """All scores of a row far below zero: softmax must subtract the maximum, not a constant."""
    qkv = normal(2, tokens, 3, 2, 64, dtype=torch.float32, scale=0.3)
    qkv[:, :, 0] += 120**0.5
    qkv[:, :, 1] -= 120**0.5 / 8
    q, k, _ = qkv.unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8
    assert scores.max() < -100 and scores.min() > -140
    assert_as_exact_as(attention, sdpa, reference, [qkv])
    lengths = torch.full((2,), tokens - 1)
    keep = (torch.arange(tokens) < lengths[:, None])[:, None, None, :]
    assert_as_exact_as(
        lambda t: attention(t, key_lengths=lengths),
        lambda t: sdpa(t, keep=keep),
        lambda t: reference(t, key_lengths=lengths),
        [qkv],
    )


@pytest.mark.parametrize("queries", [1, 64])
def test_cross_attention(queries):
    lengths = torch.tensor([77, 0, 13])
    options = {"key_lengths": lengths}
    tensors = normal(3, queries, 2, 72), *normal(2, 3, 77, 2, 72, seed=1)
    assert_exact(lambda *t: attention(*t, **options), lambda *t: reference(*t, **options), tensors)

    def plain(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    assert_as_exact_as(attention, plain, reference, [t.float() for t in tensors])


def test_qk_norm_and_rope_are_what_they_say():
    """Scores of normalised heads are cosines times the weights, and depend on relative position only."""
    tokens, width = 9, 8
    tied = normal(1, 1, 3, 1, width).expand(1, tokens, 3, 1, width)
    ones = torch.ones(width, dtype=torch.float64)
    qkv = normal(2, tokens, 3, 2, width)
    q, k, v = qkv.unbind(2)
    unit = [t / t.norm(dim=-1, keepdim=True) * width**0.5 for t in (q, k)]
    normed = attention(qkv, qk_norm=QKNorm(ones, ones, eps=0.0))
    torch.testing.assert_close(normed, attention(*unit, v))

    rope = tables(tokens + 3, width)
    shifted = tuple(t[3:] for t in rope)
    torch.testing.assert_close(attention(qkv, rope=rope), attention(qkv, rope=shifted))
    still = attention(tied, rope=rope)
    assert torch.allclose(still, tied[:, :, 2].flatten(2))  # equal values, whatever the scores
    assert not torch.allclose(attention(qkv, rope=rope), attention(qkv))
    turned = torch.stack((tied[:, :, 0], tied[:, :, 1], qkv[:1, :, 2, :1]), 2)
    assert not torch.allclose(attention(turned, rope=rope)[0, 0], attention(turned, rope=rope)[0, -1])


def test_norm_rope_and_lengths_together():
    weights = normal(8, seed=5), normal(8, seed=6)
    for tensors, options in (
        ((normal(35, 3, 2, 8),), {"cu_seqlens": CU_SEQLENS, "causal": True}),
        ((normal(5, 7, 3, 2, 8),), {"key_lengths": LENGTHS}),
        ((normal(5, 4, 2, 8), *normal(2, 5, 7, 2, 8)), {"key_lengths": LENGTHS}),
    ):
        options["rope"] = tables(21, 8)
        tensors = *tensors, *weights
        assert_exact(with_norm(attention, **options), with_norm(reference, **options), tensors)


def test_groups_split_anywhere(monkeypatch):
    """The bound on a group's size changes no number: one sequence at a time, some, or all."""
    calls = [
        (lambda t: attention(t), normal(9, 5, 3, 2, 8)),
        (
            lambda t: attention(t, key_lengths=torch.tensor([3, 5, 0, 3, 3, 5, 1, 3, 3])),
            normal(9, 5, 3, 2, 8),
        ),
        (lambda t: attention(t, cu_seqlens=CU_SEQLENS), normal(35, 3, 2, 8)),
    ]
    expected = [run(call, [t]) for call, t in calls]
    for limit in (1, 170, 400):
        monkeypatch.setattr(_attention_cpu, "_GROUP_ELEMENTS", limit)
        for (call, tensor), right in zip(calls, expected):
            assert_same(run(call, [tensor]), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_compile_checkpoint_strides_repeat(case):
    tensors, options = CASES[case]
    assert_survives(lambda *t: attention(*t, **options), tensors)


def test_autocast():
    qkv = normal(2, 5, 3, 2, 8)
    result = assert_autocast(lambda t: attention(t), [qkv], torch.bfloat16)
    assert torch.equal(result, attention(qkv.float().bfloat16()))
    assert_autocast(lambda q, k, v: attention(q, k, v), qkv.unbind(2), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(qkv).dtype == torch.float64


def test_opcheck():
    no_segments = [None] * 4
    for tensors, *rest in (
        ((normal(2, 5, 3, 2, 8),), *no_segments, None, True, 0.3),
        ((normal(5, 7, 3, 2, 8),), *no_segments, LENGTHS, False, 0.3),
        ((normal(35, 3, 2, 8),), CU_SEQLENS, 21, None, None, None, False, 0.3),
        ((normal(35, 3, 2, 8, dtype=torch.bfloat16),), CU_SEQLENS, *[None] * 4, False, 0.3),
        ((normal(5, 4, 2, 8), *normal(2, 5, 7, 2, 8)), LENGTHS, False, 0.3),
    ):
        op = _attention if len(tensors) == 1 else _cross_attention
        opcheck(op, (*(t.clone().requires_grad_() for t in tensors), *rest))


def test_nothing_is_planned_on_a_cpu():
    assert attention_plan(CU_SEQLENS, 35, 21) is None
    for cu_seqlens, tokens, message in ((CU_SEQLENS.long(), 35, "int32"), (CU_SEQLENS, -1, "tokens")):
        with pytest.raises(ValueError, match=message):
            attention_plan(cu_seqlens, tokens, 21)


QKV = torch.zeros(2, 5, 3, 2, 8)
Q, K = torch.zeros(2, 5, 2, 8), torch.zeros(2, 7, 2, 8)
VARLEN, CU = torch.zeros(10, 3, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments,options,words",
    [
        ((QKV.long(),), {}, ("qkv", "torch.int64")),
        ((QKV[:, :, :2],), {}, ("qkv", "[2, 5, 2, 2, 8]")),
        ((VARLEN,), {}, ("qkv", "[10, 3, 2, 8]")),
        ((QKV,), {"cu_seqlens": CU}, ("qkv", "[2, 5, 3, 2, 8]")),
        ((Q, K), {}, ("v", "None")),
        ((Q, None, K), {}, ("v", "k")),
        ((Q, K[:1], K[:1]), {}, ("k", "[1, 7, 2, 8]")),
        ((Q, K[:, :, :1], K[:, :, :1]), {}, ("k", "[2, 7, 1, 8]")),
        ((Q, K, K[:, :6]), {}, ("v", "[2, 6, 2, 8]")),
        ((Q, K.half(), K), {}, ("k", "torch.float16", "torch.float32")),
        ((Q, K.to("meta"), K), {}, ("k", "meta", "cpu")),
        ((Q, K, K), {"causal": True}, ("causal", "5", "7")),
        ((Q, K, K), {"cu_seqlens": CU}, ("cu_seqlens",)),
        ((VARLEN,), {"cu_seqlens": CU.long()}, ("cu_seqlens", "torch.int64")),
        ((VARLEN,), {"cu_seqlens": CU[None]}, ("cu_seqlens", "[1, 3]")),
        ((VARLEN,), {"cu_seqlens": CU[:0]}, ("cu_seqlens", "[0]")),
        ((VARLEN,), {"cu_seqlens": CU[:2]}, ("cu_seqlens", "10", "[0, 4]")),
        ((VARLEN,), {"cu_seqlens": CU[[0, 2, 1, 2]]}, ("cu_seqlens", "[0, 10, 4, 10]")),
        ((VARLEN,), {"cu_seqlens": CU.to("meta")}, ("cu_seqlens", "meta")),
        ((VARLEN,), {"cu_seqlens": CU, "key_lengths": CU[1:]}, ("key_lengths", "varlen")),
        ((QKV,), {"key_lengths": torch.ones(3, dtype=torch.int64)}, ("key_lengths", "[3]")),
        ((QKV,), {"key_lengths": torch.ones(2)}, ("key_lengths", "torch.float32")),
        ((QKV,), {"key_lengths": torch.tensor([1, 6])}, ("key_lengths", "[0, 5]", "[1, 6]")),
        ((QKV,), {"key_lengths": torch.tensor([-1, 5])}, ("key_lengths", "[-1, 5]")),
        ((QKV,), {"qk_norm": QKNorm(torch.ones(8), torch.ones(4))}, ("qk_norm.k_weight", "[4]")),
        ((QKV,), {"rope": tables(5, 6)}, ("rope cos", "[5, 3]")),
        ((QKV,), {"rope": tables(4, 8)}, ("rope cos", "5", "4")),
        ((QKV[..., :7],), {"rope": tables(5, 8)}, ("Dh", "7")),
    ],
)
def test_errors_name_argument_and_value(arguments, options, words):
    with pytest.raises(ValueError) as error:
        attention(*arguments, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
