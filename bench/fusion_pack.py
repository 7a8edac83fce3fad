"""Packing of fusion, image and text tokens with their embeddings and LayerNorm into one varlen buffer.

Least bytes, T packed tokens of width D: forward reads and writes each once; backward reads the gradient and
the tokens, and writes the tokens' gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.registry import BOTH, Arm, Op, Problem, Shape, Work, compiled, dtype_of
from pinclip.ops.fusion_pack import FusionLayout, fusion_pack
from pinclip.reference.fusion_pack import fusion_pack as reference_pack

_NAMES = (
    "fusion_tokens",
    "image",
    "text",
    "type_embedding",
    "image_position",
    "text_position",
    "weight",
    "bias",
)
_EPS = 1e-6


def layout(shape: Shape) -> FusionLayout:
    """One pin in eight has no image, another one no text; text lengths are uniform in 1 … L."""
    pins = torch.arange(shape.batch)
    generator = torch.Generator().manual_seed(7)
    image_rows, text_rows = pins[pins % 8 != 3], pins[pins % 8 != 5]
    lengths = torch.randint(1, shape.length + 1, (len(text_rows),), generator=generator)
    sizes = shape.batch, shape.fusion, shape.image, shape.length
    return FusionLayout.build(*sizes, image_rows, text_rows, lengths)


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    generator = torch.Generator(device=device).manual_seed(seed)
    where, d = layout(shape).to(device), shape.d
    sizes = (
        (shape.fusion, d),
        (len(where.image_slots), shape.image, d),
        (len(where.text_slots), shape.length, d),
        (3, d),
        (shape.image, d),
        (shape.length, d),
        (d,),
        (d,),
    )
    drawn = (torch.randn(*size, generator=generator, device=device).to(dtype_of(shape)) for size in sizes)
    return Problem(tuple(t.requires_grad_() for t in drawn), _NAMES, {"layout": where})


def gate_shape(shape: Shape) -> Shape:
    return replace(shape, sizes={**shape.sizes, "batch": min(shape.batch, 16)})


def work(shape: Shape, mode: str) -> Work:
    total = layout(shape).total
    size = total * shape.d * dtype_of(shape).itemsize
    return Work(0.0, (5 if mode == BOTH else 2) * size, total, "tokens")


def plain(shape: Shape, problem: Problem):
    where = problem.extra["layout"]

    def step(fusion, image, text, types, image_position, text_position, weight, bias):
        join = torch.cat(
            (
                fusion + types[0],
                (image + image_position + types[1]).flatten(0, 1),
                (text + text_position + types[2]).flatten(0, 1),
            )
        )
        rows = join[where.source]
        return torch.nn.functional.layer_norm(rows, weight.shape, weight, bias, _EPS)

    return step


def ours(shape: Shape, problem: Problem):
    return lambda *leaves: fusion_pack(*leaves, problem.extra["layout"], _EPS)


def reference(shape: Shape, problem: Problem):
    return lambda *leaves: reference_pack(*leaves, problem.extra["layout"].source, _EPS)


def shape_of(name: str, batch: int, image: int, length: int, d: int, fusion: int = 1, **options) -> Shape:
    sizes = {"batch": batch, "image": image, "length": length, "d": d, "fusion": fusion}
    return Shape(f"{name} B{batch} {image}+{length} D{d}", sizes, **options)


ENTRIES = (
    Op(
        "fusion_pack",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False),
            Arm("torch eager", plain),
            Arm("torch compiled", compiled(plain), on=("cuda",), compiled=True),
        ),
        (
            *(shape_of("fusion", 512, 256, length, 1024, quick=length == 64) for length in (16, 32, 64)),
            shape_of("quickstart", 128, 64, 32, 192, dtype="float32", on=("cpu",), quick=True),
            shape_of("tiny", 9, 4, 5, 16, 2, dtype="float32", on=(), tiny=True),
        ),
        work,
        gate_shape,
        bound="memory",
    ),
)
