"""Gated residual and LayerNorm in one pass. u = rows x width: forward 2 u read, 2 u written; backward 4 and
2.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.registry import BOTH, Arm, Op, Problem, Shape, Work, compiled, dtype_of
from pinclip.ops.gated_residual_norm import gated_residual_norm
from pinclip.reference.gated_residual_norm import gated_residual_norm as reference_norm

_EPS = 1e-6


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes, mean=0.0, std=1.0):
        drawn = mean + std * torch.randn(*sizes, generator=generator, device=device)
        return drawn.to(dtype_of(shape)).requires_grad_()

    rows, d = (shape.rows, shape.d), shape.d
    gate = normal(d if shape.gate == "channel" else 1, mean=0.5, std=0.2)
    leaves = (normal(*rows), normal(*rows), gate, normal(d, mean=1.0, std=0.1), normal(d, std=0.1))
    return Problem(leaves, ("x", "y", "gate", "weight", "bias"))


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "rows": min(shape.rows, 1000)})


def work(shape: Shape, mode: str) -> Work:
    u = shape.rows * shape.d * dtype_of(shape).itemsize
    return Work(0.0, (10 if mode == BOTH else 4) * u, shape.rows, "rows")


def plain(shape: Shape, problem: Problem):
    def step(x, y, gate, weight, bias):
        residual = x + (torch.tanh(gate).to(x.dtype) if shape.gate == "tanh" else gate) * y
        return residual, torch.nn.functional.layer_norm(residual, weight.shape, weight, bias, _EPS)

    return step


def ours(shape: Shape, problem: Problem):
    return lambda *leaves: gated_residual_norm(*leaves, gate_kind=shape.gate, eps=_EPS)


def reference(shape: Shape, problem: Problem):
    return lambda *leaves: reference_norm(*leaves, gate_kind=shape.gate, eps=_EPS)


def shape_of(rows: int, d: int, gate: str, **options) -> Shape:
    return Shape(f"{rows}x{d} {gate}", {"rows": rows, "d": d, "gate": gate}, **options)


ENTRIES = (
    Op(
        "gated_residual_norm",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False),
            Arm("torch eager", plain),
            Arm("torch compiled", compiled(plain), on=("cuda",), compiled=True),
        ),
        (
            shape_of(131072, 1024, "channel", quick=True),
            shape_of(131072, 1024, "tanh"),
            shape_of(131072, 768, "channel"),
            shape_of(8192, 1152, "channel"),
            shape_of(8192, 192, "channel", dtype="float32", on=("cpu",), quick=True),
            *(shape_of(13, 16, gate, dtype="float32", on=(), tiny=True) for gate in ("channel", "tanh")),
        ),
        work,
        gate_shape,
        bound="memory",
    ),
)
