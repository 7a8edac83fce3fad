import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import make_world, naive_rank_metrics

from pinclip.graph.board_graph import BoardGraph
from pinclip.retrieval.evaluate import EmbeddingTable, degree_strata, evaluate, evaluate_queries
from pinclip.retrieval.metrics import LACKING, chance_recall

KEYS = {"recall@1", "recall@10", "mrr", "ndcg@10", "chance@10", "ci95", "queries", "corpus"}
ARRAYS = ("recall_1", "recall_10", "mrr", "ndcg_10", "chance_10", "relevant")
SEEDS = range(6)


def naive_task(world, queries, corpus, relevant, query, result, without_self):
    """{query pin: metrics}, from the definitions, one query and one corpus pin at a time."""
    table, has = world.table, {"image": world.table.has_image, "text": world.table.has_text}
    has["fused"] = has["image"] | has["text"]
    answers = {}
    for q in queries:
        right = [relevant(q, c) for c in corpus]
        own = corpus.index(q) if without_self else -1
        scores = [
            float(np.float32(getattr(table, query)[q].double() @ getattr(table, result)[c].double()))
            if has[result][c]
            else LACKING
            for c in corpus
        ]
        metrics = naive_rank_metrics(scores, right, own)
        size = len(corpus) - (1 if without_self else 0)
        count = metrics["relevant"]
        if not has[query][q]:
            metrics = dict.fromkeys(metrics, 0.0) | {"relevant": count}
        answers[q] = metrics | {"chance_10": chance_recall(np.array(count), size)}
    return answers


def naive_queries(world):
    table, graph, cold, texts = world.table, world.graph, world.cold, world.texts
    boards = [set(graph.boards_of(p)) for p in range(len(texts))]
    good = [p for p in range(len(texts)) if not table.bad[p]]

    def same_text(a, b):
        return texts[a] == texts[b]

    def share_board(a, b):
        return a != b and bool(boards[a] & boards[b])

    both = [p for p in cold if p in good and table.has_image[p] and table.has_text[p]]
    asked = [q for q in cold if q in good and any(share_board(q, c) for c in good)]
    result = {
        "text_to_image": naive_task(world, both, both, same_text, "text", "image", False),
        "image_to_text": naive_task(world, both, both, same_text, "image", "text", False),
    }
    for kind in ("fused", "image", "text"):
        result[f"pin_to_related/{kind}"] = naive_task(world, asked, good, share_board, kind, kind, True)
    return result


@pytest.mark.parametrize("seed", SEEDS)
def test_every_query_equals_the_definitions(seed):
    world = make_world(seed)
    ours = evaluate_queries(world.table, world.graph, world.cold, world.texts)
    for task, expected in naive_queries(world).items():
        assert list(ours[task].pins) == list(expected)
        for row, metrics in enumerate(expected.values()):
            for name in ARRAYS:
                value = getattr(ours[task], name)[row]
                assert value == pytest.approx(metrics[name], rel=1e-9), (task, name)


def test_the_worlds_hold_what_they_are_made_for():
    worlds = [make_world(seed) for seed in SEEDS]
    results = [evaluate(w.table, w.graph, w.cold, w.texts, bootstrap=10)["skipped"] for w in worlds]
    assert sum(skipped["bad_cold_pins"] for skipped in results) > 0
    assert sum(skipped["cold_without_related_pin"] for skipped in results) > 0
    assert sum(skipped["related_queries_without_vector"]["image"] for skipped in results) > 0
    assert any(len(set(w.texts)) < len(w.texts) - 5 for w in worlds)


@pytest.mark.parametrize("seed", SEEDS)
def test_result_is_complete_and_plain(seed):
    world = make_world(seed)
    result = evaluate(world.table, world.graph, world.cold, world.texts, bootstrap=20, dims=(2, 4))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["pin_to_related"]) == {"fused", "image", "text", "tfidf"}
    tasks = [result["text_to_image"], result["image_to_text"], *result["pin_to_related"].values()]
    assert all(set(task) == KEYS for task in tasks)
    assert set(result["matryoshka"]["pin_to_related"]) == {"fused@2", "fused@4"}
    assert {"text_to_image@2", "image_to_text@4"} < set(result["matryoshka"])
    assert set(result["strata"]) == {"head", "torso", "tail"}
    skipped, table = result["skipped"], world.table
    assert skipped["cold_pins"] == len(world.cold)
    good = len(world.cold) - skipped["bad_cold_pins"]
    assert result["pin_to_related"]["fused"]["queries"] == good - skipped["cold_without_related_pin"]
    assert result["pin_to_related"]["fused"]["corpus"] == int((~table.bad).sum()) - 1


def test_strata_add_up_to_the_whole():
    world = make_world(1)
    result = evaluate(world.table, world.graph, world.cold, world.texts, bootstrap=20)
    parts = [part["pin_to_related"]["fused"] for part in result["strata"].values()]
    whole = result["pin_to_related"]["fused"]
    assert sum(part["queries"] for part in parts) == whole["queries"]
    total = sum(part["queries"] * part["recall@10"] for part in parts if part["queries"])
    assert total / whole["queries"] == pytest.approx(whole["recall@10"])
    assert sum(part["pins"] for part in result["strata"].values()) == len(world.cold)


def test_strata_are_cut_at_thirds_and_never_split_a_degree():
    degrees = np.array([1, 1, 1, 2, 2, 3, 3, 3, 8, 9])
    graph = BoardGraph.from_edges(
        np.repeat(np.arange(10), degrees), np.concatenate([np.arange(d) for d in degrees]), 10, 9
    )
    strata = degree_strata(graph, np.arange(10))
    assert {name: bounds for name, (bounds, _) in strata.items()} == {
        "tail": [1, 1],
        "torso": [2, 3],
        "head": [8, 9],
    }
    assert [int(member.sum()) for _, member in strata.values()] == [2, 5, 3]
    assert degree_strata(graph, np.array([0, 8]))["torso"][0] is None
    assert degree_strata(graph, np.array([0, 1]))["tail"][0] == [1, 1]
    assert all(bounds is None for bounds, _ in degree_strata(graph, np.empty(0, np.int64)).values())


def test_an_oracle_is_perfect_and_a_point_is_not():
    pins = 30
    eye, there, nothing_bad = torch.eye(pins), np.ones(pins, bool), np.zeros(pins, bool)
    boards = np.arange(pins) // 5
    graph = BoardGraph.from_edges(np.arange(pins), boards, pins, 6)
    texts = [f"pin {p // 2}" for p in range(pins)]
    group = torch.nn.functional.one_hot(torch.from_numpy(boards), pins).float()
    pair = torch.nn.functional.one_hot(torch.arange(pins) // 2, pins).float()
    cold = np.arange(0, pins, 3)
    oracle = EmbeddingTable(pair, pair, group, there, there, nothing_bad)
    result = evaluate(oracle, graph, cold, texts, bootstrap=10)
    for task in (result["text_to_image"], result["image_to_text"], result["pin_to_related"]["fused"]):
        assert [task[name] for name in ("recall@1", "recall@10", "mrr", "ndcg@10")] == pytest.approx([1] * 4)
        assert task["ci95"] == [1, 1]
    point = torch.zeros(pins, pins)
    point[:, 0] = 1
    collapsed = EmbeddingTable(point, point, point, there, there, nothing_bad)
    result = evaluate(collapsed, graph, cold, texts, bootstrap=10)
    assert result["pin_to_related"]["fused"]["recall@10"] == 0
    assert result["text_to_image"]["recall@1"] == 0
    orthogonal = EmbeddingTable(eye, eye, eye, there, there, nothing_bad)
    assert evaluate(orthogonal, graph, cold, texts, bootstrap=10)["pin_to_related"]["fused"]["recall@10"] == 0


def test_random_embeddings_reach_chance():
    rng = np.random.default_rng(0)
    pins = 500
    graph = BoardGraph.from_edges(rng.integers(pins, size=1500), rng.integers(30, size=1500), pins, 30)

    def vectors():
        return rng.standard_normal((pins, 16)).astype(np.float32)

    there = np.ones(pins, bool)
    table = EmbeddingTable(vectors(), vectors(), vectors(), there, there, ~there)
    queries = evaluate_queries(table, graph, np.arange(0, 400), [str(p) for p in range(pins)])
    for name in ("text_to_image", "image_to_text", "pin_to_related/fused", "pin_to_related/image"):
        gap = queries[name].recall_10 - queries[name].chance_10
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap)), name


def test_equal_texts_are_one_answer():
    # Pins 0 and 1 have one text; the image of 1 is nearest to it, so both queries are answered rightly.
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    image = torch.tensor([[0.6, 0.8], [1, 0], [0, 1]])
    there = np.ones(3, bool)
    table = EmbeddingTable(image, text, image, there, there, ~there)
    graph = BoardGraph.from_edges([], [], 3, 0)
    queries = evaluate_queries(table, graph, np.arange(3), ["cat", "cat", "dog"])
    assert list(queries["text_to_image"].recall_1) == [1, 1, 1]
    assert list(queries["text_to_image"].relevant) == [2, 2, 1]
    other = evaluate_queries(table, graph, np.arange(3), ["cat", "Cat", "dog"])
    assert list(other["text_to_image"].recall_1) == [0, 1, 1]


def test_a_pin_alone_on_its_boards_is_counted_not_asked():
    # Pin 0 is alone, pin 1 shares its board with a bad pin only, pins 2 and 3 share one.
    graph = BoardGraph.from_edges([0, 1, 4, 2, 3], [0, 1, 1, 2, 2], 5, 3)
    there = np.ones(5, bool)
    table = EmbeddingTable(torch.eye(5), torch.eye(5), torch.eye(5), there, there, np.arange(5) == 4)
    result = evaluate(table, graph, np.arange(5), ["a", "b", "c", "d", "e"], bootstrap=10)
    assert result["pin_to_related"]["fused"]["queries"] == 2
    assert result["skipped"]["cold_without_related_pin"] == 2
    assert result["skipped"]["bad_cold_pins"] == 1


def test_batch_and_order_of_cold_do_not_matter():
    world = make_world(2)
    whole = evaluate(world.table, world.graph, world.cold, world.texts, bootstrap=30, dims=(3,))
    for batch in (1, 7):
        other = evaluate(
            world.table, world.graph, world.cold[::-1], world.texts, bootstrap=30, dims=(3,), batch=batch
        )
        assert other == whole


def test_numbering_of_the_pins_does_not_matter():
    world = make_world(3)
    order = np.random.default_rng(0).permutation(len(world.texts))
    new = np.argsort(order)
    pins = np.repeat(np.arange(len(order)), world.graph.pin_degrees)
    graph = BoardGraph.from_edges(new[pins], world.graph.pin_boards, len(order), world.graph.num_boards)
    t = world.table
    table = EmbeddingTable(
        t.image[order], t.text[order], t.fused[order], t.has_image[order], t.has_text[order], t.bad[order]
    )
    before = evaluate_queries(t, world.graph, world.cold, world.texts)
    after = evaluate_queries(table, graph, new[world.cold], [world.texts[p] for p in order])
    for task in before:
        old = {pin: row for row, pin in enumerate(before[task].pins)}
        rows = [old[order[pin]] for pin in after[task].pins]
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(before[task], name)[rows], getattr(after[task], name))


def test_matryoshka_prefix_of_everything_is_the_whole():
    world = make_world(4)
    queries = evaluate_queries(world.table, world.graph, world.cold, world.texts, dims=(8, 1))
    for task in ("text_to_image", "image_to_text", "pin_to_related/fused"):
        np.testing.assert_array_equal(queries[f"{task}@8"].recall_10, queries[task].recall_10)
    first = world.table.prefix(1)
    assert set(first.fused.abs().unique().tolist()) <= {0.0, 1.0}


def test_no_cold_pins_is_no_result_but_no_error():
    world = make_world(0)
    result = evaluate(world.table, world.graph, np.empty(0, np.int64), world.texts)
    assert result["text_to_image"] == {**dict.fromkeys(KEYS), "queries": 0, "corpus": 0}
    assert result["pin_to_related"]["tfidf"]["recall@10"] is None


def test_arguments_that_do_not_fit_together():
    world = make_world(0)
    with pytest.raises(ValueError, match="60 embeddings, 60 pins in the graph and 59 texts"):
        evaluate(world.table, world.graph, world.cold, world.texts[:-1])
    with pytest.raises(ValueError, match="to 60, of 60 pins"):
        evaluate(world.table, world.graph, np.array([3, 60]), world.texts)
    with pytest.raises(ValueError, match="twice"):
        evaluate(world.table, world.graph, np.array([3, 3]), world.texts)
    with pytest.raises(ValueError, match="prefix of 9"):
        evaluate(world.table, world.graph, world.cold, world.texts, dims=(9,))


def test_embedding_table_checks_and_converts():
    world = make_world(0)
    table = world.table
    from_numpy = replace(table, image=table.image.numpy(), bad=table.bad.tolist())
    assert torch.equal(from_numpy.image, table.image)
    assert from_numpy.bad.dtype == bool
    with pytest.raises(ValueError, match=r"text embeddings have shape \(60, 7\)"):
        replace(table, text=table.text[:, :7])
    broken = table.image.clone()
    broken[np.flatnonzero(table.has("image"))[2], 1] = torch.nan
    with pytest.raises(
        ValueError, match=f"image embedding of pin {np.flatnonzero(table.has('image'))[2]} is"
    ):
        replace(table, image=broken)
    lacking = table.image.clone()
    lacking[torch.from_numpy(~table.has("image"))] = torch.nan
    replace(table, image=lacking)
