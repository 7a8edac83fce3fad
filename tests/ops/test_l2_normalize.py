"""L2 normalisation: torch's, but for rows of zero; and as a torch op."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_exact, assert_survives, normal, run
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import normalize

from pinclip.ops.l2_normalize import _l2_normalize, l2_normalize
from pinclip.reference.l2_normalize import l2_normalize as reference


def truth(x, eps=1e-12):
    return reference(x, eps)


def plain(x, eps=1e-12):
    return normalize(x, dim=-1, eps=eps)


def test_gradcheck():
    x = normal(2, 3, 4).requires_grad_()
    assert gradcheck(truth, [x])
    assert gradcheck(l2_normalize, [x])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3)])
def test_is_torch_normalize(shape):
    x = normal(*shape, 5)
    assert_exact(truth, plain, [x])
    assert_exact(l2_normalize, plain, [x])


def test_below_eps_the_divisor_is_a_constant():
    x = normal(4, 5) * torch.tensor([[1e-3], [1.0], [1e-2], [10.0]], dtype=torch.float64)
    assert (x.norm(dim=1) < 0.5).tolist() == [True, False, True, False]
    for function in (truth, l2_normalize):
        assert_exact(lambda t, f=function: f(t, 0.5), lambda t: plain(t, 0.5), [x])


@pytest.mark.parametrize("function", [truth, l2_normalize], ids=["reference", "op"])
def test_zero_row_is_zero_and_has_zero_gradient(function):
    x = normal(3, 5, dtype=torch.float32)
    x[1] = 0
    (y,), (gradient,) = run(function, [x])
    assert (y[1] == 0).all() and (gradient[1] == 0).all()
    (expected,), (expected_gradient,) = run(plain, [x])
    assert (expected_gradient[1].abs() > 1e9).any()  # what it is to be spared
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(gradient[[0, 2]], expected_gradient[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 100, 512, 1152])
def test_error_against_fp64(width, dtype):
    assert_as_exact_as(l2_normalize, plain, truth, [normal(65, width, dtype=dtype)])


def test_gradient_is_tangent():
    x = normal(6, 9)
    _, (gradient,) = run(l2_normalize, [x])
    torch.testing.assert_close((gradient * x).sum(-1), torch.zeros(6, dtype=torch.float64))


def test_compile_checkpoint_strides_repeat():
    assert_survives(l2_normalize, [normal(3, 5)])


def test_autocast_leaves_the_dtype():
    x = normal(3, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(l2_normalize(x), plain(x))


def test_opcheck():
    x = normal(3, 5)
    x[1] = 0
    opcheck(_l2_normalize, (x.requires_grad_(), 1e-12))


@pytest.mark.parametrize(
    "x,eps,words",
    [
        (torch.ones(()), 1e-12, ("x", "[]")),
        (torch.ones(3).int(), 1e-12, ("x", "torch.int32")),
        (torch.ones(3), 0.0, ("eps", "0.0")),
    ],
)
def test_errors_name_argument_and_value(x, eps, words):
    with pytest.raises(ValueError) as error:
        l2_normalize(x, eps)
    assert all(word in str(error.value) for word in words), str(error.value)
