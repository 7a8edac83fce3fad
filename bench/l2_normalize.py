"""L2 normalisation of rows. u = rows x width: forward reads and writes u; backward reads 2 u and writes u."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.registry import BOTH, Arm, Op, Problem, Shape, Work, compiled, dtype_of
from pinclip.ops.l2_normalize import l2_normalize
from pinclip.reference.l2_normalize import l2_normalize as reference_normalize

_EPS = 1e-12


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)
    x = torch.randn(shape.rows, shape.d, generator=generator, device=device).to(dtype_of(shape))
    return Problem((x.requires_grad_(),), ("x",))


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "rows": min(shape.rows, 1000)})


def work(shape: Shape, mode: str) -> Work:
    u = shape.rows * shape.d * dtype_of(shape).itemsize
    return Work(0.0, (5 if mode == BOTH else 2) * u, shape.rows, "rows")


def plain(shape: Shape, problem: Problem):
    return lambda x: torch.nn.functional.normalize(x, dim=-1, eps=_EPS)


def ours(shape: Shape, problem: Problem):
    return lambda x: l2_normalize(x, _EPS)


def reference(shape: Shape, problem: Problem):
    return lambda x: reference_normalize(x, _EPS)


def shape_of(rows: int, d: int, **options) -> Shape:
    return Shape(f"{rows}x{d}", {"rows": rows, "d": d}, **options)


ENTRIES = (
    Op(
        "l2_normalize",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False),
            Arm("torch eager", plain),
            Arm("torch compiled", compiled(plain), on=("cuda",), compiled=True),
        ),
        (
            shape_of(131072, 512, quick=True),
            shape_of(32768, 1152),
            shape_of(8192, 192, dtype="float32", on=("cpu",), quick=True),
            shape_of(13, 16, dtype="float32", on=(), tiny=True),
        ),
        work,
        gate_shape,
        bound="memory",
    ),
)
