"""Funnel pooling of a grid of tokens with its residual. u = tokens x width before pooling: forward reads
1.25 u and writes 0.25; backward reads 0.25 and writes 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.registry import BOTH, Arm, Op, Problem, Shape, Work, compiled, dtype_of
from pinclip.ops.funnel_pool import funnel_pool
from pinclip.reference.funnel_pool import funnel_pool as reference_pool


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = shape.grid**2
    sizes = (shape.batch, tokens, shape.d), (shape.batch, tokens // 4, shape.d)
    drawn = (torch.randn(*size, generator=generator, device=device).to(dtype_of(shape)) for size in sizes)
    return Problem(tuple(t.requires_grad_() for t in drawn), ("x", "residual"))


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "batch": min(shape.batch, 4)})


def work(shape: Shape, mode: str) -> Work:
    u = shape.batch * shape.grid**2 * shape.d * dtype_of(shape).itemsize
    return Work(0.0, (2.75 if mode == BOTH else 1.5) * u, shape.batch, "images")


def plain(shape: Shape, problem: Problem):
    def step(x, residual):
        cells = x.unflatten(1, (shape.grid // 2, 2, shape.grid // 2, 2))
        return residual + cells.mean((2, 4)).flatten(1, 2)

    return step


def ours(shape: Shape, problem: Problem):
    return lambda x, residual: funnel_pool(x, shape.grid, residual)


def reference(shape: Shape, problem: Problem):
    return lambda x, residual: reference_pool(x, residual, shape.grid)


def shape_of(batch: int, grid: int, d: int, **options) -> Shape:
    return Shape(f"B{batch} {grid}x{grid} D{d}", {"batch": batch, "grid": grid, "d": d}, **options)


ENTRIES = (
    Op(
        "funnel_pool",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False),
            Arm("torch eager", plain),
            Arm("torch compiled", compiled(plain), on=("cuda",), compiled=True),
        ),
        (
            shape_of(512, 16, 768),
            shape_of(512, 16, 1152),
            shape_of(32, 8, 192, dtype="float32", on=("cpu",)),
            shape_of(2, 4, 16, dtype="float32", on=(), tiny=True),
        ),
        work,
        gate_shape,
        bound="memory",
    ),
)
