"""Funnel pooling of a grid of tokens, in plain PyTorch. B batch, G grid, D width."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pinclip.reference.attention import accumulation_dtype


def funnel_pool(x: Tensor, residual: Tensor | None, grid: int) -> Tensor:
    """residual + mean over 2 x 2 neighbors; x [B, G*G, D], residual [B, G*G/4, D] -> [B, G*G/4, D]."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    wide = x.to(accumulation_dtype(dtype))
    image = wide.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    pooled = avg_pool2d(image, 2).flatten(2).mT
    return (pooled if residual is None else residual.to(wide.dtype) + pooled).to(dtype).contiguous()
