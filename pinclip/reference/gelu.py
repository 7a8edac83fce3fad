"""Bias and GELU, in plain PyTorch. D width."""

import torch
from torch import Tensor

from pinclip.reference.attention import accumulation_dtype


def gelu(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """gelu(x + bias); x [..., D], bias [D] -> [..., D]. approximate "none" or "tanh", as in torch."""
    dtype = torch.promote_types(x.dtype, bias.dtype)
    wide = accumulation_dtype(dtype)
    return torch.nn.functional.gelu(x.to(wide) + bias.to(wide), approximate=approximate).to(dtype)
