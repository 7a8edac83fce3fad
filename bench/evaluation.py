"""Queries per second of the exact evaluation: every query ranked against the whole corpus, ties and all.

The rival is what one writes first: fp32 scores and topk, a tile of queries at a time. It gives recall@10
alone, and its ties and its last digits depend on the tile; ours scores in fp64 and gives recall@1, MRR and
nDCG besides.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from bench.registry import Arm, Job, Shape, Work

_TILE = 256


class Ranking:
    """Each of the first Q pins is asked for one other pin, which lies somewhat towards it."""

    def __init__(self, shape: Shape, who: str):
        generator = torch.Generator().manual_seed(0)
        corpus = F.normalize(torch.randn(shape.corpus, shape.d, generator=generator), dim=1)
        self.target = torch.randperm(shape.corpus, generator=generator)[: shape.queries]
        noise = F.normalize(torch.randn(shape.queries, shape.d, generator=generator), dim=1)
        query = torch.zeros_like(corpus)
        query[: shape.queries] = F.normalize(corpus[self.target] + 5 * noise, dim=1)
        self.query, self.corpus, self.shape, self.who = query, corpus, shape, who

    def __call__(self) -> np.ndarray:
        return self.ours() if self.who == "pinclip" else self.by_topk()

    def ours(self) -> np.ndarray:
        from pinclip.retrieval.spaces import Task, dense_space, rank_queries

        every = np.ones(self.shape.corpus, bool)
        space = dense_space(self.query, self.corpus, every, every)
        target, pins = self.target.numpy(), np.arange(self.shape.corpus)
        task = Task(np.arange(self.shape.queries), pins, lambda rows: target[rows, None] == pins, False)
        return rank_queries(space, task).recall_10

    def by_topk(self) -> np.ndarray:
        found = []
        for first in range(0, self.shape.queries, _TILE):
            rows = slice(first, min(first + _TILE, self.shape.queries))
            best = (self.query[rows] @ self.corpus.T).topk(10, dim=1).indices
            found.append((best == self.target[rows, None]).any(1))
        return torch.cat(found).double().numpy()


def check(shape: Shape, arm: Arm, step: Ranking) -> str:
    ours, other = step.ours().mean(), step.by_topk().mean()
    if not 0.02 < ours < 0.98:
        return f"recall@10 is {ours:.3f}: this checks nothing"
    # One query in a thousand may stand at the tenth place by less than fp32 tells.
    return "" if abs(ours - other) <= 1e-3 else f"recall@10 {ours:.4f} against {other:.4f}"


def arm(name: str, role: str = "rival") -> Arm:
    return Arm(name, lambda shape, problem: Ranking(shape, name), role)


def _shape(queries: int, corpus: int, d: int, **options) -> Shape:
    sizes = {"queries": queries, "corpus": corpus, "d": d}
    return Shape(f"{queries} in {corpus} D{d}", sizes, dtype="float32", **options)


def work(shape: Shape, mode: str) -> Work:
    size = 4.0 * (shape.queries + shape.corpus) * shape.d
    return Work(2.0 * shape.queries * shape.corpus * shape.d, size, float(shape.queries), "queries")


ENTRIES = (
    Job(
        "evaluation",
        (arm("pinclip", "ours"), arm("torch topk, fp32, recall@10 alone")),
        (
            _shape(2_000, 10_000, 256, on=("cpu",), quick=True),
            _shape(2_000, 50_000, 256, on=("cpu",)),
            _shape(40, 200, 32, on=(), tiny=True),
        ),
        work,
        check,
        bound="compute",
    ),
)
