"""L2 normalisation of the last dimension. D width."""

import torch
from torch import Tensor

from pinclip.ops._checks import check_float, require, without_autocast
from pinclip.ops._rows import as_rows, runs_triton
from pinclip.reference.attention import accumulation_dtype


def l2_normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """y = x / max(||x||, eps) over the last dimension; a row of norm zero gives 0 and has zero gradient.

    x [..., D] of any floating dtype -> the same shape and dtype; the norm accumulates in fp32, or in fp64 for
    fp64.  Elsewhere than at zero it is torch.nn.functional.normalize, gradient included:
    dx = (dy - y <y, dy>) / ||x||, or dy / eps where ||x|| < eps.
    On a GPU, but in fp64 or at D > 2048, one kernel for each direction reads and writes every row once.
    Saved for backward: x and one number per row.  Collectives: none.  Raises ValueError for x without a
    dimension, a dtype that is not floating, and eps that is not positive.
    """
    check_float("x", x)
    require(x.dim() >= 1, "x", "have at least one dimension", list(x.shape))
    require(eps > 0, "eps", "be positive", eps)
    return _l2_normalize(x, float(eps))[0]


@torch.library.custom_op("pinclip::l2_normalize", mutates_args=())
@without_autocast
def _l2_normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> the result, and each row's norm [..., 1] for the backward pass."""
    if runs_triton(x.shape[-1], x):
        from pinclip_kernels.triton import l2_normalize as kernels

        with torch.cuda.device_of(x):
            y, norm = kernels.forward(as_rows(x), eps)
        return y.view(x.shape), norm.view(*x.shape[:-1], 1)
    wide = x.to(accumulation_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norm.clamp_min(eps)).to(x.dtype).contiguous(), norm.contiguous()


@_l2_normalize.register_fake
def _(x, eps):
    norm = x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), norm


@torch.library.custom_op("pinclip::l2_normalize_backward", mutates_args=())
@without_autocast
def _l2_normalize_backward(grad: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    if runs_triton(x.shape[-1], x):
        from pinclip_kernels.triton import l2_normalize as kernels

        with torch.cuda.device_of(x):
            return kernels.backward(as_rows(grad), as_rows(x), norm, eps).view(x.shape)
    divisor, wide_grad = norm.clamp_min(eps), grad.to(norm.dtype)
    y = x.to(norm.dtype) / divisor
    # Below eps the divisor is a constant, and the gradient has no radial part to take away.
    along = (wide_grad * y).sum(-1, keepdim=True).masked_fill_(norm < eps, 0.0)
    grad_x = torch.addcmul(wide_grad, y, along, value=-1).div_(divisor).masked_fill_(norm == 0, 0.0)
    return grad_x.to(x.dtype).contiguous()


@_l2_normalize_backward.register_fake
def _(grad, x, norm, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x, output[1])


def _gradient(ctx, grad, _grad_norm):
    return _l2_normalize_backward(grad, *ctx.saved_tensors, ctx.eps), None


_l2_normalize.register_autograd(_gradient, setup_context=_save)
