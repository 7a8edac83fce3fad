"""Bias and GELU behind a matrix product. u = rows x width: forward reads and writes u; backward reads 2 u and
writes u.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.registry import BOTH, Arm, Op, Problem, Shape, Work, compiled, dtype_of
from pinclip.ops.gelu import gelu
from pinclip.reference.gelu import gelu as reference_gelu


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = (shape.rows, shape.d), (shape.d,)
    drawn = (torch.randn(*size, generator=generator, device=device).to(dtype_of(shape)) for size in sizes)
    return Problem(tuple(t.requires_grad_() for t in drawn), ("x", "bias"))


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "rows": min(shape.rows, 1000)})


def work(shape: Shape, mode: str) -> Work:
    u = shape.rows * shape.d * dtype_of(shape).itemsize
    return Work(0.0, (5 if mode == BOTH else 2) * u, shape.rows, "rows")


def plain(shape: Shape, problem: Problem):
    return lambda x, bias: torch.nn.functional.gelu(x + bias, approximate=shape.form)


def ours(shape: Shape, problem: Problem):
    return lambda x, bias: gelu(x, bias, approximate=shape.form)


def reference(shape: Shape, problem: Problem):
    return lambda x, bias: reference_gelu(x, bias, approximate=shape.form)


def shape_of(rows: int, d: int, form: str, **options) -> Shape:
    return Shape(f"{rows}x{d} {form}", {"rows": rows, "d": d, "form": form}, **options)


ENTRIES = (
    Op(
        "gelu",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False),
            Arm("torch eager", plain),
            Arm("torch compiled", compiled(plain), on=("cuda",), compiled=True),
        ),
        (
            shape_of(131072, 3072, "tanh", quick=True),
            shape_of(131072, 4304, "tanh"),
            shape_of(131072, 3072, "none"),
            shape_of(8192, 768, "tanh", dtype="float32", on=("cpu",), quick=True),
            *(shape_of(13, 16, form, dtype="float32", on=(), tiny=True) for form in ("tanh", "none")),
        ),
        work,
        gate_shape,
        bound="memory",
    ),
)
