"""Attention pooling by constant probes: ours (absorbed: K and V are never formed) against the standard form.

Useful work is that of the absorbed form: 2 N D multiply-adds per probe and head for the scores and the
mixture, then the value projection; x is read once forward, and read once and its gradient written once
backward.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from bench.registry import BOTH, Arm, Op, Problem, Shape, Work, compiled, dtype_of
from pinclip.ops.attention_pool import attention_pool
from pinclip.reference.attention_pool import attention_pool as reference_pool

_NAMES = ("x", "q", "w_k", "b_k", "w_v", "b_v")
_NORM = ("norm weight", "norm bias")
_EPS = 1e-6


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes, std=1.0):
        drawn = std * torch.randn(*sizes, generator=generator, device=device)
        return drawn.to(dtype_of(shape)).requires_grad_()

    d = shape.d
    weights = (normal(d, d, std=d**-0.5), normal(d, std=0.1), normal(d, d, std=d**-0.5), normal(d, std=0.1))
    leaves = (normal(shape.batch, shape.n, d), normal(shape.probes, d), *weights)
    if not shape.norm:
        return Problem(leaves, _NAMES)
    return Problem((*leaves, normal(d), normal(d, std=0.1)), _NAMES + _NORM)


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "batch": min(shape.batch, 8)})


def work(shape: Shape, mode: str) -> Work:
    b, n, d, probes = shape.batch, shape.n, shape.d, shape.probes
    flops = 4.0 * b * n * d * probes * shape.h + 2.0 * b * probes * d * d
    size = b * n * d * dtype_of(shape).itemsize
    return Work((3 if mode == BOTH else 1) * flops, (3 if mode == BOTH else 1) * size, b, "images")


def normed(x, norm):
    """LayerNorm(x), if there is one."""
    return F.layer_norm(x, x.shape[2:], *norm, _EPS) if norm else x


def plain(shape: Shape, problem: Problem):
    """K and V formed, then softmax; in the dtype of x."""

    def step(x, q, w_k, b_k, w_v, b_v, *norm):
        x = normed(x, norm)
        key, value = (F.linear(x, w, b).unflatten(-1, (shape.h, -1)) for w, b in ((w_k, b_k), (w_v, b_v)))
        query = q.unflatten(-1, (shape.h, -1)) * (shape.d // shape.h) ** -0.5
        scores = torch.einsum("phe,bnhe->bhpn", query, key).softmax(-1)
        return torch.einsum("bhpn,bnhe->bphe", scores, value).flatten(2)

    return step


def standard(shape: Shape, problem: Problem):
    """What SigLIP's head does: two projections and scaled_dot_product_attention."""

    def step(x, q, w_k, b_k, w_v, b_v, *norm):
        x = normed(x, norm)
        key, value = (
            F.linear(x, w, b).unflatten(-1, (shape.h, -1)).transpose(1, 2)
            for w, b in ((w_k, b_k), (w_v, b_v))
        )
        query = q.unflatten(-1, (shape.h, -1)).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    return step


def pooling(pool, shape: Shape):
    def step(*leaves):
        norm = (*leaves[6:], _EPS) if shape.norm else None
        return pool(*leaves[:6], num_heads=shape.h, norm=norm)

    return step


def ours(shape: Shape, problem: Problem):
    return pooling(attention_pool, shape)


def reference(shape: Shape, problem: Problem):
    return pooling(reference_pool, shape)


def shape_of(name: str, batch: int, n: int, d: int, h: int, probes: int, norm=False, **options) -> Shape:
    sizes = {"batch": batch, "n": n, "d": d, "h": h, "probes": probes, "norm": norm}
    return Shape(f"{name} B{batch} N{n} D{d} P{probes}{' norm' if norm else ''}", sizes, **options)


ENTRIES = (
    Op(
        "attention_pool",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False),
            Arm("SDPA", standard),
            Arm("SDPA compiled", compiled(standard), quick=False, on=("cuda",), compiled=True),
        ),
        (
            *(shape_of("So400m", 512, 256, 1152, 16, probes, quick=probes == 1) for probes in (1, 8, 32)),
            shape_of("So400m", 512, 256, 1152, 16, 1, norm=True),
            shape_of("B/16-256", 1024, 256, 768, 12, 1),
            shape_of("quickstart", 128, 64, 192, 3, 1, dtype="float32", on=("cpu",), quick=True),
            *(shape_of("tiny", 3, 9, 16, 2, 2, n, dtype="float32", on=(), tiny=True) for n in (False, True)),
        ),
        work,
        gate_shape,
        bound="memory",
    ),
)
