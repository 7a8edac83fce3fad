"""Packing of fusion, image and text tokens into one varlen buffer, in plain PyTorch.

Shapes: B pins, F fusion tokens, Bi pins with an image of Ni tokens, Bt pins with a text of at most L tokens,
T packed tokens, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from pinclip.reference.attention import accumulation_dtype


def fusion_pack(
    fusion_tokens: Tensor,
    image: Tensor,
    text: Tensor,
    type_embedding: Tensor,
    image_position: Tensor,
    text_position: Tensor,
    weight: Tensor,
    bias: Tensor,
    source: Tensor,
    eps: float,
) -> Tensor:
    """LayerNorm(token + type + position) of the rows `source` [T] of the join of the three kinds -> [T, D].

    The join holds fusion_tokens [F, D], then image [Bi*Ni, D], then text [Bt*L, D]; a fusion token has a type
    and no position.
    """
    tensors = (fusion_tokens, image, text, type_embedding, image_position, text_position, weight, bias)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    fusion_tokens, image, text, types, image_position, text_position, weight, bias = (
        t.to(accumulation_dtype(dtype)) for t in tensors
    )
    join = torch.cat(
        (
            fusion_tokens + types[0],
            (image + image_position + types[1]).flatten(0, 1),
            (text + text_position + types[2]).flatten(0, 1),
        )
    )
    return layer_norm(join[source], weight.shape, weight, bias, eps).to(dtype)
