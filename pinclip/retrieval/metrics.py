"""Ranking metrics of one query, their means over queries, and confidence intervals.

Legend: Q queries, C corpus columns, R relevant columns of a query, K = 10 the cutoff.

Ties are broken against us: among corpus items of equal score the irrelevant ones come first.  A model that
maps everything to one point therefore scores next to nothing instead of looking like chance, and no result
depends on the order in which pins happen to be stored.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.special import stdtrit

from pinclip.errors import DataError
from pinclip.io import atomic_file

CUTOFF = 10
LACKING = torch.finfo(torch.float32).min
"""Score of a corpus item that has no vector: it stands behind every item that has one."""

_NOT_A_RIVAL = -torch.inf
_RESAMPLES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class QueryMetrics:
    """One retrieval task, query by query.

    pins      int64 [Q]    the query pins, in the order of all other arrays
    recall_1, recall_10, mrr, ndcg_10, chance_10    float64 [Q], see `rank_metrics` and `chance_recall`
    relevant  int64 [Q]    number of relevant corpus items, at least 1
    missing   bool [Q]     the query has no vector in this space: every metric is 0, `chance_10` is not
    corpus    int          number of corpus items that a query is ranked against
    """

    pins: np.ndarray
    recall_1: np.ndarray
    recall_10: np.ndarray
    mrr: np.ndarray
    ndcg_10: np.ndarray
    chance_10: np.ndarray
    relevant: np.ndarray
    missing: np.ndarray
    corpus: int

    def __len__(self) -> int:
        return len(self.pins)

    def select(self, keep: np.ndarray) -> QueryMetrics:
        """The queries that `keep` (bool [Q] or an index) names."""
        arrays = {name: getattr(self, name)[keep] for name in _ARRAYS}
        return QueryMetrics(**arrays, corpus=self.corpus)

    def summary(self, *, bootstrap: int = 1000, seed: int = 0) -> dict:
        """Means over the queries, as plain numbers for JSON; None for a mean over no queries.

        `ci95` is the 95% bootstrap interval of recall@10 (`bootstrap_ci`).
        """
        means = {label: _mean(getattr(self, name)) for label, name in METRICS.items()}
        interval = bootstrap_ci(self.recall_10, bootstrap=bootstrap, seed=seed)
        return {**means, "ci95": interval, "queries": len(self), "corpus": self.corpus}


_ARRAYS = [field.name for field in fields(QueryMetrics) if field.name != "corpus"]

METRICS = {
    "recall@1": "recall_1",
    "recall@10": "recall_10",
    "mrr": "mrr",
    "ndcg@10": "ndcg_10",
    "chance@10": "chance_10",
}
"""Key in the results -> array of `QueryMetrics`."""


def rank_metrics(
    scores: torch.Tensor, relevant: torch.Tensor, own: torch.Tensor | None = None
) -> dict[str, np.ndarray]:
    """Metrics of Q queries from their scores against the whole corpus.

    scores    float [Q, C], finite; `LACKING` for an item without a vector. Overwritten where `own` points.
    relevant  bool [Q, C], at least one per row besides `own`. Overwritten where `own` points.
    own       int64 [Q], the column that is the query itself and not part of its corpus; -1: none

    With the corpus in order of falling score (ties: irrelevant first), the ranks r_1 < r_2 < ... of the R
    relevant items counted from 1:
        recall_1  = [r_1 = 1]                                         (hits@1 / min(1, R))
        recall_10 = #{j : r_j <= 10} / min(10, R)
        mrr       = 1 / r_1                                           (over the whole corpus, no cutoff)
        ndcg_10   = sum_{r_j <= 10} 1/log2(1 + r_j)  /  sum_{i=1}^{min(10, R)} 1/log2(1 + i)
    Returns float64 [Q] arrays by these names, and `relevant` = R as int64 [Q].
    Memory: two copies of the scores.
    """
    if own is not None:
        rows = torch.nonzero(own >= 0).squeeze(1)
        scores[rows, own[rows]] = _NOT_A_RIVAL
        relevant[rows, own[rows]] = False
    count_Q = relevant.sum(1)
    assert bool((count_Q > 0).all()), "a query without a relevant item has no metric"

    k = min(CUTOFF, scores.shape[1])
    best_QK = scores.masked_fill(~relevant, _NOT_A_RIVAL).topk(k).values
    irrelevant_QC = scores.masked_fill(relevant, _NOT_A_RIVAL)
    # The j-th best relevant item stands behind j - 1 relevant ones and every irrelevant one that does not
    # score less. Only ranks up to K matter, so the K best irrelevant items are enough to count.
    rival_QK = irrelevant_QC.topk(k).values
    ahead_QK = (rival_QK[:, None, :] >= best_QK[:, :, None]).sum(2)
    rank_QK = torch.arange(1, k + 1, device=scores.device) + ahead_QK
    hit_QK = (best_QK > _NOT_A_RIVAL) & (rank_QK <= CUTOFF)
    first_Q = 1 + (irrelevant_QC >= best_QK[:, :1]).sum(1)

    reachable_Q = count_Q.clamp(max=CUTOFF)
    gain = 1 / torch.log2(torch.arange(2, CUTOFF + 2, dtype=torch.float64, device=scores.device))
    dcg_Q = torch.where(hit_QK, gain[(rank_QK - 1).clamp(max=CUTOFF - 1)], 0.0).sum(1)
    metrics = {
        "recall_1": (first_Q == 1).double(),
        "recall_10": hit_QK.sum(1).double() / reachable_Q,
        "mrr": 1 / first_Q.double(),
        "ndcg_10": dcg_Q / gain.cumsum(0)[reachable_Q - 1],
        "relevant": count_Q,
    }
    return {name: value.cpu().numpy() for name, value in metrics.items()}


def chance_recall(relevant: np.ndarray, corpus: int, cutoff: int = CUTOFF) -> np.ndarray:
    """Expected recall@cutoff of a random order, exactly; float64, the shape of `relevant`.

    Each of the first min(cutoff, C) places holds a relevant item with probability R / C, so
        E[recall] = min(cutoff, C) * R / C / min(cutoff, R).
    """
    relevant = np.asarray(relevant)
    return min(cutoff, corpus) * relevant / corpus / np.minimum(cutoff, relevant)


def bootstrap_ci(values: np.ndarray, *, bootstrap: int = 1000, seed: int = 0) -> list[float] | None:
    """95% percentile interval [lo, hi] of the mean of `values` [Q] over resampled queries.

    `bootstrap` times, Q queries are drawn with replacement and averaged; the interval is the 2.5% and 97.5%
    quantiles of these means. It says how far the number depends on which pins were asked about, not on the
    seed of the training. The same seed gives the same interval. None for no values or no resamples.
    Memory: 32 MB. Source: Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or not bootstrap:
        return None
    generator = np.random.default_rng(seed)
    step = max(1, _RESAMPLES_AT_ONCE // len(values))
    means = [
        values[generator.integers(len(values), size=(min(step, bootstrap - start), len(values)))].mean(1)
        for start in range(0, bootstrap, step)
    ]
    return [float(bound) for bound in np.quantile(np.concatenate(means), [0.025, 0.975])]


def paired_ci(
    per_query_a: np.ndarray, per_query_b: np.ndarray, *, bootstrap: int = 1000, seed: int = 0
) -> dict:
    """Mean of a - b over the same queries, {"difference", "ci95"}, with the bootstrap interval of that mean.

    The two arrays [Q] hold one metric of two rankings for the same queries in the same order: the queries'
    own difficulty cancels, so the interval is narrower than the distance of two separate ones.
    """
    a, b = np.asarray(per_query_a, np.float64), np.asarray(per_query_b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired values must be two arrays of one length, not {a.shape} and {b.shape}")
    return {"difference": _mean(a - b), "ci95": bootstrap_ci(a - b, bootstrap=bootstrap, seed=seed)}


def t_interval(values: np.ndarray) -> list[float] | None:
    """95% interval [lo, hi] of the mean of n independent runs: mean -+ t(.975, n-1) s / sqrt(n).

    None for fewer than two runs. With three runs t is 4.30: few seeds honestly give wide intervals.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
    return [float(values.mean() - half), float(values.mean() + half)]


def save_queries(path: str | os.PathLike, queries: Mapping[str, QueryMetrics]) -> None:
    """Write the per-query metrics of an evaluation to one .npz file, atomically."""
    arrays = {
        f"{task}:{name}": np.asarray(getattr(metrics, name))
        for task, metrics in queries.items()
        for name in (*_ARRAYS, "corpus")
    }
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_queries(path: str | os.PathLike) -> dict[str, QueryMetrics]:
    """What `save_queries` wrote; `DataError` if `path` is missing or is no such file."""
    tasks: dict[str, dict] = {}
    try:
        with np.load(path) as arrays:
            for key in arrays.files:
                task, name = key.rsplit(":", 1)
                tasks.setdefault(task, {})[name] = arrays[key] if name in _ARRAYS else int(arrays[key])
        return {task: QueryMetrics(**values) for task, values in tasks.items()}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a file of per-query metrics ({error})") from None


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
