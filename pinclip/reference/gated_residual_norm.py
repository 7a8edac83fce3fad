"""Gated residual followed by LayerNorm, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from pinclip.reference.attention import accumulation_dtype


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, gate_kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """residual = x + g y, normed = LayerNorm(residual); g = tanh(gate) (a scalar) or gate ([D]).

    x, y [..., D], weight, bias [D] -> two tensors [..., D].
    """
    dtype = x.dtype
    for tensor in (y, gate, weight, bias):
        dtype = torch.promote_types(dtype, tensor.dtype)
    x, y, gate, weight, bias = (t.to(accumulation_dtype(dtype)) for t in (x, y, gate, weight, bias))
    residual = x + (torch.tanh(gate) if gate_kind == "tanh" else gate) * y
    return residual.to(dtype), layer_norm(residual, weight.shape, weight, bias, eps).to(dtype)
