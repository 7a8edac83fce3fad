import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import naive_rank_metrics

from pinclip.errors import DataError
from pinclip.retrieval import metrics
from pinclip.retrieval.metrics import (
    LACKING,
    QueryMetrics,
    bootstrap_ci,
    chance_recall,
    load_queries,
    paired_ci,
    rank_metrics,
    save_queries,
    t_interval,
)

NAMES = ("recall_1", "recall_10", "mrr", "ndcg_10")


@st.composite
def rankings(draw):
    """Few distinct scores, so that most pairs tie; corpora on both sides of the cutoff of 10."""
    queries, corpus = draw(st.integers(1, 4)), draw(st.integers(2, 25))
    seed, levels = draw(st.integers(0, 2**32)), draw(st.sampled_from([1, 2, 5, 1000]))
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels + 1, size=(queries, corpus)).astype(np.float32)
    relevant = rng.random((queries, corpus)) < draw(st.sampled_from([0.05, 0.3, 0.9]))
    own = rng.integers(-1, corpus, size=queries)
    relevant[np.arange(queries), (own + 1) % corpus] = True
    return scores, relevant, own


def rank(scores, relevant, own=None):
    own = None if own is None else torch.from_numpy(own)
    return rank_metrics(torch.from_numpy(scores.copy()), torch.from_numpy(relevant.copy()), own)


@given(rankings())
@settings(max_examples=300, deadline=None)
def test_equals_the_sort(case):
    scores, relevant, own = case
    ours = rank(scores, relevant, own)
    for row in range(len(scores)):
        naive = naive_rank_metrics(scores[row].tolist(), relevant[row].tolist(), own[row])
        for name, value in naive.items():
            assert ours[name][row] == pytest.approx(value, rel=1e-12), name


@given(rankings(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_depends_on_the_order_of_scores_alone(case, random):
    scores, relevant, own = case
    columns = list(range(scores.shape[1]))
    random.shuffle(columns)
    moved = np.where(own >= 0, np.argsort(columns)[own], -1)
    plain = rank(scores, relevant, own)
    other = rank(np.arctan(scores)[:, columns], relevant[:, columns], moved)
    for name in NAMES:
        np.testing.assert_array_equal(plain[name], other[name])


@given(rankings(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_ties_count_against_us(case, seed):
    scores, relevant, own = case
    jitter = np.random.default_rng(seed).random(scores.shape).astype(np.float32) / 2
    tied, broken = rank(scores, relevant, own), rank(scores + jitter, relevant, own)
    for name in NAMES:
        assert (tied[name] <= broken[name] + 1e-15).all()


@given(rankings())
@settings(max_examples=100, deadline=None)
def test_bounds_and_perfection(case):
    scores, relevant, own = case
    ours = rank(scores, relevant, own)
    for name in NAMES:
        assert ((ours[name] >= 0) & (ours[name] <= 1)).all()
    assert (ours["recall_1"] <= ours["mrr"]).all()
    best = rank(relevant.astype(np.float32), relevant, own)
    for name in NAMES:
        np.testing.assert_allclose(best[name], 1, rtol=1e-15)


def test_worked_example():
    # Order by score: columns 3 2 0 1 4; relevant are 2 and 1, at places 2 and 4.
    scores = np.array([[0.5, 0.2, 0.8, 0.9, -1.0]], np.float32)
    relevant = np.array([[False, True, True, False, False]])
    ours = rank(scores, relevant)
    assert ours["recall_1"] == 0
    assert ours["recall_10"] == 1
    assert ours["mrr"] == 0.5
    expected = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert ours["ndcg_10"] == pytest.approx(expected, rel=1e-14)


def test_everything_at_one_point_scores_next_to_nothing():
    relevant = np.zeros((1, 1000), bool)
    relevant[0, :100] = True
    ours = rank(np.ones((1, 1000), np.float32), relevant)
    assert ours["recall_10"] == 0
    assert ours["mrr"] == 1 / 901


def test_items_without_vector_stand_last():
    scores = np.array([[-0.9, LACKING, -0.5]], np.float32)
    ours = rank(scores, np.array([[False, True, False]]))
    assert ours["mrr"] == 1 / 3


def test_query_without_relevant_item_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="without a relevant"):
        rank(np.zeros((1, 3), np.float32), np.zeros((1, 3), bool))


@pytest.mark.parametrize(("corpus", "relevant", "cutoff"), [(6, 2, 3), (6, 5, 3), (4, 1, 4), (3, 2, 5)])
def test_chance_is_the_mean_over_all_orders(corpus, relevant, cutoff):
    items = [True] * relevant + [False] * (corpus - relevant)
    recalls = [sum(order[:cutoff]) / min(cutoff, relevant) for order in itertools.permutations(items, corpus)]
    assert chance_recall(np.array([relevant]), corpus, cutoff)[0] == pytest.approx(
        np.mean(recalls), rel=1e-12
    )


def test_chance_is_what_random_scores_reach():
    rng = np.random.default_rng(0)
    relevant = np.zeros((4000, 50), bool)
    relevant[:, :14] = True
    ours = rank(rng.random((4000, 50), np.float32), relevant)["recall_10"]
    error = ours.std() / np.sqrt(len(ours))
    assert abs(ours.mean() - chance_recall(np.array([14]), 50)[0]) < 4 * error


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    samples = rng.random((300, 80)) < 0.4
    intervals = [bootstrap_ci(sample, bootstrap=400, seed=seed) for seed, sample in enumerate(samples)]
    covered = np.mean([low <= 0.4 <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.985


def test_bootstrap_is_seeded_and_in_constant_memory(monkeypatch):
    values = np.random.default_rng(1).random(50)
    first = bootstrap_ci(values, seed=3)
    assert first == bootstrap_ci(values, seed=3)
    assert first != bootstrap_ci(values, seed=4)
    assert first[0] < values.mean() < first[1]
    monkeypatch.setattr(metrics, "_RESAMPLES_AT_ONCE", 7 * 50)
    assert bootstrap_ci(values, seed=3) == first


def test_bootstrap_of_nothing_and_of_a_constant():
    assert bootstrap_ci(np.empty(0)) is None
    assert bootstrap_ci(np.ones(3), bootstrap=0) is None
    assert bootstrap_ci(np.full(9, 0.25)) == [0.25, 0.25]


def test_paired_interval_is_narrower_than_the_difficulty_of_the_queries():
    rng = np.random.default_rng(0)
    difficulty = rng.random(200)
    better = difficulty + 0.05 + 0.01 * rng.random(200)
    paired = paired_ci(better, difficulty)
    low, high = paired["ci95"]
    assert paired["difference"] == pytest.approx((better - difficulty).mean())
    assert 0.05 < low < paired["difference"] < high < 0.06
    wide = bootstrap_ci(better)
    assert wide[1] - wide[0] > 10 * (high - low)
    with pytest.raises(ValueError, match="one length"):
        paired_ci(better, difficulty[:-1])


def test_t_interval():
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 == pytest.approx(4.302652729911275 / np.sqrt(3), rel=1e-9)
    assert (high + low) / 2 == pytest.approx(2)
    assert t_interval([1.0]) is None


def _metrics(count=5):
    rng = np.random.default_rng(count)
    relevant = rng.integers(1, 9, count)
    floats = {name: rng.random(count) for name in ("recall_1", "recall_10", "mrr", "ndcg_10", "chance_10")}
    return QueryMetrics(np.arange(count) * 3, **floats, relevant=relevant, missing=relevant > 4, corpus=77)


def test_summary_is_the_mean_and_survives_no_queries():
    queries = _metrics()
    summary = queries.summary(bootstrap=50)
    assert summary["mrr"] == pytest.approx(queries.mrr.mean())
    assert summary["ci95"] == bootstrap_ci(queries.recall_10, bootstrap=50)
    assert (summary["queries"], summary["corpus"]) == (5, 77)
    nothing = queries.select(np.zeros(5, bool)).summary()
    assert nothing == {**dict.fromkeys(summary), "queries": 0, "corpus": 77}


def test_save_and_load(tmp_path):
    queries = {"text_to_image@64": _metrics(5), "pin_to_related/fused": _metrics(3)}
    save_queries(tmp_path / "queries.npz", queries)
    loaded = load_queries(tmp_path / "queries.npz")
    assert list(loaded) == list(queries)
    for name, ours in queries.items():
        for field in ("pins", *NAMES, "chance_10", "relevant", "missing"):
            np.testing.assert_array_equal(getattr(loaded[name], field), getattr(ours, field))
        assert loaded[name].corpus == 77


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_load_names_the_file_that_is_wrong(tmp_path, content):
    path = tmp_path / "queries.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"queries\.npz"):
        load_queries(path)


def test_load_refuses_a_truncated_file(tmp_path):
    path = tmp_path / "queries.npz"
    save_queries(path, {"a": _metrics()})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"queries\.npz"):
        load_queries(path)
