"""Gated residual followed by LayerNorm, in one op. D width."""

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
from pinclip.ops._rows import as_rows, runs_triton
from pinclip.reference.attention import accumulation_dtype

_GATE_KINDS = ("tanh", "channel")


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gate_kind: str = "tanh",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """residual = x + g y;  normed = (residual - mean) / sqrt(var + eps) * weight + bias;  returns both.

    gate_kind "tanh": g = tanh(gate), gate a scalar [] or [1] (Flamingo, arXiv 2204.14198);
    "channel": g = gate [D] (LayerScale, arXiv 2103.17239).

    x, y [..., D]; weight, bias [D].  Floating dtypes may differ; both results have the dtype to which torch
    promotes them, and everything is computed in fp32, or in fp64 where an input is fp64.
    Gradients for all five tensors, from both results; row reductions are deterministic.
    Saved for backward: residual, y, and two numbers per row.  Collectives: none.
    On a GPU, but in fp64 or at D > 2048, one kernel for each direction reads and writes every row once;
    extra memory of the backward pass there: 12 D bytes for each of at most 3168 programs on an H200.
    Raises ValueError for other shapes, dtypes, devices or gate kinds.
    """
    require(gate_kind in _GATE_KINDS, "gate_kind", f"be one of {_GATE_KINDS}", repr(gate_kind))
    tensors = {"x": x, "y": y, "gate": gate, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        check_float(name, tensor)
    require(x.dim() >= 1, "x", "have at least one dimension", list(x.shape))
    check_shape("y", y, tuple(x.shape), "[..., D] of x")
    check_shape("weight", weight, (x.shape[-1],), "[D]")
    check_shape("bias", bias, (x.shape[-1],), "[D]")
    if gate_kind == "channel":
        check_shape("gate", gate, (x.shape[-1],), "[D]")
    else:
        require(gate.shape in ((), (1,)), "gate", "be a scalar of shape [] or [1]", list(gate.shape))
    check_device("x", x, y=y, gate=gate, weight=weight, bias=bias)
    return _gated_residual_norm(x, y, gate, weight, bias, gate_kind == "tanh", float(eps))[:2]


@torch.library.custom_op("pinclip::gated_residual_norm", mutates_args=())
@without_autocast
def _gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, tanh: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> residual, normed, and each row's mean and 1/sqrt(var + eps), [..., 1]."""
    dtype = promoted_dtype(x, y, gate, weight, bias)
    if runs_triton(x.shape[-1], x, y, gate, weight, bias):
        return _triton(x, y, gate, weight, bias, tanh, dtype, eps)
    wide_x, wide_y, gate, weight, bias = (t.to(accumulation_dtype(dtype)) for t in (x, y, gate, weight, bias))
    residual = torch.addcmul(wide_x, wide_y, torch.tanh(gate) if tanh else gate).contiguous()
    normed, mean, rstd = torch.native_layer_norm(residual, weight.shape, weight, bias, eps)
    return residual.to(dtype), normed.to(dtype), mean, rstd


@_gated_residual_norm.register_fake
def _(x, y, gate, weight, bias, tanh, eps):
    dtype = promoted_dtype(x, y, gate, weight, bias)
    result = x.new_empty(x.shape, dtype=dtype)
    row = x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(dtype))
    return result, torch.empty_like(result), row, torch.empty_like(row)


@torch.library.custom_op("pinclip::gated_residual_norm_backward", mutates_args=())
@without_autocast
def _gated_residual_norm_backward(
    grad_residual: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of x, y, gate, weight and bias."""
    if runs_triton(y.shape[-1], residual, y, gate, weight, bias):
        return _triton_backward(
            grad_residual, grad_normed, residual, mean, rstd, x_dtype, y, gate, weight, bias, tanh
        )
    grad_residual, grad_normed, residual, wide_y, wide_gate, wide_weight, wide_bias = (
        t.to(mean.dtype) for t in (grad_residual, grad_normed, residual, y, gate, weight, bias)
    )
    # Every gradient through the norm comes to the residual, and from there with its own to x, y and the gate.
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed, residual, weight.shape, mean, rstd, wide_weight, wide_bias, [True, True, True]
    )
    grad_x = grad_x.add_(grad_residual)
    gated = torch.tanh(wide_gate) if tanh else wide_gate
    grad_y = grad_x * gated
    product = grad_x * wide_y
    if tanh:
        grad_gate = product.sum().mul(1 - gated.square()).view(gate.shape)
    else:
        grad_gate = product.flatten(0, -2).sum(0) if product.dim() > 1 else product
    return (
        grad_x.to(x_dtype),
        grad_y.to(y.dtype),
        grad_gate.to(gate.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )


@_gated_residual_norm_backward.register_fake
def _(grad_residual, grad_normed, residual, mean, rstd, x_dtype, y, gate, weight, bias, tanh):
    rows = residual.new_empty(residual.shape, dtype=x_dtype), residual.new_empty(y.shape, dtype=y.dtype)
    return *rows, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, weight, bias))


def _save(ctx, inputs, output) -> None:
    x, y, gate, weight, bias, ctx.tanh, _eps = inputs
    residual, _normed, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(residual, mean, rstd, y, gate, weight, bias)


def _gradients(ctx, grad_residual, grad_normed, _grad_mean, _grad_rstd):
    residual, mean, rstd, *others = ctx.saved_tensors
    grads = _gated_residual_norm_backward(
        grad_residual, grad_normed, residual, mean, rstd, ctx.x_dtype, *others, ctx.tanh
    )
    return *grads, None, None


_gated_residual_norm.register_autograd(_gradients, setup_context=_save)


def _channel_gate(gate: Tensor, tanh: bool, width: int) -> Tensor:
    """g as the kernels read it: fp32 [D]."""
    return torch.tanh(gate.float()).expand(width).contiguous() if tanh else gate.float().contiguous()


def _triton(x, y, gate, weight, bias, tanh, dtype, eps):
    from pinclip_kernels.triton import gated_residual_norm as kernels

    vectors = _channel_gate(gate, tanh, x.shape[-1]), *(t.float().contiguous() for t in (weight, bias))
    with torch.cuda.device_of(x):
        residual, normed, mean, rstd = kernels.forward(as_rows(x), as_rows(y), *vectors, dtype, eps)
    row = (*x.shape[:-1], 1)
    return residual.view(x.shape), normed.view(x.shape), mean.view(row), rstd.view(row)


def _triton_backward(grad_residual, grad_normed, residual, mean, rstd, x_dtype, y, gate, weight, bias, tanh):
    from pinclip_kernels.triton import gated_residual_norm as kernels

    g = _channel_gate(gate, tanh, y.shape[-1])
    rows = (as_rows(t) for t in (grad_residual, grad_normed, residual, y))
    with torch.cuda.device_of(y):
        grad_x, grad_y, grad_gate, grad_weight, grad_bias = kernels.backward(
            *rows, mean, rstd, g, weight.float().contiguous(), x_dtype
        )
    if tanh:
        grad_gate = (grad_gate.sum() * (1 - g[0].square())).view(gate.shape)
    return (
        grad_x.view(y.shape),
        grad_y.view(y.shape),
        grad_gate.to(gate.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )
