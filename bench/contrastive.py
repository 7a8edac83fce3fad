"""Softmax pair loss (InfoNCE, both directions): ours against open_clip and everything that can be installed.

Useful operations are counted, whatever an arm executes: S = x yᵀ once for the forward pass, and S twice, dX
and dY for forward and backward: 2 MND and 8 MND. Least bytes: x and y read, their gradients written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from bench.registry import BOTH, Arm, Op, Problem, Shape, Unsupported, Work, compiled, dtype_of
from pinclip.ops.contrastive import contrastive_loss
from pinclip.ops.pairs import Pairs
from pinclip.reference.contrastive import contrastive_loss as reference_loss
from pinclip.reference.pairs import DensePairs, dense_pairs, prefixes

_BLOCK = 2048  # rows of S at once in the blockwise truth
_GATE_N = {"cuda": 2048, "cpu": 512}


def embeddings(shape: Shape, device: str, seed: int) -> Problem:
    """Unit rows x [M, D] and y [N, D], a scale; y_i lies somewhat towards x_i."""
    generator = torch.Generator(device=device).manual_seed(seed)
    x, y = (torch.randn(k, shape.d, generator=generator, device=device) for k in (shape.m, shape.n))
    rows = min(shape.m, shape.n)
    y[:rows] += x[:rows]
    x, y = (F.normalize(t, dim=1).to(dtype_of(shape)).requires_grad_() for t in (x, y))
    scale = torch.tensor(shape.scale, device=device, requires_grad=True)
    return Problem((x, y, scale), ("x", "y", "scale"), {"pairs": _pairs(shape, device, seed)})


def _pairs(shape: Shape, device: str, seed: int) -> Pairs:
    """Pairs of the variant: the diagonal, or the neighbor loss with everything that it can carry."""
    if shape.variant != "neighbors":
        return Pairs()
    generator = torch.Generator().manual_seed(seed)
    per_row = 4
    indices = torch.randint(0, shape.n, (shape.m, per_row), generator=generator)
    indices = (torch.arange(per_row) * (shape.n // per_row) + indices % (shape.n // per_row)).flatten()
    fields = {
        "indptr": per_row * torch.arange(shape.m + 1),
        "indices": indices,
        "weights": 0.5 + torch.rand(len(indices), generator=generator),
        "row_ids": torch.randint(0, 4 * shape.n, (shape.m,), generator=generator),
        "col_ids": torch.randint(0, 4 * shape.n, (shape.n,), generator=generator),
        "log_q_cols": torch.randn(shape.n, generator=generator),
        "log_q_rows": torch.randn(shape.m, generator=generator),
        "row_weights": 0.5 + torch.rand(shape.m, generator=generator),
        "col_weights": 0.5 + torch.rand(shape.n, generator=generator),
    }
    return Pairs(**{name: value.to(device) for name, value in fields.items()})


def gate_shape(shape: Shape) -> Shape:
    """The same D, scale and variant at few rows; a ragged N stays ragged."""
    most = _GATE_N["cuda" if "cuda" in shape.on else "cpu"]
    n = min(shape.n, most - (1 if shape.n % 64 else 0))
    m = max(1, n * shape.m // shape.n)
    return replace(shape, sizes={**shape.sizes, "m": m, "n": n})


def plain_loss(x, y, scale):
    """open_clip's ClipLoss in plain torch: both matrices formed, two cross entropies."""
    labels = torch.arange(len(x), device=x.device)
    rows = F.cross_entropy((scale * x).to(x.dtype) @ y.T, labels)
    return (rows + F.cross_entropy((scale * y).to(y.dtype) @ x.T, labels)) / 2


def plain_pairs(shape: Shape, problem: Problem):
    """The loss of `Pairs` and prefixes with dense masks, in the dtype of x throughout."""
    pairs = problem.extra["pairs"]
    square = shape.m == shape.n

    def loss(x, y, scale):
        dense = dense_pairs(pairs, shape.m, shape.n, device=x.device, dtype=x.dtype)
        turned = DensePairs(*(part.T for part in dense))
        losses = []
        for x_d, y_d in prefixes(x, y, shape.dims):
            s_MN = (scale * x_d).to(x.dtype) @ y_d.T
            losses.append(_row_loss(s_MN, dense, pairs.log_q_cols, pairs.row_weights))
            if square:
                losses.append(_row_loss(s_MN.T, turned, pairs.log_q_rows, pairs.col_weights))
        return torch.stack(losses).mean()

    return loss


def _row_loss(s_MN, dense: DensePairs, log_q, weights_M):
    if log_q is not None:
        s_MN = s_MN - log_q.to(s_MN.dtype)
    total_M = dense.weight_MN.sum(1)
    pi = dense.weight_MN / total_M.clamp_min(1e-9)[:, None]
    w_M = (total_M > 0).to(s_MN.dtype) * (1.0 if weights_M is None else weights_M.to(s_MN.dtype))
    lse = s_MN.masked_fill(~(dense.listed_MN | dense.negative_MN), -torch.inf).logsumexp(1, keepdim=True)
    return (w_M * (pi * torch.where(pi > 0, lse - s_MN, 0.0)).sum(1)).sum() / w_M.sum()


def plain(shape: Shape, problem: Problem):
    simple = shape.variant == "diagonal" and shape.m == shape.n
    return plain_loss if simple else plain_pairs(shape, problem)


def parts(shape: Shape, problem: Problem) -> Iterator:
    """The same by blocks of rows, so that fp64 fits at every N."""
    if shape.variant != "diagonal" or shape.m != shape.n or shape.n <= _BLOCK:
        yield plain(shape, problem)
        return
    for turned in (False, True):
        for first in range(0, shape.n, _BLOCK):

            def block(x, y, scale, first=first, turned=turned):
                if turned:
                    x, y = y, x
                rows = x[first : first + _BLOCK]
                labels = torch.arange(first, first + len(rows), device=x.device)
                logits = (scale * rows).to(x.dtype) @ y.T
                return F.cross_entropy(logits, labels, reduction="sum") / (2 * shape.n)

            yield block


def work(shape: Shape, mode: str) -> Work:
    once = 2.0 * shape.m * shape.n * sum(shape.dims or (shape.d,))
    size = (shape.m + shape.n) * shape.d * dtype_of(shape).itemsize
    return Work((4 if mode == BOTH else 1) * once, (2 if mode == BOTH else 1) * size, shape.m, "rows")


def dense_memory(logits: float):
    """Bytes of an arm that forms M×N matrices: so many at once, in the inputs' dtype.

    4.1: measured of ClipLoss, forward and backward, at N = 8192 in fp32 on a CPU.
    """

    def memory(shape: Shape, mode: str) -> float:
        held = logits if mode == BOTH else max(1.0, logits / 2)
        return held * shape.m * shape.n * dtype_of(shape).itemsize

    return memory


def ours(shape: Shape, problem: Problem):
    pairs, direction = problem.extra["pairs"], "symmetric" if shape.m == shape.n else "rows"
    return lambda x, y, scale: contrastive_loss(x, y, scale, pairs, dims=shape.dims, direction=direction)


def reference(shape: Shape, problem: Problem):
    pairs, direction = problem.extra["pairs"], "symmetric" if shape.m == shape.n else "rows"
    return lambda x, y, scale: reference_loss(x, y, scale, pairs, dims=shape.dims, direction=direction)


def only_diagonal(shape: Shape) -> None:
    if shape.variant != "diagonal" or shape.m != shape.n:
        raise Unsupported("has the square loss on the diagonal only")


def plain_arm(shape: Shape, problem: Problem):
    only_diagonal(shape)
    return plain_loss


def open_clip(shape: Shape, problem: Problem):
    from open_clip.loss import ClipLoss

    only_diagonal(shape)
    return ClipLoss()


def memeff(shape: Shape, problem: Problem):
    from memeff import MatryoshkaLoss, MemoryEfficientCLIPLoss

    if shape.m != shape.n or shape.variant == "neighbors":
        raise Unsupported("has the square loss on the diagonal only")
    whole = shape.dims is None
    loss = MemoryEfficientCLIPLoss(1 / shape.scale, normalized_inputs=whole, stable=False)
    if not whole:
        loss = MatryoshkaLoss(loss, dims=shape.dims)
    return lambda x, y, scale: loss(x, y)


def inf_cl(shape: Shape, problem: Problem):
    from inf_cl import cal_flash_loss

    only_diagonal(shape)
    return lambda x, y, scale: (
        (cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()) / 2
    )


def cut_cross_entropy(shape: Shape, problem: Problem):
    from cut_cross_entropy import linear_cross_entropy

    only_diagonal(shape)
    labels = torch.arange(shape.n, device=problem.leaves[0].device)

    def one(x, y, scale):  # without its filter, which drops all negatives once N > 4096
        return linear_cross_entropy((scale * x).to(x.dtype), y, labels, filter_eps=None, impl="cce")

    return lambda x, y, scale: (one(x, y, scale) + one(y, x, scale)) / 2


def liger(shape: Shape, problem: Problem):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    only_diagonal(shape)
    labels = torch.arange(shape.n, device=problem.leaves[0].device)
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, y, scale: (
        (loss(y, (scale * x).to(x.dtype), labels) + loss(x, (scale * y).to(y.dtype), labels)) / 2
    )


def quack(shape: Shape, problem: Problem):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as loss

    only_diagonal(shape)
    labels = torch.arange(shape.n, device=problem.leaves[0].device)
    return lambda x, y, scale: (
        (loss((scale * x).to(x.dtype), y, labels) + loss((scale * y).to(y.dtype), x, labels)) / 2
    )


def shape_of(
    n: int,
    d: int,
    scale: float = 100.0,
    *,
    m: int | None = None,
    variant: str = "diagonal",
    dims=None,
    **options,
) -> Shape:
    m = n if m is None else m
    name = f"{m}x{n}x{d} s{scale:g}" + ("" if variant == "diagonal" else f" {variant}")
    sizes = {"m": m, "n": n, "d": d, "scale": scale, "variant": variant, "dims": dims}
    return Shape(name, sizes, **options)


_K = 1024
MATRYOSHKA = (64, 128, 256, 512)
_CPU = {"dtype": "float32", "on": ("cpu",)}
_QUICK = {(32 * _K, 256), (32 * _K, 512), (32 * _K, 1024), (128 * _K, 512)}

SHAPES = (
    *(
        shape_of(n * _K, d, quick=(n * _K, d) in _QUICK)
        for n in (8, 16, 32, 64, 128)
        for d in (256, 512, 768, 1024, 1152)
    ),
    shape_of(256 * _K, 512),
    shape_of(32 * _K, 512, 14.3),
    shape_of(32731, 512, quick=True),
    shape_of(32 * _K, 512, m=4096),
    shape_of(32 * _K, 512, variant="neighbors", quick=True),
    shape_of(32 * _K, 512, variant="matryoshka", dims=MATRYOSHKA, quick=True),
    *(shape_of(n * _K, 256, 14.3, quick=n <= 8, **_CPU) for n in (1, 4, 8, 16)),
    *(shape_of(n * _K, 256, 14.3, modes=(BOTH,), **_CPU) for n in (32, 64)),
    shape_of(4 * _K, 512, 14.3, **_CPU),
    shape_of(4 * _K, 512, 14.3, variant="matryoshka", dims=MATRYOSHKA, **_CPU),
    shape_of(96, 16, 14.3, dtype="float32", on=(), tiny=True),
    shape_of(96, 32, 14.3, variant="matryoshka", dims=(8, 32), dtype="float32", on=(), tiny=True),
    shape_of(65, 16, 14.3, variant="neighbors", dtype="float32", on=(), tiny=True),
)


def small_enough(shape: Shape) -> bool:
    """fp64 over the whole matrix in seconds: on a GPU up to 64k, on a CPU not beyond the gate's own size."""
    if shape.variant != "diagonal" or shape.m != shape.n:
        return False
    return shape.n <= (64 * _K if "cuda" in shape.on else 1024)


ENTRIES = (
    Op(
        "contrastive",
        embeddings,
        plain,
        (
            Arm("pinclip", ours, "ours"),
            Arm("reference", reference, "reference", quick=False, memory=dense_memory(12)),
            Arm("torch eager", plain_arm, on=("cuda",), memory=dense_memory(4.1)),
            Arm(
                "torch compiled",
                compiled(plain_arm),
                quick=False,
                on=("cuda",),
                memory=dense_memory(4),
                compiled=True,
            ),
            Arm("open_clip", open_clip, memory=dense_memory(4.1)),
            Arm(
                "open_clip compiled",
                compiled(open_clip),
                quick=False,
                on=("cuda",),
                memory=dense_memory(4),
                compiled=True,
            ),
            Arm("memeff", memeff, on=("cuda",), lacks=("scale",)),
            Arm("inf-cl", inf_cl, on=("cuda",)),
            Arm("cut-cross-entropy", cut_cross_entropy, on=("cuda",)),
            Arm("liger", liger, on=("cuda",)),
            Arm("quack", quack, on=("cuda",)),
        ),
        SHAPES,
        work,
        gate_shape,
        parts=parts,
        check_full=small_enough,
    ),
)
