"""Bias and GELU in one op, whose backward pass forms the gradients of x and bias at once. D width."""

import torch
from torch import Tensor

from pinclip.ops._checks import (
    check_device,
    check_float,
    check_shape,
    promoted_dtype,
    require,
    without_autocast,
)
from pinclip.ops._rows import as_rows, on_gpu
from pinclip.reference.attention import accumulation_dtype

_APPROXIMATE = ("none", "tanh")


def gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """y = gelu(x + bias): v Φ(v), or with approximate="tanh" v (1 + tanh(√(2/π) (v + 0.044715 v³))) / 2.

    x [..., D], bias [D], floating dtypes may differ -> [..., D] of the dtype to which torch promotes them;
    computed in fp32, or in fp64 where an input is fp64.  Meant behind a matrix product without bias: its
    backward pass has dx and dbias from one reading of the gradient and of x.
    Saved for backward: x and bias.  Deterministic.  Collectives: none.
    On a GPU, but in fp64, one kernel for each direction; extra memory of the backward pass there: 6 MB on 132
    multiprocessors, for parts of dbias.
    Raises ValueError for other shapes, dtypes, devices or forms.
    Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    require(approximate in _APPROXIMATE, "approximate", f"be one of {_APPROXIMATE}", repr(approximate))
    check_float("x", x)
    check_float("bias", bias)
    require(x.dim() >= 1, "x", "have at least one dimension", list(x.shape))
    check_shape("bias", bias, (x.shape[-1],), "[D]")
    check_device("x", x, bias=bias)
    return _gelu(x, bias, approximate)


@torch.library.custom_op("pinclip::gelu", mutates_args=())
@without_autocast
def _gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    dtype = promoted_dtype(x, bias)
    if on_gpu(x, bias):
        from pinclip_kernels.triton import gelu as kernels

        with torch.cuda.device_of(x):
            y = kernels.forward(as_rows(x), bias.contiguous(), dtype, approximate == "tanh")
        return y.view(x.shape)
    v = x.to(accumulation_dtype(dtype)) + bias
    return torch.nn.functional.gelu(v, approximate=approximate).to(dtype).contiguous()


@_gelu.register_fake
def _(x, bias, approximate):
    return x.new_empty(x.shape, dtype=promoted_dtype(x, bias))


@torch.library.custom_op("pinclip::gelu_backward", mutates_args=())
@without_autocast
def _gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """-> the gradients of x and bias."""
    if on_gpu(x, bias):
        from pinclip_kernels.triton import gelu as kernels

        rows = as_rows(grad), as_rows(x)
        with torch.cuda.device_of(x):
            grad_x, grad_bias = kernels.backward(*rows, bias.contiguous(), approximate == "tanh")
        return grad_x.view(x.shape), grad_bias.to(bias.dtype)
    wide = accumulation_dtype(promoted_dtype(x, bias))
    grad_v = torch.ops.aten.gelu_backward(grad.to(wide), x.to(wide) + bias, approximate=approximate)
    grad_v = grad_v.contiguous()
    return grad_v.to(x.dtype), grad_v.sum_to_size(bias.shape).to(bias.dtype, copy=grad_v.dim() == 1)


@_gelu_backward.register_fake
def _(grad, x, bias, approximate):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, bias))


def _save(ctx, inputs, output) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx, grad):
    return *_gelu_backward(grad, *ctx.saved_tensors, ctx.approximate), None


_gelu.register_autograd(_gradients, setup_context=_save)
