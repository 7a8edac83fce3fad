"""Multi-head attention over packed qkv, dense or varlen, and over separate q, k, v.

B batch, N tokens (Nq queries, Nk keys), H heads, Dh head dim, S segments, T tokens of all segments.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pinclip.ops import _attention_cpu as cpu
from pinclip.ops._checks import (
    autocast,
    check_alike,
    check_device,
    check_float,
    check_key_lengths,
    check_shape,
    require,
    without_autocast,
)
from pinclip.reference.attention import QKNorm, accumulation_dtype, rms_norm, rotate, segment_positions

__all__ = ["QKNorm", "attention"]

# cuDNN's is left out: with a mask and N % 128 == 64 its dQ is NaN where a row's logsumexp is below -88
# (pytorch#196678).
_CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    """softmax(scale q k^T + mask) v, per head.

    Three layouts, all with the heads joined in the result:
      packed     qkv [B, N, 3, H, Dh]                         -> [B, N, H*Dh]
      varlen     qkv [T, 3, H, Dh] and cu_seqlens             -> [T, H*Dh]; a token sees its own segment only
      separate   q [B, Nq, H, Dh], k and v [B, Nk, H, Dh]     -> [B, Nq, H*Dh]

    cu_seqlens   int32 [S+1], ascending from 0 to T; a segment may be empty.
    max_seqlen   longest segment; give it on CUDA, where reading it waits for the device,
                 and is not possible under torch.compile(fullgraph=True).
    causal       query i sees the keys 0..i; needs Nq = Nk.
    key_lengths  int32 or int64 [B] (not with varlen): row b sees its first key_lengths[b] keys.  Keys and
                 values beyond them are not read, may hold anything, and have zero gradient.  Every query is
                 computed.  A row without keys gives 0 and has zero gradient.
    qk_norm      RMS norm of every query and key head, before the rotation.
    rope         (cos, sin), each [at least N, Dh/2]: half-split rotation of queries and keys by their
                 position in the sequence or segment; the tables get no gradient.
    scale        default Dh^-0.5.

    Any floating dtype; scores and softmax accumulate in fp32, or in fp64 for fp64 inputs.  Under autocast the
    inputs are cast as for scaled_dot_product_attention.  Gradients: q, k, v and the norms.  Deterministic.
    Extra memory: one number per query and head; qk_norm and rope keep copies of q and k.  Collectives: none.
    Raises ValueError for shapes, dtypes, devices and combinations other than these.
    Source: arXiv 1706.03762; the one-pass softmax of arXiv 2205.14135; RoPE arXiv 2104.09864.
    """
    _check(q_or_qkv, k, v, cu_seqlens, causal, key_lengths, qk_norm, rope)
    packed = k is None
    tensors = autocast(q_or_qkv) if packed else autocast(q_or_qkv, k, v)
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else float(scale)
    if qk_norm is not None or rope is not None:
        q, k, v = tensors[0].unbind(-3) if packed else tensors
        q, k = _norm_and_rotate(q, k, cu_seqlens, qk_norm, rope)
        tensors = (torch.stack((q, k, v), dim=-3),) if packed else (q, k, v)
    if tensors[0].device.type != "cpu":  # until a kernel for the device is registered with the ops below
        return _composed(tensors, cu_seqlens, max_seqlen, key_lengths, causal, scale)
    if packed:
        return _attention(*tensors, cu_seqlens, max_seqlen, key_lengths, causal, scale)[0]
    return _cross_attention(*tensors, key_lengths, causal, scale)[0]


def _check(q_or_qkv, k, v, cu_seqlens, causal, key_lengths, qk_norm, rope) -> None:
    first = "qkv" if k is None else "q"
    check_float(first, q_or_qkv)
    if k is None:
        require(v is None, "v", "be given together with k", "given alone")
        if cu_seqlens is None:
            check_shape("qkv", q_or_qkv, (None, None, 3, None, None), "[B, N, 3, H, Dh]")
            longest = q_or_qkv.shape[1]
        else:
            check_shape("qkv", q_or_qkv, (None, 3, None, None), "[T, 3, H, Dh]")
            longest = 0
    else:
        require(v is not None, "v", "be given together with k", "None")
        require(cu_seqlens is None, "cu_seqlens", "be None for separate q, k, v", "given")
        check_shape("q", q_or_qkv, (None, None, None, None), "[B, Nq, H, Dh]")
        batch, queries, heads, width = q_or_qkv.shape
        check_shape("k", k, (batch, None, heads, width), "[B, Nk, H, Dh]")
        check_shape("v", v, tuple(k.shape), "[B, Nk, H, Dh]")
        check_alike("q", q_or_qkv, k=k, v=v)
        square = queries == k.shape[1]
        require(square or not causal, "causal", f"be False for Nq {queries} and Nk {k.shape[1]}", causal)
        longest = max(queries, k.shape[1])
    if cu_seqlens is not None:
        require(cu_seqlens.dtype == torch.int32, "cu_seqlens", "be an int32 tensor", cu_seqlens.dtype)
        check_shape("cu_seqlens", cu_seqlens, (None,), "[S+1]")
        require(cu_seqlens.shape[0] >= 1, "cu_seqlens", "have at least one element", list(cu_seqlens.shape))
        check_device(first, q_or_qkv, cu_seqlens=cu_seqlens)
    if key_lengths is not None:
        require(cu_seqlens is None, "key_lengths", "be None for varlen attention", "given")
        check_key_lengths(key_lengths, q_or_qkv.shape[0], first, q_or_qkv)
    width = q_or_qkv.shape[-1]
    if qk_norm is not None:
        for name in ("q_weight", "k_weight"):
            check_shape(f"qk_norm.{name}", getattr(qk_norm, name), (width,), "[Dh]")
    if rope is not None:
        require(width % 2 == 0, "Dh", "be even for rope", width)
        for name, table in zip(("cos", "sin"), rope):
            check_shape(f"rope {name}", table, (None, width // 2), "[N, Dh/2]")
            require(table.shape[0] >= longest, f"rope {name}", f"have {longest} rows or more", table.shape[0])


def _norm_and_rotate(q, k, cu_seqlens, qk_norm, rope) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised and rotated, in plain differentiable torch."""
    if qk_norm is not None:
        q, k = rms_norm(q, qk_norm.q_weight, qk_norm.eps), rms_norm(k, qk_norm.k_weight, qk_norm.eps)
    if rope is None:
        return q, k
    if cu_seqlens is None:
        return tuple(rotate(t, *(table[: t.shape[1]] for table in rope)) for t in (q, k))
    position = segment_positions(cu_seqlens, q.shape[0])
    cos, sin = (table[position] for table in rope)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _composed(tensors, cu_seqlens, max_seqlen, key_lengths, causal, scale) -> Tensor:
    """The same from torch's own scaled_dot_product_attention, for devices without a kernel of ours.

    Varlen is padded to [S, max_seqlen].  Extra memory: the padded copies, and the mask [B, N, N] where causal
    and padded.
    """
    q, k, v = tensors[0].unbind(-3) if len(tensors) == 1 else tensors
    if cu_seqlens is not None:
        key_lengths = cu_seqlens.diff()
        longest = int(key_lengths.max()) if max_seqlen is None else max_seqlen
        token = torch.arange(q.shape[0], device=q.device)
        segment = torch.searchsorted(cu_seqlens, token.int(), right=True) - 1
        slot = segment * longest + token - cu_seqlens[segment]
        shape = (key_lengths.shape[0], longest)
        q, k, v = (
            t.new_zeros(shape[0] * longest, *t.shape[1:]).index_copy(0, slot, t).unflatten(0, shape)
            for t in (q, k, v)
        )
    mask = None
    if key_lengths is not None:
        real = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
        k, v = (t.masked_fill(~real[:, :, None, None], 0.0) for t in (k, v))
        # A row without keys looks at one key and value of zero, and so gets zero: some SDPA kernels give NaN.
        mask = real.index_fill(1, real.new_zeros(1, dtype=torch.int64), True)[:, None, None, :]
        if causal:
            mask = mask & torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    causal = causal and mask is None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(_CUDA_BACKENDS):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    out = out.transpose(1, 2).flatten(2)
    return out if cu_seqlens is None else out.flatten(0, 1).index_select(0, slot)


@torch.library.custom_op("pinclip::attention", mutates_args=(), device_types="cpu")
@without_autocast
def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """-> the result, and each row's logsumexp [.., H] for the backward pass."""
    _check_on_host(qkv.shape[0] if cu_seqlens is not None else qkv.shape[1], cu_seqlens, key_lengths)
    out, lse = cpu.forward((_rows(qkv),), cu_seqlens, key_lengths, causal, scale)
    return out.flatten(-2), lse


@_attention.register_fake
def _(qkv, cu_seqlens, max_seqlen, key_lengths, causal, scale):
    out, lse = _empty_result(qkv.select(-3, 0))
    return out.flatten(-2), lse


@torch.library.custom_op("pinclip::attention_backward", mutates_args=(), device_types="cpu")
@without_autocast
def _attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    grad_out, out = (_rows(t).unflatten(-1, qkv.shape[-2:]) for t in (grad_out, out))
    return cpu.backward(grad_out, (_rows(qkv),), out, lse, cu_seqlens, key_lengths, causal, scale)[0]


@_attention_backward.register_fake
def _(grad_out, qkv, out, lse, cu_seqlens, max_seqlen, key_lengths, causal, scale):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_packed(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, key_lengths, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, key_lengths)


def _packed_gradient(ctx, grad_out, _grad_lse):
    qkv, out, lse, cu_seqlens, key_lengths = ctx.saved_tensors
    grad = _attention_backward(
        grad_out, qkv, out, lse, cu_seqlens, ctx.max_seqlen, key_lengths, ctx.causal, ctx.scale
    )
    return grad, None, None, None, None, None


_attention.register_autograd(_packed_gradient, setup_context=_save_packed)


@torch.library.custom_op("pinclip::cross_attention", mutates_args=(), device_types="cpu")
@without_autocast
def _cross_attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """-> the result, and each row's logsumexp [B, Nq, H] for the backward pass."""
    _check_on_host(k.shape[1], None, key_lengths)
    out, lse = cpu.forward((_rows(q), _rows(k), _rows(v)), None, key_lengths, causal, scale)
    return out.flatten(-2), lse


@_cross_attention.register_fake
def _(q, k, v, key_lengths, causal, scale):
    out, lse = _empty_result(q)
    return out.flatten(-2), lse


@torch.library.custom_op("pinclip::cross_attention_backward", mutates_args=(), device_types="cpu")
@without_autocast
def _cross_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, out = (_rows(t).unflatten(-1, q.shape[-2:]) for t in (grad_out, out))
    return cpu.backward(grad_out, (_rows(q), _rows(k), _rows(v)), out, lse, None, key_lengths, causal, scale)


@_cross_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, key_lengths, causal, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save_separate(ctx, inputs, output) -> None:
    q, k, v, key_lengths, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, key_lengths)


def _separate_gradients(ctx, grad_out, _grad_lse):
    q, k, v, out, lse, key_lengths = ctx.saved_tensors
    grads = _cross_attention_backward(grad_out, q, k, v, out, lse, key_lengths, ctx.causal, ctx.scale)
    return *grads, None, None, None


_cross_attention.register_autograd(_separate_gradients, setup_context=_save_separate)


def _empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the result [.., H, Dh] and the logsumexp [.., H]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check_on_host(size: int, cu_seqlens: Tensor | None, key_lengths: Tensor | None) -> None:
    """The values of cu_seqlens ascend from 0 to `size`; those of key_lengths are in [0, size]."""
    if cu_seqlens is not None:
        ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        ascends = ends == (0, size) and bool((cu_seqlens.diff() >= 0).all())
        require(ascends, "cu_seqlens", f"ascend from 0 to {size}", cu_seqlens.tolist())
    if key_lengths is not None and key_lengths.numel():
        fits = int(key_lengths.min()) >= 0 and int(key_lengths.max()) <= size
        require(fits, "key_lengths", f"be in [0, {size}]", key_lengths.tolist())
