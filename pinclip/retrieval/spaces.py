"""Spaces in which pins are compared, and exact ranking in them.

A `Space` scores query pins against corpus pins; dense embeddings and the TF-IDF baseline are both spaces, so
both go through the same ranking and the same metrics.  Everything is brute force over the full corpus.

Legend: P pins, D dimensions, q queries of one tile, Q queries, C corpus pins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pinclip.retrieval.metrics import LACKING, QueryMetrics, chance_recall, rank_metrics

_SCORES_AT_ONCE = 1 << 22
_CORPUS_ROWS = 8192


@dataclass(frozen=True)
class Space:
    """How alike pins are, and which pins can be compared at all.

    score(queries int64 [q], corpus int64 [C]) -> float32 tensor [q, C], finite; larger is more alike
    has_query, has_corpus: bool [P], the pins that have a vector on this side
    """

    score: Callable[[np.ndarray, np.ndarray], torch.Tensor]
    has_query: np.ndarray
    has_corpus: np.ndarray


@dataclass(frozen=True)
class Task:
    """What is asked, and which answers are right.

    queries  int64 [Q] pins, each with at least one relevant corpus pin
    corpus   int64 [C] pins, ascending
    relevant(queries int64 [q]) -> bool [q, C]
    without_self: the query pin is taken out of its own corpus
    """

    queries: np.ndarray
    corpus: np.ndarray
    relevant: Callable[[np.ndarray], np.ndarray]
    without_self: bool


def dense_space(
    query: torch.Tensor, corpus: torch.Tensor, has_query: np.ndarray, has_corpus: np.ndarray
) -> Space:
    """The space of dot products of float32 embeddings, `query` and `corpus` [P, D] (often the same).

    score = fp32(<x, y> in fp64): a product of two fp32 numbers is exact in fp64, so the sum is right to the
    last fp32 bit whatever the tile, the device and the number of threads, and equal vectors tie (but for sums
    within 1e-8 of a rounding boundary, relative to an fp32 step).
    Memory: one fp64 chunk of 8,192 corpus rows beside the scores.
    """

    def score(queries: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        index = torch.from_numpy(columns).to(corpus.device)
        x_qD = query[torch.from_numpy(queries).to(query.device)].double()
        scores_qC = torch.empty(len(queries), len(columns), dtype=torch.float32, device=corpus.device)
        for start in range(0, len(columns), _CORPUS_ROWS):
            y_cD = corpus[index[start : start + _CORPUS_ROWS]].double()
            scores_qC[:, start : start + _CORPUS_ROWS] = x_qD @ y_cD.T
        return scores_qC

    return Space(score, has_query, has_corpus)


def rank_queries(space: Space, task: Task, *, batch: int | None = None) -> QueryMetrics:
    """Rank the whole corpus for every query and keep the metrics (`rank_metrics`).

    A query without a vector is a miss: all its metrics are 0 and it stays in every mean. A corpus pin without
    a vector cannot be found: it stands behind all that have one.

    batch: queries per tile; by default so many that a tile holds about four million scores.
    Time: Q * C * D multiplications. Memory: about 20 bytes per score of a tile, that is per batch * C.
    """
    position = np.full(len(space.has_query), -1)
    position[task.corpus] = np.arange(len(task.corpus))
    lacking_C = torch.from_numpy(~space.has_corpus[task.corpus])
    size = len(task.corpus) - (1 if task.without_self else 0)
    rows = batch or max(1, _SCORES_AT_ONCE // max(1, len(task.corpus)))
    # The results stand before the tiles do: small arrays kept between freed tiles would fragment the heap.
    metrics = {name: np.zeros(len(task.queries)) for name in ("recall_1", "recall_10", "mrr", "ndcg_10")}
    metrics["relevant"] = np.zeros(len(task.queries), np.int64)
    for start in range(0, len(task.queries), rows):
        pins = task.queries[start : start + rows]
        scores = _scores(space, pins, task.corpus, lacking_C)
        relevant = torch.from_numpy(task.relevant(pins)).to(scores.device)
        own = torch.from_numpy(position[pins]).to(scores.device) if task.without_self else None
        for name, values in rank_metrics(scores, relevant, own).items():
            metrics[name][start : start + rows] = values
    missing = ~space.has_query[task.queries]
    for name in ("recall_1", "recall_10", "mrr", "ndcg_10"):
        metrics[name][missing] = 0
    chance = chance_recall(metrics["relevant"], size)
    return QueryMetrics(task.queries, **metrics, chance_10=chance, missing=missing, corpus=size)


def nearest(
    space: Space, queries: np.ndarray, corpus: np.ndarray, k: int, *, without_self: bool
) -> np.ndarray:
    """The k best corpus pins of each query, best first: int64 [Q, min(k, C - without_self)].

    Ties go to the pin that comes first in `corpus`. Pins without a vector are never returned; where fewer
    than k remain, -1 stands at the end. Memory: about 32 bytes per corpus pin and query of a tile.
    """
    lacking_C = torch.from_numpy(~space.has_corpus[corpus])
    rows = max(1, _SCORES_AT_ONCE // max(1, len(corpus)))
    width = max(0, min(k, len(corpus) - (1 if without_self else 0)))
    found = np.full((len(queries), width), -1)
    for start in range(0, len(queries), rows):
        pins = queries[start : start + rows]
        scores = _scores(space, pins, corpus, lacking_C)
        if without_self:
            scores[torch.from_numpy(pins[:, None] == corpus).to(scores.device)] = LACKING
        ordered = scores.sort(dim=1, descending=True, stable=True)
        columns = ordered.indices[:, :width].cpu().numpy()
        absent = (ordered.values[:, :width] == LACKING).cpu().numpy()
        found[start : start + rows] = np.where(absent, -1, corpus[columns])
    return found


def _scores(space: Space, pins: np.ndarray, corpus: np.ndarray, lacking_C: torch.Tensor) -> torch.Tensor:
    scores = space.score(pins, corpus)
    return scores.masked_fill_(lacking_C.to(scores.device), LACKING)
