"""Attention from the layout a model really has: packed qkv, dense or varlen; peers are charged for their
copies.

u = B N H Dh numbers: forward reads 3 u and writes 1, backward reads 5 (q, k, v, the result and its gradient)
and writes 3. Operations: 4 N² Dh per head forward, 2.5 times as many backward; half of it where causal.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib import import_module
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.registry import BOTH, Arm, Op, Problem, Shape, Unsupported, Work, compiled, dtype_of
from pinclip.ops import _attention_dispatch as dispatch
from pinclip.ops.attention import QKNorm, attention, attention_plan
from pinclip.reference.attention import attention as reference_attention
from pinclip.reference.attention import rms_norm, rotate

_GATE_BATCH = 4


@functools.lru_cache(maxsize=64)
def _lengths(batch: int, n: int, mean: int, image: int) -> tuple[int, ...]:
    """Text lengths in 1 … n of about this mean, geometric as captions are: many short, few long; with `image`
    tokens before each text, in 16 … n - image."""
    generator = torch.Generator().manual_seed(7)
    drawn = -torch.log(torch.rand(batch, generator=generator)) * 0.7 * mean + 0.3 * mean
    return tuple((image + drawn.long().clamp(16 if image else 1, n - image)).tolist())


def lengths(shape: Shape) -> tuple[int, ...]:
    if not shape.mean:
        return (shape.n,) * shape.batch
    return _lengths(shape.batch, shape.n, shape.mean, shape.image)


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    """qkv [B, N, 3, H, Dh], or [T, 3, H, Dh] with cu_seqlens for kind "packed"; scores of standard deviation
    1.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    real = torch.tensor(lengths(shape), device=device)
    rows = (int(real.sum()),) if shape.kind == "packed" else (shape.batch, shape.n)
    qkv = torch.randn(*rows, 3, shape.h, shape.dh, generator=generator, device=device).to(dtype_of(shape))
    leaves, names, extra = [qkv.requires_grad_()], ["qkv"], {"lengths": real}
    if shape.kind == "packed":
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        extra["cu_seqlens"] = torch.cat((zero, real.cumsum(0).int()))
        extra["slot"] = _slots(real, shape.n)
    if shape.kind == "qk-norm + rope":
        angle = torch.arange(shape.n, device=device)[:, None] * 0.1 ** torch.arange(
            shape.dh // 2, device=device
        )
        extra["cos"], extra["sin"] = angle.cos(), angle.sin()
        for name in ("q_weight", "k_weight"):
            weight = 1 + 0.1 * torch.randn(shape.dh, generator=generator, device=device)
            leaves.append(weight.to(dtype_of(shape)).requires_grad_())
            names.append(name)
    return Problem(tuple(leaves), tuple(names), extra)


def _slots(real: Tensor, n: int) -> Tensor:
    """Where each packed token stands in the padded [B * N]."""
    padded = torch.arange(n, device=real.device) < real[:, None]
    return padded.flatten().nonzero().squeeze(1)


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "batch": min(shape.batch, _GATE_BATCH)})


def work(shape: Shape, mode: str) -> Work:
    tokens = sum(lengths(shape)) if shape.kind == "packed" else shape.batch * shape.n
    keys = [n * (n if shape.kind == "packed" else shape.n) for n in lengths(shape)]
    flops = 4.0 * sum(keys) * shape.h * shape.dh * (0.5 if shape.kind == "causal" else 1)
    if shape.kind == "padded":
        flops = 4.0 * shape.n * sum(lengths(shape)) * shape.h * shape.dh
    u = tokens * shape.h * shape.dh * dtype_of(shape).itemsize
    return Work(
        (3.5 if mode == BOTH else 1) * flops, (12 if mode == BOTH else 4) * u, shape.batch, "sequences"
    )


def _norm_and_rotate(q: Tensor, k: Tensor, weights, problem: Problem) -> tuple[Tensor, Tensor]:
    if not weights:
        return q, k
    tables = problem.extra["cos"], problem.extra["sin"]
    q, k = (rotate(rms_norm(t, w, 1e-6), *tables) for t, w in zip((q, k), weights))
    return q, k


def plain(shape: Shape, problem: Problem):
    """Scores, mask, softmax and product, each in the dtype of qkv."""

    def dense(q, k, v, keep):
        scores = (q * shape.dh**-0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        if keep is not None:
            scores = scores.masked_fill(~keep, -torch.inf)
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)

    def packed(qkv, *weights):
        parts = qkv.split(lengths(shape))
        return torch.cat([dense(*part[None].unbind(2), None)[0] for part in parts])

    def whole(qkv, *weights):
        q, k, v = qkv.unbind(2)
        q, k = _norm_and_rotate(q, k, weights, problem)
        keep = None
        if shape.kind == "causal":
            keep = torch.ones(shape.n, shape.n, dtype=torch.bool, device=qkv.device).tril()
        if shape.kind == "padded":
            keep = _real(shape, problem)[:, None, None, :]
        return dense(q, k, v, keep)

    return packed if shape.kind == "packed" else whole


def _real(shape: Shape, problem: Problem) -> Tensor:
    real = problem.extra["lengths"]
    return torch.arange(shape.n, device=real.device) < real[:, None]


def _arguments(shape: Shape, problem: Problem, weights) -> dict:
    extra = problem.extra
    if shape.kind == "packed":
        return {"cu_seqlens": extra["cu_seqlens"], "max_seqlen": max(lengths(shape))}
    if shape.kind == "padded":
        return {"key_lengths": extra["lengths"]}
    if weights:
        return {"qk_norm": QKNorm(*weights), "rope": (extra["cos"], extra["sin"])}
    return {"causal": shape.kind == "causal"}


def ours(shape: Shape, problem: Problem):
    return lambda qkv, *weights: attention(qkv, **_arguments(shape, problem, weights))


def planned(shape: Shape, problem: Problem):
    """Ours as in a tower: the plan of the segments is made once for all layers, and not counted here."""
    if shape.kind != "packed":
        raise Unsupported("only segments are planned")
    arguments = _arguments(shape, problem, ())
    plan = attention_plan(arguments["cu_seqlens"], sum(lengths(shape)), arguments["max_seqlen"])
    return lambda qkv: attention(qkv, **arguments, plan=plan)


def our_kernels(shape: Shape, problem: Problem):
    """Our kernels also where the dispatch table sends the shape to SDPA: a row that is wrong shows here."""
    if shape.dh not in dispatch._HEAD_DIMS or shape.n > dispatch._LONGEST:
        raise Unsupported("longer, or of another head dim, than the kernels take")
    module = import_module("pinclip.ops.attention")
    row = next(row for row in dispatch.TABLE if row.ours)

    def step(qkv, *weights):
        with mock.patch.object(module, "_choose", lambda *call: row):
            return attention(qkv, **_arguments(shape, problem, weights))

    return step


def reference(shape: Shape, problem: Problem):
    return lambda qkv, *weights: reference_attention(qkv, **_arguments(shape, problem, weights))


def _pad(qkv: Tensor, shape: Shape, problem: Problem) -> Tensor:
    """Packed tokens in a padded batch, which is what a kernel without varlen needs."""
    if shape.kind != "packed":
        return qkv
    padded = qkv.new_zeros(shape.batch * shape.n, *qkv.shape[1:]).index_copy(0, problem.extra["slot"], qkv)
    return padded.unflatten(0, (shape.batch, shape.n))


def _unpad(out: Tensor, shape: Shape, problem: Problem) -> Tensor:
    return out if shape.kind != "packed" else out.flatten(0, 1).index_select(0, problem.extra["slot"])


def sdpa(backend: SDPBackend | None = None):
    """torch's scaled_dot_product_attention; a packed batch is padded and masked for it."""

    def make(shape: Shape, problem: Problem):
        masked = shape.kind in ("padded", "packed")
        mask = _real(shape, problem)[:, None, None, :] if masked else None

        def step(qkv, *weights):
            q, k, v = _pad(qkv, shape, problem).unbind(2)
            q, k = _norm_and_rotate(q, k, weights, problem)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            causal = shape.kind == "causal"
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            return _unpad(out.transpose(1, 2).flatten(2), shape, problem)

        def forced(*leaves):
            try:
                with sdpa_kernel(backend):
                    return step(*leaves)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    raise Unsupported(f"no {backend.name.lower()} kernel for this shape") from None
                raise

        return step if backend is None else forced

    return make


def flex(shape: Shape, problem: Problem):
    """FlexAttention, compiled, with the mask of its kind as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    device = problem.leaves[0].device
    batch, n, mod = None, shape.n, None
    if shape.kind == "causal":

        def mod(b, h, i, j):
            return i >= j

    elif shape.kind == "padded":
        real, batch = problem.extra["lengths"], shape.batch

        def mod(b, h, i, j):
            return j < real[b]

    elif shape.kind == "packed":
        n = int(problem.extra["cu_seqlens"][-1])
        segment = torch.searchsorted(
            problem.extra["cu_seqlens"], torch.arange(n, device=device).int(), right=True
        )

        def mod(b, h, i, j):
            return segment[i] == segment[j]

    mask = None if mod is None else torch.compile(create_block_mask)(mod, batch, None, n, n, device=device)
    compiled_flex = torch.compile(flex_attention, dynamic=False)

    def step(qkv, *weights):
        qkv = qkv[None] if shape.kind == "packed" else qkv
        q, k, v = qkv.unbind(2)
        q, k = _norm_and_rotate(q, k, weights, problem)
        out = compiled_flex(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask)
        out = out.transpose(1, 2).flatten(2)
        return out[0] if shape.kind == "packed" else out

    return step


def _cumulative(shape: Shape, problem: Problem) -> Tensor:
    if shape.kind == "packed":
        return problem.extra["cu_seqlens"]
    device = problem.leaves[0].device
    return torch.arange(0, (shape.batch + 1) * shape.n, shape.n, dtype=torch.int32, device=device)


def _as_varlen(call, shape: Shape, problem: Problem):
    """A varlen function of q, k, v [T, H, Dh] on whichever layout there is; not for padding inside."""
    if shape.kind == "padded":
        raise Unsupported("varlen has no key padding inside a sequence")
    cu_seqlens, longest = _cumulative(shape, problem), max(lengths(shape))

    def step(qkv, *weights):
        q, k, v = qkv.unbind(-3)
        q, k = _norm_and_rotate(q, k, weights, problem)
        if shape.kind != "packed":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = call(q, k, v, cu_seqlens, longest).flatten(1)
        return out if shape.kind == "packed" else out.unflatten(0, (shape.batch, shape.n))

    return step


def torch_varlen(shape: Shape, problem: Problem):
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if shape.kind == "causal" else (-1, -1)
    return _as_varlen(
        lambda q, k, v, cu, n: varlen_attn(q, k, v, cu, cu, n, n, window_size=window), shape, problem
    )


def flash2(shape: Shape, problem: Problem):
    from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_func

    if shape.kind in ("dense", "causal"):
        return lambda qkv: flash_attn_qkvpacked_func(qkv, causal=shape.kind == "causal").flatten(2)
    return _as_varlen(lambda q, k, v, cu, n: flash_attn_varlen_func(q, k, v, cu, cu, n, n), shape, problem)


def flash3(shape: Shape, problem: Problem):
    from flash_attn_interface import flash_attn_varlen_func

    causal = shape.kind == "causal"
    return _as_varlen(
        lambda q, k, v, cu, n: flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=causal), shape, problem
    )


def flash4(shape: Shape, problem: Problem):
    from flash_attn.cute import flash_attn_varlen_func

    causal = shape.kind == "causal"

    def call(q, k, v, cu, n):
        out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return _as_varlen(call, shape, problem)


def xformers(shape: Shape, problem: Problem):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    if shape.kind == "padded":
        raise Unsupported("needs its own padded layout for key lengths")
    bias = LowerTriangularMask() if shape.kind == "causal" else None
    if shape.kind == "packed":
        bias = BlockDiagonalMask.from_seqlens(list(lengths(shape)))

    def step(qkv, *weights):
        qkv = qkv[None] if shape.kind == "packed" else qkv
        q, k, v = qkv.unbind(2)
        q, k = _norm_and_rotate(q, k, weights, problem)
        out = memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2)
        return out[0] if shape.kind == "packed" else out

    return step


def shape_of(
    name: str,
    batch: int,
    h: int,
    n: int,
    dh: int,
    kind: str = "dense",
    mean: int = 0,
    image: int = 0,
    **options,
) -> Shape:
    sizes = {"batch": batch, "h": h, "n": n, "dh": dh, "kind": kind, "mean": mean, "image": image}
    text = f"{name} B{batch} H{h} N{n} D{dh}" + ("" if kind == "dense" else f" {kind}")
    return Shape(text + (f" mean {mean}" if mean else ""), sizes, **options)


_CPU = {"dtype": "float32", "on": ("cpu",)}
SHAPES = (
    shape_of("B/16-224", 1024, 12, 197, 64, quick=True),
    shape_of("B/16-224 no CLS", 1024, 12, 196, 64),
    shape_of("B/16-256", 1024, 12, 256, 64, quick=True),
    *(shape_of("B/16-256", batch, 12, 256, 64) for batch in (64, 256)),
    shape_of("L/14", 512, 16, 257, 64),
    shape_of("So400m", 512, 16, 256, 72, quick=True),
    shape_of("H/14", 256, 16, 257, 80, quick=True),
    shape_of("g/14", 256, 16, 257, 88),
    shape_of("wide heads", 256, 16, 257, 96),
    shape_of("B/16-384", 256, 12, 576, 64),
    shape_of("L/14-336", 256, 16, 577, 64),
    shape_of("So400m-384", 128, 16, 729, 72),
    shape_of("text", 1024, 12, 64, 64),
    shape_of("text", 1024, 12, 77, 64, "causal"),
    *(shape_of("text", 1024, 12, 64, 64, "padded", mean) for mean in (20, 12, 40)),
    *(shape_of("text", 1024, 12, 64, 64, "packed", mean, quick=mean == 20) for mean in (12, 20, 40)),
    *(shape_of("fusion 256 +", 512, 12, 320, 64, "packed", mean, image=256) for mean in (20, 40)),
    shape_of("B/16-256", 256, 12, 256, 64, "qk-norm + rope"),
    shape_of("quickstart", 128, 3, 64, 64, quick=True, **_CPU),
    shape_of("quickstart fusion", 128, 3, 96, 64, "packed", 66, quick=True, **_CPU),
    shape_of("B/16-256", 4, 12, 256, 64, **_CPU),
    *(
        shape_of(
            "tiny",
            3,
            2,
            19,
            16,
            kind,
            9 if kind in ("padded", "packed") else 0,
            dtype="float32",
            on=(),
            tiny=True,
        )
        for kind in ("dense", "causal", "padded", "packed", "qk-norm + rope")
    ),
)

_GPU = ("cuda",)
ENTRIES = (
    Op(
        "attention",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("pinclip, plan made before", planned, "ours", on=_GPU),
            Arm("pinclip, kernels by force", our_kernels, on=_GPU),
            Arm(
                "reference",
                reference,
                "reference",
                quick=False,
                memory=lambda shape, mode: _scores(shape, 16),
            ),
            Arm("SDPA", sdpa()),
            Arm("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION), on=_GPU),
            Arm("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION), on=_GPU),
            Arm("SDPA efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION), on=_GPU),
            Arm("SDPA compiled", compiled(sdpa()), quick=False, on=_GPU, compiled=True),
            Arm("FlexAttention compiled", flex, quick=False, on=_GPU, compiled=True),
            Arm("torch varlen", torch_varlen, on=_GPU),
            Arm("xformers", xformers, on=_GPU),
            Arm("FlashAttention 2", flash2, on=_GPU),
            Arm("FlashAttention 3", flash3, on=_GPU),
            Arm("FlashAttention 4", flash4, on=_GPU),
        ),
        SHAPES,
        work,
        gate_shape,
        check_full=lambda shape: shape.kind != "packed" and "cuda" in shape.on,
        batched=("qkv", "lengths"),
        bound="memory",
    ),
)


def _scores(shape: Shape, bytes_each: int) -> float:
    return float(shape.batch * shape.h * shape.n * shape.n * bytes_each)
