"""Bias and GELU in one op: torch's numbers, and as a torch op."""

import pytest
import torch
from ops_helpers import (
    assert_as_exact_as,
    assert_backward_ignores_autocast,
    assert_exact,
    assert_survives,
    normal,
    run,
)
from torch.autograd import gradcheck
from torch.library import opcheck

from pinclip.ops.gelu import _gelu, gelu
from pinclip.reference.gelu import gelu as reference

FORMS = ["none", "tanh"]


def op(form):
    return lambda *t: gelu(*t, approximate=form)


def truth(form):
    return lambda *t: reference(*t, approximate=form)


def plain(form):
    return lambda x, bias: torch.nn.functional.gelu(x + bias, approximate=form)


def problem(*shape, dtype=torch.float64):
    """Sums from about -8 to 8, where both forms are past all curvature."""
    return normal(*shape, dtype=dtype, scale=2.0), normal(shape[-1], seed=1, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    leaves = [t.requires_grad_() for t in problem(2, 3, 4)]
    assert gradcheck(truth(form), leaves)
    assert gradcheck(op(form), leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0), (3, 5, 4)])
def test_is_torch(shape, form):
    assert_exact(truth(form), plain(form), problem(*shape))
    assert_exact(op(form), plain(form), problem(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_error_against_fp64(form, dtype):
    assert_as_exact_as(op(form), plain(form), truth(form), problem(1000, 100, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
def test_mixed_dtypes_promote(form):
    x, bias = problem(5, 4, dtype=torch.float32)
    (y,), grads = run(op(form), (x.bfloat16(), bias))
    assert [t.dtype for t in (y, *grads)] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(y, plain(form)(x.bfloat16().float(), bias))


@pytest.mark.parametrize("form", FORMS)
def test_compile_checkpoint_strides_repeat_autocast(form):
    assert_survives(op(form), problem(3, 5, 4))
    assert_backward_ignores_autocast(op(form), problem(3, 5, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4,), (3, 5, 4)])
def test_opcheck(shape, form):
    opcheck(_gelu, (*(t.requires_grad_() for t in problem(*shape)), form))


@pytest.mark.parametrize(
    "index,bad,options,words",
    [
        (0, torch.ones(()), {}, ("x", "[]")),
        (0, torch.ones(3, 4).long(), {}, ("x", "torch.int64")),
        (1, torch.ones(3), {}, ("bias", "[3]")),
        (1, torch.ones(4, device="meta"), {}, ("bias", "meta")),
        (1, torch.ones(4), {"approximate": "erf"}, ("approximate", "erf")),
    ],
)
def test_errors_name_argument_and_value(index, bad, options, words):
    tensors = list(problem(3, 4))
    tensors[index] = bad
    with pytest.raises(ValueError) as error:
        gelu(*tensors, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
