"""Funnel pooling of a grid of tokens with stride 2, with its residual. B batch, G grid, D width."""

import torch
from torch import Tensor

from pinclip.ops._checks import check_device, check_float, check_shape, require, without_autocast
from pinclip.ops._rows import as_rows, runs_triton
from pinclip.reference.attention import accumulation_dtype
from pinclip.reference.funnel_pool import funnel_pool as reference


def funnel_pool(x: Tensor, grid: int, residual: Tensor | None = None) -> Tensor:
    """y = residual + mean over 2 x 2 neighbors of x, on a grid of tokens in row order.

    x [B, G*G, D] with G = grid even, residual [B, G*G/4, D] or None -> [B, G*G/4, D], of the dtype to which
    torch promotes x and residual; computed in fp32, or in fp64 where an input is fp64.  Pooling by attention
    with a pooled query is the same with the attention's result for residual:

        q = w_q funnel_pool(x, grid);  y = funnel_pool(x, grid, residual=attention(q, w_k x, w_v x))

    Gradients: a quarter of y's for each of the four tokens, y's own for the residual.  Nothing is saved for
    backward.  Collectives: none.  On a GPU, but in fp64 or at D > 2048, one kernel for each direction reads
    and writes every token once.
    Raises ValueError for an odd grid and other shapes, dtypes or devices.
    Source: Funnel-Transformer, Dai et al., arXiv 2006.03236, on the patch grid.
    """
    check_float("x", x)
    require(grid > 0 and grid % 2 == 0, "grid", "be even and positive", grid)
    check_shape("x", x, (None, grid * grid, None), f"[B, {grid * grid}, D]")
    if residual is not None:
        check_float("residual", residual)
        shape = (x.shape[0], grid * grid // 4, x.shape[2])
        check_shape("residual", residual, shape, "[B, G*G/4, D] of x")
        check_device("x", x, residual=residual)
    return _funnel_pool(x, residual, grid)


@torch.library.custom_op("pinclip::funnel_pool", mutates_args=())
@without_autocast
def _funnel_pool(x: Tensor, residual: Tensor | None, grid: int) -> Tensor:
    if runs_triton(x.shape[2], x, x if residual is None else residual):
        from pinclip_kernels.triton import funnel_pool as kernels

        dtype = _result_dtype(x, residual)
        with torch.cuda.device_of(x):
            y = kernels.forward(as_rows(x), None if residual is None else as_rows(residual), dtype, grid)
        return y.view(x.shape[0], grid * grid // 4, x.shape[2])
    return reference(x, residual, grid)


@_funnel_pool.register_fake
def _(x, residual, grid):
    return x.new_empty((x.shape[0], grid * grid // 4, x.shape[2]), dtype=_result_dtype(x, residual))


@torch.library.custom_op("pinclip::funnel_pool_backward", mutates_args=())
@without_autocast
def _funnel_pool_backward(grad: Tensor, grid: int, dtype: torch.dtype) -> Tensor:
    """-> the gradient of x, of `dtype`."""
    batch, _, width = grad.shape
    if runs_triton(width, grad):
        from pinclip_kernels.triton import funnel_pool as kernels

        with torch.cuda.device_of(grad):
            return kernels.backward(as_rows(grad), dtype, grid).view(batch, grid * grid, width)
    quarter = (0.25 * grad.to(accumulation_dtype(dtype))).to(dtype)
    cells = quarter.reshape(batch, grid // 2, 1, grid // 2, 1, width).expand(-1, -1, 2, -1, 2, -1)
    return cells.reshape(batch, grid * grid, width)


@_funnel_pool_backward.register_fake
def _(grad, grid, dtype):
    return grad.new_empty((grad.shape[0], grid * grid, grad.shape[2]), dtype=dtype)


def _result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _save(ctx, inputs, output) -> None:
    x, residual, ctx.grid = inputs
    ctx.dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype


def _gradients(ctx, grad):
    need_x, need_residual, _ = ctx.needs_input_grad
    grad_x = _funnel_pool_backward(grad, ctx.grid, ctx.dtype) if need_x else None
    return grad_x, grad.to(ctx.residual_dtype) if need_residual else None, None


_funnel_pool.register_autograd(_gradients, setup_context=_save)
