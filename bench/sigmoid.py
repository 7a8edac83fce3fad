"""Sigmoid pair loss (SigLIP): ours against open_clip's. Useful operations: 2 MND forward, 6 MND with
gradients.

Least bytes: x and y read, their gradients written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import contrastive
from bench.contrastive import dense_memory, embeddings, gate_shape, shape_of
from bench.registry import BOTH, Arm, Op, Problem, Shape, Unsupported, Work, compiled, dtype_of
from pinclip.ops.sigmoid import sigmoid_loss
from pinclip.reference.pairs import dense_pairs, prefixes
from pinclip.reference.sigmoid import sigmoid_loss as reference_loss

_BLOCK = 2048


def inputs(shape: Shape, device: str, seed: int) -> Problem:
    problem = embeddings(shape, device, seed)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    return Problem((*problem.leaves, bias), (*problem.names, "bias"), problem.extra)


def plain_loss(x, y, scale, bias):
    """open_clip's SigLipLoss in plain torch."""
    logits = (scale * x).to(x.dtype) @ y.T + bias
    labels = 2 * torch.eye(*logits.shape, device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def plain_pairs(shape: Shape, problem: Problem):
    """The loss of `Pairs` and prefixes with dense masks, in the dtype of x throughout."""
    pairs = problem.extra["pairs"]

    def loss(x, y, scale, bias):
        dense = dense_pairs(pairs, shape.m, shape.n, device=x.device, dtype=x.dtype)
        w_M = (dense.weight_MN.sum(1) > 0).to(x.dtype)
        if pairs.row_weights is not None:
            w_M = w_M * pairs.row_weights.to(x.dtype)
        losses = []
        for x_d, y_d in prefixes(x, y, shape.dims):
            s_MN = (scale * x_d).to(x.dtype) @ y_d.T + bias
            if pairs.log_q_cols is not None:
                s_MN = s_MN - pairs.log_q_cols.to(x.dtype)
            rows = -(dense.weight_MN * F.logsigmoid(s_MN) + dense.negative_MN * F.logsigmoid(-s_MN)).sum(1)
            losses.append((w_M * rows).sum() / w_M.sum())
        return torch.stack(losses).mean()

    return loss


def plain(shape: Shape, problem: Problem):
    simple = shape.variant == "diagonal" and shape.m == shape.n
    return plain_loss if simple else plain_pairs(shape, problem)


def parts(shape: Shape, problem: Problem):
    if shape.variant != "diagonal" or shape.m != shape.n or shape.n <= _BLOCK:
        yield plain(shape, problem)
        return
    for first in range(0, shape.n, _BLOCK):

        def block(x, y, scale, bias, first=first):
            rows = x[first : first + _BLOCK]
            logits = (scale * rows).to(x.dtype) @ y.T + bias
            column = torch.arange(shape.n, device=x.device)
            listed = column == torch.arange(first, first + len(rows), device=x.device)[:, None]
            return -F.logsigmoid(torch.where(listed, logits, -logits)).sum() / shape.n

        yield block


def work(shape: Shape, mode: str) -> Work:
    once = 2.0 * shape.m * shape.n * sum(shape.dims or (shape.d,))
    size = (shape.m + shape.n) * shape.d * dtype_of(shape).itemsize
    return Work((3 if mode == BOTH else 1) * once, (2 if mode == BOTH else 1) * size, shape.m, "rows")


def ours(shape: Shape, problem: Problem):
    pairs = problem.extra["pairs"]
    return lambda x, y, scale, bias: sigmoid_loss(x, y, scale, bias, pairs, dims=shape.dims)


def reference(shape: Shape, problem: Problem):
    pairs = problem.extra["pairs"]
    return lambda x, y, scale, bias: reference_loss(x, y, scale, bias, pairs, dims=shape.dims)


def only_diagonal(shape: Shape) -> None:
    if shape.variant != "diagonal" or shape.m != shape.n:
        raise Unsupported("has the square loss on the diagonal only")


def plain_arm(shape: Shape, problem: Problem):
    only_diagonal(shape)
    return plain_loss


def open_clip(shape: Shape, problem: Problem):
    from open_clip.loss import SigLipLoss

    only_diagonal(shape)
    return SigLipLoss()


_K = 1024
_CPU = {"dtype": "float32", "on": ("cpu",)}
_QUICK = {(32 * _K, 512), (32 * _K, 1024)}

SHAPES = (
    *(
        shape_of(n * _K, d, quick=(n * _K, d) in _QUICK)
        for n in (8, 16, 32, 64, 128)
        for d in (256, 512, 768, 1024, 1152)
    ),
    shape_of(32 * _K, 512, 10.0),
    shape_of(32731, 512),
    shape_of(256 * _K, 512),
    shape_of(32 * _K, 512, m=4096),
    shape_of(32 * _K, 512, variant="neighbors"),
    shape_of(32 * _K, 512, variant="matryoshka", dims=contrastive.MATRYOSHKA),
    *(shape_of(n * _K, 256, 10.0, quick=n <= 8, **_CPU) for n in (1, 4, 8)),
    shape_of(4 * _K, 512, 10.0, **_CPU),
    shape_of(4 * _K, 512, 10.0, variant="matryoshka", dims=contrastive.MATRYOSHKA, **_CPU),
    shape_of(96, 16, 10.0, dtype="float32", on=(), tiny=True),
    shape_of(96, 32, 10.0, variant="matryoshka", dims=(8, 32), dtype="float32", on=(), tiny=True),
    shape_of(65, 16, 10.0, variant="neighbors", dtype="float32", on=(), tiny=True),
)

ENTRIES = (
    Op(
        "sigmoid",
        inputs,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False, memory=dense_memory(10)),
            Arm("torch eager", plain_arm, on=("cuda",), memory=dense_memory(5)),
            Arm(
                "torch compiled",
                compiled(plain_arm),
                quick=False,
                on=("cuda",),
                memory=dense_memory(3),
                compiled=True,
            ),
            Arm("open_clip", open_clip, memory=dense_memory(5)),
            Arm(
                "open_clip compiled",
                compiled(open_clip),
                quick=False,
                on=("cuda",),
                memory=dense_memory(3),
                compiled=True,
            ),
        ),
        SHAPES,
        work,
        gate_shape,
        parts=parts,
        check_full=contrastive.small_enough,
    ),
)
