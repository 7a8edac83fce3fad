"""Multi-head attention over packed qkv, dense or varlen, and over separate q, k, v.

B batch, N tokens (Nq queries, Nk keys), H heads, Dh head dim, S segments, T tokens of all segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pinclip.ops import _attention_cpu as cpu
from pinclip.ops import _attention_dispatch as dispatch
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

__all__ = ["AttentionPlan", "QKNorm", "attention", "attention_plan"]


class AttentionPlan(NamedTuple):
    """Which segments share a tile of the GPU kernels, from `attention_plan`."""

    tiles: Tensor
    starts: Tensor
    max_seqlen: int


def attention_plan(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> AttentionPlan | None:
    """What varlen attention of our GPU kernels derives from the segments, to be made once for all layers.

    cu_seqlens, max_seqlen as in `attention`; tokens: T.  None where our kernels never run, as on a CPU.
    Two or three small kernels, without waiting for the device.  Extra memory: int32 [T] and about [S].
    Raises ValueError for other shapes and dtypes.
    """
    _check_cu_seqlens(cu_seqlens)
    require(tokens >= 0 and max_seqlen >= 0, "tokens, max_seqlen", "be 0 or more", (tokens, max_seqlen))
    if _architecture(cu_seqlens.device.type, cu_seqlens.device.index) not in dispatch.ARCHS:
        return None
    return AttentionPlan(*_attention_plan(cu_seqlens, tokens, max_seqlen), max_seqlen)


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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v, per head.

    Three layouts, all with the heads joined in the result:
      packed     qkv [B, N, 3, H, Dh]                         -> [B, N, H*Dh]
      varlen     qkv [T, 3, H, Dh] and cu_seqlens             -> [T, H*Dh]; a token sees its own segment only
      separate   q [B, Nq, H, Dh], k and v [B, Nk, H, Dh]     -> [B, Nq, H*Dh]

    cu_seqlens   int32 [S+1], ascending from 0 to T; a segment may be empty.
    max_seqlen   longest segment, or more; give it on CUDA, where reading it waits for the device, and is not
                 possible under torch.compile(fullgraph=True).  There neither it nor cu_seqlens is checked:
                 what a segment has beyond max_seqlen is undefined.
    causal       query i sees the keys 0..i; needs Nq = Nk.
    key_lengths  int32 or int64 [B] (not with varlen): row b sees its first key_lengths[b] keys.  Keys and
                 values beyond them are not read, may hold anything, and have zero gradient.  Every query is
                 computed.  A row without keys gives 0 and has zero gradient.
    qk_norm      RMS norm of every query and key head, before the rotation.
    rope         (cos, sin), each [at least N, Dh/2]: half-split rotation of queries and keys by their
                 position in the sequence or segment; the tables get no gradient.
    scale        default Dh^-0.5.
    plan         of these cu_seqlens, from `attention_plan`, with their max_seqlen: made once for all layers.

    Any floating dtype; scores and softmax accumulate in fp32, or in fp64 for fp64 inputs.  Under autocast the
    inputs are cast as for scaled_dot_product_attention.  Gradients: q, k, v and the norms.
    On CUDA short sequences run our kernels, others SDPA's: docs/attention.md has the table.
    Deterministic on a CPU and in our kernels; SDPA's backward under torch.use_deterministic_algorithms(True).
    Extra memory: one number per query and head; with qk_norm or rope copies of q and k, but in our kernels.
    Collectives: none.
    Raises ValueError for shapes, dtypes, devices and combinations other than these.
    Source: arXiv 1706.03762; the one-pass softmax of arXiv 2205.14135; RoPE arXiv 2104.09864.
    """
    _check(q_or_qkv, k, v, cu_seqlens, causal, key_lengths, qk_norm, rope)
    if plan is not None:
        max_seqlen = plan.max_seqlen if max_seqlen is None else max_seqlen
        _check_plan(plan, q_or_qkv, cu_seqlens, max_seqlen)
    packed = k is None
    tensors = autocast(q_or_qkv) if packed else autocast(q_or_qkv, k, v)
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else float(scale)
    on_cpu = tensors[0].device.type == "cpu"
    normed = qk_norm is not None or rope is not None
    arch = _architecture(tensors[0].device.type, tensors[0].device.index)
    if arch and cu_seqlens is not None and max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    ours = arch > 0 and _choose(tensors, arch, max_seqlen, cu_seqlens, key_lengths, causal, normed).ours
    norm = (None, None, 0.0, None, None)
    if normed and ours and arch >= 90:
        norm = _norm_arguments(qk_norm, rope)
    elif normed:
        q, k, v = tensors[0].unbind(-3) if packed else tensors
        if qk_norm is not None and key_lengths is not None:
            # What stands in the padding must not reach the gradient of the norm's weight.
            real = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
            k = k.masked_fill(~real[:, :, None, None], 0.0)
        q, k = _norm_and_rotate(q, k, cu_seqlens, qk_norm, rope)
        tensors = (torch.stack((q, k, v), dim=-3),) if packed else (q, k, v)
    if not (on_cpu or ours):
        return _composed(tensors, cu_seqlens, max_seqlen, key_lengths, causal, scale)
    if packed:
        tiles = starts = None
        if ours and cu_seqlens is not None and (max_seqlen <= dispatch.SHARED or rope is not None):
            tiles, starts, _ = plan or attention_plan(cu_seqlens, q_or_qkv.shape[0], max_seqlen)
        segments = cu_seqlens, max_seqlen, tiles, starts
        return _attention(*tensors, *segments, key_lengths, causal, scale, *norm)[0]
    return _cross_attention(*tensors, key_lengths, causal, scale, *norm)[0]


@torch.compiler.assume_constant_result
def _architecture(device_type: str, index: int | None) -> int:
    """The compute capability of a CUDA device, 90 for sm_90; 0 for other devices."""
    if device_type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _choose(tensors, arch, max_seqlen, cu_seqlens, key_lengths, causal, normed) -> dispatch.Row:
    first, last = tensors[0], tensors[-1]
    varlen = cu_seqlens is not None
    queries, keys = (max_seqlen, max_seqlen) if varlen else (first.shape[1], last.shape[1])
    call = dispatch.Call(
        dtype=first.dtype,
        arch=arch,
        width=first.shape[-1],
        queries=queries,
        keys=keys,
        causal=causal,
        varlen=varlen,
        padded=key_lengths is not None,
        normed=normed,
    )
    return dispatch.choose(call)


def _norm_arguments(qk_norm, rope) -> tuple:
    """Norm and rotation as our kernels take them: fp32 and contiguous."""
    weights, eps = (None, None), 0.0
    if qk_norm is not None:
        weights, eps = (
            (w.float().contiguous() for w in (qk_norm.q_weight, qk_norm.k_weight)),
            float(qk_norm.eps),
        )
    tables = (None, None) if rope is None else (table.float().contiguous() for table in rope)
    return *weights, eps, *tables


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
        keys = k.shape[1]
        fits = queries == keys or not causal
        require(fits, "causal", "be False for Nq {nq} and Nk {nk}", causal, nq=queries, nk=keys)
        longest = max(queries, k.shape[1])
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens)
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
            rows = table.shape[0]
            require(rows >= longest, f"rope {name}", "have {n} rows or more", rows, n=longest)


def _check_cu_seqlens(cu_seqlens) -> None:
    require(cu_seqlens.dtype == torch.int32, "cu_seqlens", "be an int32 tensor", cu_seqlens.dtype)
    check_shape("cu_seqlens", cu_seqlens, (None,), "[S+1]")
    require(cu_seqlens.shape[0] >= 1, "cu_seqlens", "have at least one element", list(cu_seqlens.shape))


def _check_plan(plan, qkv, cu_seqlens, max_seqlen) -> None:
    require(cu_seqlens is not None, "plan", "be None without cu_seqlens", "given")
    planned = plan.max_seqlen
    require(planned == max_seqlen, "plan", "be of max_seqlen {longest}", planned, longest=max_seqlen)
    check_shape("plan's starts", plan.starts, (qkv.shape[0],), "[T]")
    check_device("qkv", qkv, **{"plan's starts": plan.starts})


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
    arch = _architecture(q.device.type, q.device.index)
    with sdpa_kernel(_backends(arch, mask is not None, q.shape[2]), set_priority=True):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    out = out.transpose(1, 2).flatten(2)
    return out if cu_seqlens is None else out.flatten(0, 1).index_select(0, slot)


def _backends(arch: int, masked: bool, queries: int) -> list[SDPBackend]:
    """SDPA's kernels, the preferred one first.

    On sm_90 cuDNN's are the fastest (published: 1.7 to 2.3 times FlashAttention 2 in training, and slower on
    other architectures: transformers#48163), but wrong with a mask at N % 128 == 64, where dQ is NaN if a
    row's logsumexp is below -88 (pytorch#196678), and at one query, where dK and dV are NaN
    (cudnn-frontend#1072).
    """
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *others] if arch == 90 and not masked and queries > 1 else others


@torch.library.custom_op("pinclip::attention_plan", mutates_args=())
def _attention_plan(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """-> the bounds of the tiles, none where segments are too long to share one, and the starts of the
    segments of all tokens."""
    from pinclip_kernels.triton._attention_plan import plan

    with torch.cuda.device_of(cu_seqlens):
        return plan(cu_seqlens, tokens, max_seqlen)


@_attention_plan.register_fake
def _(cu_seqlens, tokens, max_seqlen):
    from pinclip_kernels.triton._attention_plan import plan_sizes

    _, most, rows = plan_sizes(cu_seqlens.shape[0] - 1, tokens, max_seqlen)
    return cu_seqlens.new_empty(most + 1 if rows else 0), cu_seqlens.new_empty(tokens)


@torch.library.custom_op("pinclip::attention", mutates_args=())
@without_autocast
def _attention(
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    tiles: Tensor | None,
    starts: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> the result, and each row's logsumexp [.., H] for the backward pass.

    Norm and rotation, fp32, are for our kernels only."""
    if _runs_kernels(qkv):
        norm = q_weight, k_weight, eps, cos, sin
        segments = cu_seqlens, max_seqlen, tiles, starts
        problem = _problem(qkv.unbind(-3), *segments, key_lengths, causal, scale, *norm)
        return _forward(problem, qkv.select(-3, 0))
    assert q_weight is None and cos is None
    _check_on_host(qkv.shape[0] if cu_seqlens is not None else qkv.shape[1], cu_seqlens, key_lengths)
    out, lse = cpu.forward((_rows(qkv),), cu_seqlens, key_lengths, causal, scale)
    return out.flatten(-2), lse


@_attention.register_fake
def _(qkv, *_):
    out, lse = _empty_result(qkv.select(-3, 0))
    return out.flatten(-2), lse


@torch.library.custom_op("pinclip::attention_backward", mutates_args=())
@without_autocast
def _attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    tiles: Tensor | None,
    starts: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of qkv and of the norm's weights, which are empty without a norm."""
    if _runs_kernels(qkv):
        norm = q_weight, k_weight, eps, cos, sin
        segments = cu_seqlens, max_seqlen, tiles, starts
        problem = _problem(qkv.unbind(-3), *segments, key_lengths, causal, scale, *norm)
        grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        return grad, *_backward(problem, grad_out, out, lse, grad.unbind(-3))
    grad_out, out = (_rows(t).unflatten(-1, qkv.shape[-2:]) for t in (grad_out, out))
    (grad,) = cpu.backward(grad_out, (_rows(qkv),), out, lse, cu_seqlens, key_lengths, causal, scale)
    return grad, lse.new_empty(0), lse.new_empty(0)


@_attention_backward.register_fake
def _(
    grad_out,
    qkv,
    out,
    lse,
    cu_seqlens,
    max_seqlen,
    tiles,
    starts,
    key_lengths,
    causal,
    scale,
    q_weight=None,
    *rest,
):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), *_empty_weights(lse, q_weight)


def _save_packed(ctx, inputs, output) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, tiles, starts, key_lengths, ctx.causal, ctx.scale, *norm = inputs
    q_weight, k_weight, ctx.eps, cos, sin = norm
    segments = cu_seqlens, tiles, starts
    ctx.save_for_backward(qkv, *output, *segments, key_lengths, q_weight, k_weight, cos, sin)


def _packed_gradient(ctx, grad_out, _grad_lse):
    qkv, out, lse, cu_seqlens, tiles, starts, key_lengths, q_weight, k_weight, cos, sin = ctx.saved_tensors
    masks = cu_seqlens, ctx.max_seqlen, tiles, starts, key_lengths, ctx.causal, ctx.scale
    norm = q_weight, k_weight, ctx.eps, cos, sin
    grad, *weights = _attention_backward(grad_out, qkv, out, lse, *masks, *norm)
    return grad, *[None] * len(masks), *_of_norm(weights, q_weight)


_attention.register_autograd(_packed_gradient, setup_context=_save_packed)


@torch.library.custom_op("pinclip::cross_attention", mutates_args=())
@without_autocast
def _cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> the result, and each row's logsumexp [B, Nq, H] for the backward pass; norm as in `_attention`."""
    if _runs_kernels(q):
        norm = q_weight, k_weight, eps, cos, sin
        problem = _problem((q, k, v), *[None] * 4, key_lengths, causal, scale, *norm)
        return _forward(problem, q)
    assert q_weight is None and cos is None
    _check_on_host(k.shape[1], None, key_lengths)
    out, lse = cpu.forward((_rows(q), _rows(k), _rows(v)), None, key_lengths, causal, scale)
    return out.flatten(-2), lse


@_cross_attention.register_fake
def _(q, *_):
    out, lse = _empty_result(q)
    return out.flatten(-2), lse


@torch.library.custom_op("pinclip::cross_attention_backward", mutates_args=())
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
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v and of the norm's weights, which are empty without a norm."""
    if _runs_kernels(q):
        norm = q_weight, k_weight, eps, cos, sin
        problem = _problem((q, k, v), *[None] * 4, key_lengths, causal, scale, *norm)
        grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        return *grads, *_backward(problem, grad_out, out, lse, grads)
    grad_out, out = (_rows(t).unflatten(-1, q.shape[-2:]) for t in (grad_out, out))
    tensors = _rows(q), _rows(k), _rows(v)
    grads = cpu.backward(grad_out, tensors, out, lse, None, key_lengths, causal, scale)
    return *grads, lse.new_empty(0), lse.new_empty(0)


@_cross_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, key_lengths, causal, scale, q_weight=None, *rest):
    grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return *grads, *_empty_weights(lse, q_weight)


def _save_separate(ctx, inputs, output) -> None:
    q, k, v, key_lengths, ctx.causal, ctx.scale, *norm = inputs
    q_weight, k_weight, ctx.eps, cos, sin = norm
    ctx.save_for_backward(q, k, v, *output, key_lengths, q_weight, k_weight, cos, sin)


def _separate_gradients(ctx, grad_out, _grad_lse):
    q, k, v, out, lse, key_lengths, q_weight, k_weight, cos, sin = ctx.saved_tensors
    norm = q_weight, k_weight, ctx.eps, cos, sin
    grads = _cross_attention_backward(grad_out, q, k, v, out, lse, key_lengths, ctx.causal, ctx.scale, *norm)
    return *grads[:3], None, None, None, *_of_norm(grads[3:], q_weight)


_cross_attention.register_autograd(_separate_gradients, setup_context=_save_separate)


def _runs_kernels(x: Tensor) -> bool:
    """Whether an op runs our kernels; `attention` sends nothing else to it on a GPU."""
    return _architecture(x.device.type, x.device.index) > 0


def _problem(heads, cu_seqlens, max_seqlen, tiles, starts, key_lengths, causal, scale, *norm):
    from pinclip_kernels.triton.attention import Norm, Problem

    segments = cu_seqlens, max_seqlen, tiles, starts
    with torch.cuda.device_of(heads[0]):
        return Problem(*heads, *segments, key_lengths, causal, scale, Norm(*norm))


def _forward(problem, q: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _empty_result(q)
    with torch.cuda.device_of(q):
        problem.forward(out, lse)
    return out.flatten(-2), lse


def _backward(problem, grad_out: Tensor, out: Tensor, lse: Tensor, grads) -> tuple[Tensor, Tensor]:
    """Writes the gradients; returns those of the norm's weights."""
    with torch.cuda.device_of(grad_out):
        return problem.backward(grad_out.contiguous(), out, lse, *grads)


def _of_norm(weights, q_weight: Tensor | None) -> tuple:
    """The gradients of q_weight, k_weight, eps, cos and sin."""
    return (*((None, None) if q_weight is None else weights), None, None, None)


def _empty_weights(lse: Tensor, q_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (0,) if q_weight is None else q_weight.shape
    return lse.new_empty(shape), lse.new_empty(shape)


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
