"""Attention pooling: the absorbed form is the standard form, for every gradient; and as a torch op."""

import pytest
import torch
from ops_helpers import (
    assert_as_exact_as,
    assert_autocast,
    assert_backward_ignores_autocast,
    assert_exact,
    assert_same,
    assert_survives,
    normal,
    run,
)
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import layer_norm, linear, multi_head_attention_forward, scaled_dot_product_attention

from pinclip.ops.attention_pool import _attention_pool, attention_pool
from pinclip.reference.attention_pool import attention_pool as reference

LENGTHS = torch.tensor([3, 0, 5, 1])  # some, none, all, one


def problem(probes=2, width=8, batch=4, tokens=5, dtype=torch.float64):
    """x, q, w_k, b_k, w_v, b_v; weights of the size a linear layer has."""
    x, q = normal(batch, tokens, width, dtype=dtype), normal(probes, width, seed=1, dtype=dtype)
    w_k, w_v = normal(2, width, width, seed=2, dtype=dtype, scale=width**-0.5)
    b_k, b_v = normal(2, width, seed=3, dtype=dtype)
    return x, q, w_k, b_k, w_v, b_v


def pool(form, heads=2, lengths=None):
    return lambda *t: attention_pool(*t, num_heads=heads, key_lengths=lengths, form=form)


def truth(heads=2, lengths=None, form="standard"):
    return lambda *t: reference(*t, num_heads=heads, key_lengths=lengths, form=form)


def plain(heads, keep=None):
    def pooled(x, q, w_k, b_k, w_v, b_v):
        key, value = (
            linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for w, b in ((w_k, b_k), (w_v, b_v))
        )
        query = q.unflatten(-1, (heads, -1)).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        return scaled_dot_product_attention(query, key, value, attn_mask=keep).transpose(1, 2).flatten(2)

    return pooled


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
@pytest.mark.parametrize("form", ["absorbed", "standard"])
def test_gradcheck(form, lengths):
    leaves = [t.clone().requires_grad_() for t in problem(width=4, tokens=5)]
    assert gradcheck(truth(lengths=lengths, form=form), leaves)
    assert gradcheck(pool(form, lengths=lengths), leaves)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
def test_all_forms_are_one(lengths, probes, heads):
    tensors = problem(probes)
    expected = truth(heads, lengths)
    assert_exact(truth(heads, lengths, "absorbed"), expected, tensors)
    for form in ("absorbed", "standard", "auto"):
        assert_exact(pool(form, heads, lengths), expected, tensors)


def test_is_torch_multihead_attention():
    """As torch.nn.MultiheadAttention pools, of which SigLIP's head is made."""
    x, q, w_k, b_k, w_v, b_v = problem()
    eye, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    theirs, _ = multi_head_attention_forward(
        q[:, None].expand(-1, 4, -1),
        x.transpose(0, 1),
        x.transpose(0, 1),
        8,
        2,
        torch.cat((eye, w_k, w_v)),
        torch.cat((zero, b_k, b_v)),
        None,
        None,
        False,
        0.0,
        eye,
        zero,
        key_padding_mask=torch.arange(5) >= LENGTHS.clamp(min=1)[:, None],
    )
    ours = attention_pool(x, q, w_k, b_k, w_v, b_v, num_heads=2, key_lengths=LENGTHS.clamp(min=1))
    torch.testing.assert_close(ours, theirs.transpose(0, 1))


def test_key_bias_cancels_exactly():
    _, gradients = run(pool("absorbed"), problem())
    assert (gradients[3] == 0).all()
    assert all((gradient != 0).any() for i, gradient in enumerate(gradients) if i != 3)


def test_auto_absorbs_up_to_half_the_head_dim_of_probes():
    for probes, form in ((2, "absorbed"), (3, "standard")):
        tensors = problem(probes, width=8)
        assert_same(run(pool("auto"), tensors), run(pool(form), tensors))
    absorbed = run(pool("absorbed"), tensors)
    assert any(not torch.equal(a, b) for a, b in zip(absorbed[1], run(pool("auto"), tensors)[1]))


@pytest.mark.parametrize("form", ["absorbed", "standard"])
def test_padding_does_not_leak_and_empty_rows_are_zero(form):
    tensors = problem()
    padding = torch.arange(5) >= LENGTHS[:, None]
    poisoned = tensors[0].masked_fill(padding[..., None], torch.nan)
    (out,), gradients = results = run(pool(form, lengths=LENGTHS), (poisoned, *tensors[1:]))
    assert_same(results, run(pool(form, lengths=LENGTHS), tensors))
    assert (gradients[0][padding] == 0).all()
    assert (out[LENGTHS == 0] == 0).all() and (out[LENGTHS > 0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probes,width,heads,tokens", [(1, 128, 2, 64), (1, 144, 2, 197), (8, 128, 2, 50)])
def test_error_against_fp64(probes, width, heads, tokens, dtype):
    """A small ViT, So400m's head dim 72 with CLS, and several probes."""
    tensors = problem(probes, width, 3, tokens, dtype)
    for form in ("absorbed", "standard"):
        assert_as_exact_as(pool(form, heads), plain(heads), truth(heads), tensors)


def test_logits_near_minus_120():
    x, q, *others = problem(1, 64, 2, 65, torch.float32)
    w_k = torch.eye(64)
    x = x * 0.1 + 120**0.5
    q = q * 0.1 - 120**0.5 / 8
    scores = torch.einsum("pd,bnd->bpn", q, x) / 8
    assert scores.max() < -100 and scores.min() > -140
    tensors = (x, q, w_k, *others[1:])
    assert_as_exact_as(pool("absorbed", 1), plain(1), truth(1), tensors)


@pytest.mark.parametrize("form", ["absorbed", "standard"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
def test_compile_checkpoint_strides_repeat(lengths, form):
    assert_survives(pool(form, lengths=lengths), problem())


@pytest.mark.parametrize("form", ["absorbed", "standard"])
def test_autocast(form):
    tensors = problem()
    result = assert_autocast(pool(form, lengths=LENGTHS), tensors, torch.bfloat16)
    assert torch.equal(result, pool(form, lengths=LENGTHS)(*(t.float().bfloat16() for t in tensors)))


def test_backward_ignores_autocast():
    assert_backward_ignores_autocast(pool("absorbed"), problem())


@pytest.mark.parametrize("form", ["absorbed", "standard"])
def test_no_pins(form):
    assert_exact(pool(form), truth(), problem(batch=0))


@pytest.mark.parametrize("form", ["absorbed", "standard"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
def test_norm_is_a_layer_norm_before(lengths, form):
    """With gradients of its weight and bias; what stands in the padding is not read."""
    options = {"num_heads": 2, "key_lengths": lengths, "form": form}
    tensors = (*problem(), 1 + normal(8, seed=5), normal(8, seed=6))

    def before(x, *others):
        *others, weight, bias = others
        return attention_pool(layer_norm(x, (8,), weight, bias, 1e-5), *others, **options)

    for function in (attention_pool, reference):
        assert_exact(lambda *t, f=function: f(*t[:6], norm=(*t[6:], 1e-5), **options), before, tensors)
    if lengths is not None:
        padding = torch.arange(5) >= LENGTHS[:, None]
        poisoned = (tensors[0].masked_fill(padding[..., None], torch.nan), *tensors[1:])
        op = run(lambda *t: attention_pool(*t[:6], norm=(*t[6:], 1e-5), **options), poisoned)
        assert_same(op, run(lambda *t: attention_pool(*t[:6], norm=(*t[6:], 1e-5), **options), tensors))


def test_norm_under_autocast_and_with_dynamic_shapes():
    def normed(x, *others):
        *others, weight, bias = others
        return attention_pool(x, *others, num_heads=2, norm=(weight, bias, 1e-5))

    tensors = (*problem(), 1 + normal(8, seed=5), normal(8, seed=6))
    assert_autocast(normed, tensors, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(normed, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        some = (tensors[0][:batch], *tensors[1:])
        assert_same(run(compiled, some), run(normed, some))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
def test_opcheck(lengths):
    opcheck(_attention_pool, (*(t.clone().requires_grad_() for t in problem()), 2, lengths))


@pytest.mark.parametrize(
    "index,bad,options,words",
    [
        (0, torch.ones(4, 8), {}, ("x", "[4, 8]")),
        (0, torch.ones(4, 0, 8), {}, ("x", "[4, 0, 8]")),
        (0, torch.ones(4, 5, 8).int(), {}, ("x", "torch.int32")),
        (1, torch.ones(2, 6), {}, ("q", "[2, 6]")),
        (1, torch.ones(2, 8).half(), {}, ("q", "torch.float16")),
        (2, torch.ones(4, 8), {}, ("w_k", "[4, 8]")),
        (3, torch.ones(4), {}, ("b_k", "[4]")),
        (4, torch.ones(8, 4), {}, ("w_v", "[8, 4]")),
        (5, torch.ones(8, device="meta"), {}, ("b_v", "meta")),
        (5, torch.ones(8), {"num_heads": 3}, ("num_heads", "8", "3")),
        (5, torch.ones(8), {"num_heads": 0}, ("num_heads", "0")),
        (5, torch.ones(8), {"form": "fast"}, ("form", "fast")),
        (5, torch.ones(8), {"norm": (torch.ones(8), torch.ones(4), 1e-5)}, ("norm bias", "[4]")),
        (5, torch.ones(8), {"norm": (torch.ones(8).half(), torch.ones(8), 1e-5)}, ("norm weight", "float16")),
        (5, torch.ones(8), {"norm": (torch.ones(8), torch.ones(8), 0.0)}, ("norm eps", "0.0")),
        (5, torch.ones(8), {"key_lengths": LENGTHS[:2]}, ("key_lengths", "[2]")),
        (5, torch.ones(8), {"key_lengths": LENGTHS.double()}, ("key_lengths", "torch.float64")),
    ],
)
def test_errors_name_argument_and_value(index, bad, options, words):
    tensors = list(problem(dtype=torch.float32))
    tensors[index] = bad
    with pytest.raises(ValueError) as error:
        attention_pool(*tensors, **{"num_heads": 2, **options})
    assert all(word in str(error.value) for word in words), str(error.value)
