import numpy as np
import pytest
import torch
from worlds import naive_rank_metrics

from pinclip.retrieval.metrics import LACKING
from pinclip.retrieval.spaces import Space, Task, dense_space, nearest, rank_queries

ALL = np.ones(40, bool)


def vectors(seed, rows=40, dim=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def test_scores_are_the_exact_dot_products():
    x, y = vectors(0), vectors(1)
    queries, corpus = np.array([3, 3, 0]), np.arange(5, 40, 2)
    scores = dense_space(x, y, ALL, ALL).score(queries, corpus)
    exact = x.double().numpy()[queries] @ y.double().numpy()[corpus].T
    np.testing.assert_array_equal(scores.numpy(), exact.astype(np.float32))


def test_equal_vectors_tie_wherever_they_stand():
    # 769 is past one register block and D = 257 leaves a remainder: where fp32 kernels round differently.
    y = vectors(0, 769, 257)
    y[::3] = y[0]
    scores = dense_space(y, y, np.ones(769, bool), np.ones(769, bool)).score(np.arange(64), np.arange(769))
    assert (scores[:, ::3] == scores[:, :1]).all()


@pytest.mark.parametrize("without_self", [False, True])
def test_rank_queries_equals_the_sort_at_every_batch_size(without_self):
    x = vectors(2, 40, 3).mul(2).round()
    has_query, has_corpus = np.random.default_rng(0).random((2, 40)) < 0.8
    space = dense_space(x, x, has_query, has_corpus)
    queries, corpus = np.array([31, 2, 17, 8, 30]), np.arange(1, 40)
    relevant = np.random.default_rng(1).random((40, 40)) < 0.2
    relevant[:, 1] = relevant[:, 2] = True
    task = Task(queries, corpus, lambda pins: relevant[pins][:, corpus], without_self)
    scores = np.where(has_corpus, (x.double() @ x.double().T).float().numpy(), LACKING)
    for batch in (None, 1, 2, 5):
        ours = rank_queries(space, task, batch=batch)
        assert ours.corpus == (38 if without_self else 39)
        for row, pin in enumerate(queries):
            own = int(np.flatnonzero(corpus == pin)[0]) if without_self else -1
            naive = naive_rank_metrics(scores[pin, corpus].tolist(), relevant[pin, corpus].tolist(), own)
            count = naive.pop("relevant")
            assert ours.relevant[row] == count
            assert ours.missing[row] == (not has_query[pin])
            for name, value in naive.items():
                expected = value if has_query[pin] else 0.0
                assert getattr(ours, name)[row] == pytest.approx(expected, rel=1e-12), (name, pin)
            assert ours.chance_10[row] == pytest.approx(10 * count / ours.corpus / min(10, count))


def test_vectors_that_do_not_exist_are_never_looked_at():
    x = vectors(3)
    has = ALL.copy()
    has[[4, 9]] = False
    task = Task(np.array([4, 5, 6]), np.arange(40), lambda pins: np.ones((len(pins), 40), bool), True)
    clean = rank_queries(dense_space(x, x, has, has), task)
    broken = x.clone()
    broken[[4, 9]] = torch.nan
    dirty = rank_queries(dense_space(broken, broken, has, has), task)
    for name in ("recall_1", "recall_10", "mrr", "ndcg_10"):
        np.testing.assert_array_equal(getattr(clean, name), getattr(dirty, name))
    assert list(clean.missing) == [True, False, False]
    assert list(clean.recall_10) == [0, 1, 1]


def test_no_more_scores_at_once_than_the_batch_says():
    asked = []

    def score(queries, corpus):
        asked.append((len(queries), len(corpus)))
        return torch.zeros(len(queries), len(corpus))

    task = Task(np.arange(7), np.arange(40), lambda pins: np.ones((len(pins), 40), bool), False)
    rank_queries(Space(score, ALL, ALL), task, batch=3)
    assert asked == [(3, 40), (3, 40), (1, 40)]


def test_no_queries():
    task = Task(np.empty(0, np.int64), np.arange(40), lambda pins: np.ones((0, 40), bool), True)
    ours = rank_queries(dense_space(vectors(0), vectors(0), ALL, ALL), task)
    assert len(ours) == 0
    assert ours.summary()["recall@10"] is None


def test_nearest_is_the_stable_sort():
    x = vectors(5, 40, 2).mul(2).round()
    corpus = np.arange(3, 40)
    found = nearest(dense_space(x, x, ALL, ALL), np.array([0, 10, 39]), corpus, 6, without_self=True)
    scores = (x.double() @ x.double().T).numpy()
    for row, pin in enumerate([0, 10, 39]):
        order = sorted((c for c in corpus if c != pin), key=lambda c: (-scores[pin, c], c))
        assert list(found[row]) == order[:6]


def test_nearest_never_returns_what_has_no_vector():
    x, has = vectors(6), np.zeros(40, bool)
    has[[7, 8]] = True
    found = nearest(dense_space(x, x, has, has), np.array([7, 8]), np.arange(40), 3, without_self=True)
    assert found.tolist() == [[8, -1, -1], [7, -1, -1]]
    narrow = nearest(dense_space(x, x, ALL, ALL), np.array([1]), np.arange(3), 10, without_self=True)
    assert sorted(narrow[0]) == [0, 2]
