"""L2 normalisation of the last dimension, in plain PyTorch."""

import torch
from torch import Tensor

from pinclip.reference.attention import accumulation_dtype


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(||x||, eps) over the last dimension; a row of norm zero gives 0 and has zero gradient."""
    wide = x.to(accumulation_dtype(x.dtype))
    zero = torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True) == 0
    # A zero row is replaced before the norm is taken: its derivative is 0/0.
    norm = torch.linalg.vector_norm(wide.masked_fill(zero, 1.0), dim=-1, keepdim=True)
    return (wide / norm.clamp_min(eps)).masked_fill(zero, 0.0).to(x.dtype)
