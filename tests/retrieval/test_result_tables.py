import json
from dataclasses import replace

import numpy as np
import pytest
from worlds import make_world

from pinclip.retrieval.evaluate import EmbeddingTable, evaluate_queries, summarize
from pinclip.retrieval.metrics import bootstrap_ci, t_interval
from pinclip.retrieval.tables import ablation, ablation_table, aligned, evaluation_table, skipped_line

SEEDS = (0, 1, 2)
FUSED = "pin_to_related/fused"


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def _evaluated(seed, shift=None):
    """World 0 with embeddings of its own for each seed; `shift` takes another seed's."""
    world = make_world(0)
    other = make_world(100 + seed + (shift or 0)).table
    table = EmbeddingTable(
        other.image, other.text, other.fused, world.table.has_image, world.table.has_text, world.table.bad
    )
    queries = evaluate_queries(table, world.graph, world.cold, world.texts, dims=(4,))
    return queries, summarize(queries, table, world.graph, world.cold, bootstrap=20)


@pytest.fixture(scope="module")
def experiment():
    arms = {arm: {seed: _evaluated(seed, shift) for seed in SEEDS} for arm, shift in (("off", 0), ("on", 10))}
    queries = {arm: {seed: pair[0] for seed, pair in by_seed.items()} for arm, by_seed in arms.items()}
    runs = {arm: {seed: pair[1] for seed, pair in by_seed.items()} for arm, by_seed in arms.items()}
    return runs, queries


def test_evaluation_table_holds_every_number(experiment):
    result = experiment[0]["off"][0]
    text = evaluation_table(result)
    tables = text.split("\n\n")
    for table in tables[:3]:
        assert len({len(line) for line in table.split("\n")}) == 1, "columns are aligned"
    tasks = {_cells(line)[0]: _cells(line) for line in tables[0].split("\n")[2:]}
    m = result["pin_to_related"]["tfidf"]
    low, high = m["ci95"]
    assert tasks["pin → related, TF-IDF of text"][1:] == [
        f"{m['recall@1']:.3f}",
        f"{m['recall@10']:.3f}",
        f"{low:.3f} … {high:.3f}",
        f"{m['mrr']:.3f}",
        f"{m['ndcg@10']:.3f}",
        f"{m['chance@10']:.3f}",
        f"{m['queries']}",
        f"{m['corpus']}",
    ]
    tail = result["strata"]["tail"]
    assert f"{tail['text_to_image']['recall@10']:.3f}" in tables[1]
    assert f"({tail['pins']} pins)" in tables[1]
    assert f"{result['matryoshka']['pin_to_related']['fused@4']['recall@10']:.3f}" in tables[2]


def test_what_could_not_be_measured_is_a_dash():
    world = make_world(0)
    nobody = np.empty(0, np.int64)
    queries = evaluate_queries(world.table, world.graph, nobody, world.texts)
    text = evaluation_table(summarize(queries, world.table, world.graph, nobody))
    row = _cells(text.split("\n")[2])
    assert row == ["text → image", *["–"] * 6, "0", "0"]
    assert "tail (no pins)" in text


def test_skipped_line_says_what_was_skipped_and_no_more():
    nothing = {
        "cold_pins": 1200,
        "bad_cold_pins": 0,
        "bad_pins": 3,
        "cold_without_image": 0,
        "cold_without_text": 0,
        "cold_without_related_pin": 0,
        "related_queries_without_vector": {"fused": 0, "image": 0},
    }
    assert skipped_line(nothing) == "1,200 held-out pins: every one was asked about."
    some = nothing | {"bad_cold_pins": 2, "cold_without_text": 5}
    some["related_queries_without_vector"] = {"fused": 0, "text": 5}
    assert skipped_line(some) == (
        "1,200 held-out pins: 2 unreadable, 5 without text. Counted as misses for want of a vector: 5 text."
    )


def test_ablation_pairs_by_seed_and_by_query(experiment):
    runs, queries = experiment
    result = ablation(runs, queries)
    off, on = (
        [runs[arm][seed]["pin_to_related"]["fused"]["recall@10"] for seed in SEEDS] for arm in ("off", "on")
    )
    arm = result["arms"]["on"][FUSED]
    assert arm["mean"] == pytest.approx(np.mean(on))
    assert arm["ci95"] == t_interval(on)
    difference = result["differences"]["on"][FUSED]
    assert difference["mean"] == pytest.approx(np.mean(on) - np.mean(off))
    assert difference["ci95"] == pytest.approx(t_interval(np.subtract(on, off)))
    each = [queries["on"][s][FUSED].recall_10 - queries["off"][s][FUSED].recall_10 for s in SEEDS]
    assert difference["ci95_queries"] == pytest.approx(bootstrap_ci(np.mean(each, 0)))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_ablation_over_seeds_with_other_queries_averages_by_pin(experiment):
    runs, queries = experiment
    keep = np.arange(len(queries["off"][1][FUSED])) < 3
    fewer = {
        arm: {
            seed: {task: metrics.select(keep) if seed == 1 and task == FUSED else metrics}
            for seed, by_task in by_seed.items()
            for task, metrics in by_task.items()
            if task == FUSED
        }
        for arm, by_seed in queries.items()
    }
    result = ablation(runs, fewer, tasks=(FUSED,))
    each = np.array([queries["on"][s][FUSED].recall_10 - queries["off"][s][FUSED].recall_10 for s in SEEDS])
    by_pin = np.where(keep, each.mean(0), each[[0, 2]].mean(0))
    assert result["differences"]["on"][FUSED]["ci95_queries"] == pytest.approx(bootstrap_ci(by_pin))


def test_ablation_table(experiment):
    result = ablation(*experiment)
    table, note = ablation_table(result).split("\n\n")
    lines = table.split("\n")
    assert len({len(line) for line in lines}) == 1
    names = [_cells(line)[0] for line in lines]
    assert names[2:] == ["off", "on", "on − off, over seeds", "on − off, over queries"]
    cell = result["arms"]["off"]["text_to_image"]
    assert f"{cell['mean']:.3f} [{cell['ci95'][0]:.3f}, {cell['ci95'][1]:.3f}]" in lines[2]
    difference = result["differences"]["on"][FUSED]
    assert f"{difference['mean']:+.3f} [{difference['ci95'][0]:+.3f}, " in lines[4]
    assert "3 seeds [0, 1, 2]" in note


def test_ablation_of_one_seed_gives_no_interval(experiment):
    runs = {arm: {0: by_seed[0]} for arm, by_seed in experiment[0].items()}
    result = ablation(runs, metric="mrr")
    assert result["arms"]["on"][FUSED]["ci95"] is None
    assert result["arms"]["on"][FUSED]["mean"] == runs["on"][0]["pin_to_related"]["fused"]["mrr"]
    text = ablation_table(result)
    assert "over queries |" not in text
    assert "[" not in text.split("\n")[2]


def test_ablation_refuses_what_cannot_be_paired(experiment):
    runs, queries = experiment
    with pytest.raises(ValueError, match="'on' has the seeds"):
        ablation({"off": runs["off"], "on": {0: runs["on"][0]}})
    moved = queries["on"][2] | {
        FUSED: replace(queries["on"][2][FUSED], pins=queries["on"][2][FUSED].pins + 1)
    }
    with pytest.raises(ValueError, match="different pins with seed 2"):
        ablation(runs, {"off": queries["off"], "on": queries["on"] | {2: moved}})


def test_aligned():
    assert aligned(["a", "long"], [["first", "1"], ["b", "23"]]) == (
        "| a     | long |\n|-------|-----:|\n| first |    1 |\n| b     |   23 |"
    )
