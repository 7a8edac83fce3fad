"""Gated residual and LayerNorm in one op: two results, gradients from both."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_exact, assert_survives, normal, run
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import layer_norm

from pinclip.ops.gated_residual_norm import _gated_residual_norm, gated_residual_norm
from pinclip.reference.gated_residual_norm import gated_residual_norm as reference

KINDS = ["tanh", "channel"]


def problem(kind, *shape, dtype=torch.float64):
    width = shape[-1]
    gate = normal(seed=3, dtype=dtype) if kind == "tanh" else normal(width, seed=3, dtype=dtype)
    x, y = normal(2, *shape, dtype=dtype)
    return x, y, gate, normal(width, seed=4, dtype=dtype), normal(width, seed=5, dtype=dtype)


def op(kind):
    return lambda *t: gated_residual_norm(*t, gate_kind=kind, eps=1e-5)


def truth(kind):
    return lambda *t: reference(*t, gate_kind=kind, eps=1e-5)


def plain(kind):
    def composed(x, y, gate, weight, bias):
        residual = x + (torch.tanh(gate) if kind == "tanh" else gate) * y
        return residual, layer_norm(residual, weight.shape, weight, bias, 1e-5)

    return composed


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    leaves = [t.clone().requires_grad_() for t in problem(kind, 2, 3, 4)]
    assert gradcheck(truth(kind), leaves)
    assert gradcheck(op(kind), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4,), (1, 4), (0, 4), (3, 5, 4)])
def test_shapes(shape, kind):
    tensors = problem(kind, *shape)
    assert_exact(truth(kind), plain(kind), tensors)
    assert_exact(op(kind), truth(kind), tensors)


def test_gate_of_one_element():
    x, y, gate, *norm = problem("tanh", 3, 4)
    tensors = (x, y, gate[None], *norm)
    assert_exact(op("tanh"), truth("tanh"), tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(used, kind):
    """A result that nothing reads adds nothing to the gradients."""
    tensors = problem(kind, 3, 4)
    assert_exact(lambda *t: op(kind)(*t)[used], lambda *t: plain(kind)(*t)[used], tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,width", [(1, 192), (129, 1152), (1000, 192)])
def test_error_against_fp64(rows, width, kind, dtype):
    """One row; So400m's width; enough rows that the sums over them matter."""
    assert_as_exact_as(op(kind), plain(kind), truth(kind), problem(kind, rows, width, dtype=dtype))


def test_row_far_from_zero():
    """A mean 1000 times the spread: the variance must not be a difference of squares."""
    x, *others = problem("channel", 64, 192, dtype=torch.float32)
    tensors = (x + 1000, *others)
    assert_as_exact_as(op("channel"), plain("channel"), truth("channel"), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes_promote(kind):
    """An fp32 residual stream and a bf16 branch, as under autocast: the stream is not rounded."""
    x, y, *others = problem(kind, 3, 4, dtype=torch.float32)
    tensors = (x, y.bfloat16(), *others)
    with torch.autocast("cpu", torch.bfloat16):
        results, gradients = run(op(kind), tensors)
    assert [t.dtype for t in results] == [torch.float32] * 2
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors]
    exact, _ = run(truth(kind), [t.double() for t in tensors])
    for ours, true in zip(results, exact):
        torch.testing.assert_close(ours, true.float())


@pytest.mark.parametrize("kind", KINDS)
def test_compile_checkpoint_strides_repeat(kind):
    assert_survives(op(kind), problem(kind, 3, 5, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    leaves = [t.clone().requires_grad_() for t in problem(kind, 3, 5, 4)]
    opcheck(_gated_residual_norm, (*leaves, kind == "tanh", 1e-5))


@pytest.mark.parametrize(
    "index,bad,options,words",
    [
        (0, torch.ones(()), {}, ("x", "[]")),
        (0, torch.ones(3, 4).long(), {}, ("x", "torch.int64")),
        (1, torch.ones(2, 4), {}, ("y", "[2, 4]")),
        (2, torch.ones(4), {}, ("gate", "[4]")),
        (2, torch.ones(()), {"gate_kind": "channel"}, ("gate", "[]")),
        (2, torch.ones(()), {"gate_kind": "sigmoid"}, ("gate_kind", "sigmoid")),
        (3, torch.ones(3), {}, ("weight", "[3]")),
        (4, torch.ones(4, 1), {}, ("bias", "[4, 1]")),
        (4, torch.ones(4, device="meta"), {}, ("bias", "meta")),
    ],
)
def test_errors_name_argument_and_value(index, bad, options, words):
    tensors = list(problem("tanh", 3, 4))
    tensors[index] = bad
    with pytest.raises(ValueError) as error:
        gated_residual_norm(*tensors, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
