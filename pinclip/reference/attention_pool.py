"""Attention pooling of tokens by constant probes, in plain PyTorch, in both forms.

Shapes: B batch, N tokens, D width, H heads, E = D/H head dim, P probes.
"""

import torch
from torch import Tensor

from pinclip.reference.attention import accumulation_dtype, dense_attention


def attention_pool(
    x: Tensor,
    q: Tensor,
    w_k: Tensor,
    b_k: Tensor,
    w_v: Tensor,
    b_v: Tensor,
    *,
    num_heads: int,
    key_lengths: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    form: str = "standard",
) -> Tensor:
    """softmax(q K^T / sqrt(E)) V per head with K = x w_k^T + b_k and V = x w_v^T + b_v.

    x [B, N, D]; q [P, D] projected probes; w_k, w_v [D, D]; b_k, b_v [D] -> [B, P, D], before any output
    projection.  norm (weight [D], bias [D], eps): of LayerNorm(x) instead of x.
    form "absorbed" computes the same without forming K and V; see pinclip.ops.attention_pool.
    """
    dtype = x.dtype
    wide = accumulation_dtype(dtype)
    x, q, w_k, b_k, w_v, b_v = (t.to(wide) for t in (x, q, w_k, b_k, w_v, b_v))
    if key_lengths is not None:
        padding = torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]
        x = x.masked_fill(padding[..., None], 0.0)
    if norm is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[2:], norm[0].to(wide), norm[1].to(wide), norm[2])
    pooled = {"standard": _standard, "absorbed": _absorbed}[form]
    return pooled(x, q, w_k, b_k, w_v, b_v, num_heads, key_lengths).to(dtype)


def _standard(x, q, w_k, b_k, w_v, b_v, num_heads, key_lengths):
    key = (x @ w_k.T + b_k).unflatten(-1, (num_heads, -1))
    value = (x @ w_v.T + b_v).unflatten(-1, (num_heads, -1))
    query = q.unflatten(-1, (num_heads, -1)).expand(x.shape[0], -1, -1, -1)
    return dense_attention(query, key, value, False, key_lengths, query.shape[-1] ** -0.5)


def _absorbed(x, q, w_k, b_k, w_v, b_v, num_heads, key_lengths):
    q_PHE = q.unflatten(-1, (num_heads, -1))
    w_k_HED, w_v_HED = w_k.unflatten(0, (num_heads, -1)), w_v.unflatten(0, (num_heads, -1))
    # q.b_k is the same for every token of a row, so the softmax does not see it.
    u_PHD = torch.einsum("phe,hed->phd", q_PHE, w_k_HED) * q_PHE.shape[-1] ** -0.5
    scores = torch.einsum("bnd,phd->bphn", x, u_PHD)
    if key_lengths is not None:
        empty = (key_lengths == 0)[:, None, None]
        padding = torch.arange(x.shape[1], device=x.device) >= key_lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None, :] & ~empty[..., None], -torch.inf)
    z = torch.einsum("bphn,bnd->bphd", torch.softmax(scores, -1), x)
    # The probabilities sum to one, so the value bias is added whole.
    pooled = torch.einsum("bphd,hed->bphe", z, w_v_HED).flatten(2) + b_v
    return pooled if key_lengths is None else pooled.masked_fill(empty, 0.0)
