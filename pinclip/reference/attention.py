"""Multi-head attention in plain PyTorch: dense or varlen, padded, causal, with qk-norm and RoPE.

Shapes: B batch, N tokens (Nq queries, Nk keys), H heads, D head dim, S segments, T tokens of all segments.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class QKNorm:
    """RMS norm of every query and key head before the scores: q <- q / sqrt(mean(q^2) + eps) * weight.

    q_weight, k_weight: [D], shared by the heads.
    """

    q_weight: Tensor
    k_weight: Tensor
    eps: float = 1e-6


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a result of `dtype` is computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] -> x / sqrt(mean_d(x^2) + eps) * weight, computed in fp32 or fp64."""
    wide = x.to(accumulation_dtype(x.dtype))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    x [..., N, H, D]; cos, sin [N, D/2], one row per token.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    cos, sin = cos.to(wide.dtype).unsqueeze(-2), sin.to(wide.dtype).unsqueeze(-2)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def segment_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Position of each of the T tokens inside its own segment, int64 [T]; empty segments own no token."""
    token = torch.arange(total, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return token - cu_seqlens.long()[segment]


def attention(
    q_or_qkv: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    qk_norm: QKNorm | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v per head; see pinclip.ops.attention for shapes and conventions.

    Memory O(B H Nq Nk).  A varlen call is one dense call per segment, joined: slow, and plainly right.
    """
    q, k, v = (q_or_qkv.unbind(-3)) if k is None else (q_or_qkv, k, v)
    if key_lengths is not None:
        # Whatever stands in the padding, NaN included, must reach neither the values nor the gradients.
        real = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
        k, v = (t.masked_fill(~real[:, :, None, None], 0.0) for t in (k, v))
    if qk_norm is not None:
        q, k = rms_norm(q, qk_norm.q_weight, qk_norm.eps), rms_norm(k, qk_norm.k_weight, qk_norm.eps)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is None:
        if rope is not None:
            q, k = (rotate(t, *(table[: t.shape[1]] for table in rope)) for t in (q, k))
        return dense_attention(q, k, v, causal, key_lengths, scale)
    if rope is not None:
        position = segment_positions(cu_seqlens, q.shape[0])
        q, k = (rotate(t, *(table[position] for table in rope)) for t in (q, k))
    segments = [slice(*bounds) for bounds in pairwise(cu_seqlens.tolist())]
    parts = [dense_attention(q[None, s], k[None, s], v[None, s], causal, None, scale)[0] for s in segments]
    return torch.cat([q.new_zeros(0, q.shape[1] * q.shape[2]), *parts])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_lengths: Tensor | None, scale: float
) -> Tensor:
    """q [B, Nq, H, D], k, v [B, Nk, H, D] -> [B, Nq, H*D]; a row without keys gives 0."""
    dtype = q.dtype
    q, k, v = (t.to(accumulation_dtype(dtype)).transpose(1, 2) for t in (q, k, v))
    keep = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        keep = keep.tril()
    if key_lengths is not None:
        real = torch.arange(k.shape[2], device=q.device) < key_lengths[:, None]
        keep = keep & real[:, None, None, :]
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~keep, -torch.inf)
    seen = keep.any(-1, keepdim=True)
    # An unseen row would be softmax of nothing but -inf: NaN, in the value and the gradient.
    probability = torch.softmax(scores.masked_fill(~seen, 0.0), dim=-1).masked_fill(~seen, 0.0)
    return (probability @ v).transpose(1, 2).flatten(2).to(dtype)
