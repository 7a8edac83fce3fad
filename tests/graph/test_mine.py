"""Mining a whole graph: the table, its shards, caps, and what stands in its metadata."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pinclip.errors import ConfigError, DataError
from pinclip.graph import mine
from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.folder import GraphFolder
from pinclip.graph.mine import NeighborMiner, capped, mine_pairs
from pinclip.graph.mining import Mining
from pinclip.graph.pairs import NeighborPairs

SPLIT = {"format": 1, "kind": "none", "counts": {"edges": 0, "pins": 0}}
FAST = {"walks": 30, "length": 4, "top_k": 5}


def graph_of(num_pins=120, num_boards=50, num_edges=500, seed=0):
    rng = np.random.default_rng(seed)
    pins = (num_pins * rng.random(num_edges) ** 1.5).astype(int)
    boards = (num_boards * rng.random(num_edges) ** 2).astype(int)
    return BoardGraph.from_edges(pins, boards, num_pins, num_boards)


def folder_of(graph, path="graph", ids=None):
    ids = pa.array(np.arange(graph.num_pins) * 10 if ids is None else ids)
    return GraphFolder(path, graph, ids, pa.array(np.arange(graph.num_boards)), SPLIT)


def edges_of(graph):
    return {(pin, int(board)) for pin in range(graph.num_pins) for board in graph.boards_of(pin)}


@pytest.mark.parametrize("method", ["walk", "cooccurrence"])
@pytest.mark.parametrize("ids", [None, [f"pin {number}" for number in range(120)]])
def test_the_table_holds_what_the_miner_finds(tmp_path, monkeypatch, method, ids):
    monkeypatch.setattr(mine, "_CHUNK", 1500)  # several chunks
    graph = graph_of()
    folder = folder_of(graph, ids=ids)
    mining = Mining(method=method, **FAST)
    assert len(list(NeighborMiner(graph, mining).chunks(0, 120))) > 3
    record = mine_pairs(folder, tmp_path / "pairs.parquet", mining, progress=False)
    table = pq.read_table(tmp_path / "pairs.parquet")
    neighbors, weights = NeighborMiner(graph, mining).mine(np.arange(120))
    names = folder.pin_ids.to_pylist()
    want = [
        (names[pin], names[neighbor], weight)
        for pin in range(120)
        for neighbor, weight in zip(neighbors[pin], weights[pin])
        if neighbor >= 0
    ]
    assert list(zip(*(table[name].to_pylist() for name in ("pin", "neighbor", "weight")))) == want
    assert table.schema.field("pin").type == (pa.int64() if ids is None else pa.string())
    assert record["counts"] == {
        "pins": 120,
        "pins_with_neighbors": int((neighbors >= 0).any(1).sum()),
        "pairs": len(want),
    }
    stored = json.loads(table.schema.metadata[b"pinclip"])
    assert stored["mining"] == dataclasses.asdict(mining) and stored["split"] == SPLIT


@pytest.mark.parametrize("method", ["walk", "cooccurrence"])
def test_shards_are_the_parts_of_the_whole_whatever_the_threads(tmp_path, method):
    folder, mining = folder_of(graph_of()), Mining(method=method, **FAST, board_cap=20, stop_visits=3)
    with mine.threads(1):
        mine_pairs(folder, tmp_path / "whole.parquet", mining, progress=False)
    with mine.threads(3):
        for part in range(3):
            mine_pairs(folder, tmp_path / f"{part}.parquet", mining, shard=(part, 3), progress=False)
    parts = [pq.read_table(tmp_path / f"{part}.parquet") for part in range(3)]
    assert all(len(part) for part in parts)
    whole = pq.read_table(tmp_path / "whole.parquet")
    assert pa.concat_tables(part.replace_schema_metadata() for part in parts).equals(
        whole.replace_schema_metadata()
    )


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), mine.threads(3):
        assert torch.get_num_threads() == 3
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_cooccurrence_follows_the_formula():
    graph = graph_of()
    mining = Mining(method="cooccurrence", top_k=200, damping=0.7, board_damping=1.5)
    neighbors, weights = NeighborMiner(graph, mining).mine(np.arange(120))
    incidence = np.zeros((120, 50))
    for pin, board in edges_of(graph):
        incidence[pin, board] = 1
    want = incidence * np.maximum(graph.board_sizes, 1) ** -1.5 @ incidence.T
    want *= np.maximum(graph.pin_degrees, 1) ** -0.7
    np.fill_diagonal(want, 0)
    got = np.zeros((120, 120))
    rows = np.repeat(np.arange(120), 200).reshape(120, 200)
    got[rows[neighbors >= 0], neighbors[neighbors >= 0]] = weights[neighbors >= 0]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_damping_divides_visits_by_a_power_of_the_degree():
    graph, pins = graph_of(), np.arange(120)
    plain = NeighborMiner(graph, Mining(walks=30, length=4, top_k=200, damping=0.0)).mine(pins)
    damped = NeighborMiner(graph, Mining(walks=30, length=4, top_k=200, damping=0.8)).mine(pins)
    for pin in pins:
        visits = {n: w for n, w in zip(plain[0][pin], plain[1][pin]) if n >= 0}
        weights = {n: w for n, w in zip(damped[0][pin], damped[1][pin]) if n >= 0}
        assert set(visits) == set(weights)
        for neighbor, count in visits.items():
            assert count == int(count)
            want = count * float(graph.pin_degrees[neighbor]) ** -0.8
            assert weights[neighbor] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("cap", [2, 7, 1000])
def test_a_capped_board_keeps_a_random_part(cap):
    graph = graph_of()
    cut = capped(graph, cap, seed=1)
    np.testing.assert_array_equal(cut.board_sizes, np.minimum(graph.board_sizes, cap))
    assert edges_of(cut) <= edges_of(graph)
    for side in (cut.pin_boards, cut.board_pins):
        assert side.dtype == graph.pin_boards.dtype
    want = BoardGraph.from_edges(*zip(*edges_of(cut)), 120, 50)
    for name in ("pin_indptr", "pin_boards", "board_indptr", "board_pins"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(want, name))
        assert getattr(cut, name).dtype == getattr(want, name).dtype
    if cap == 7:
        assert edges_of(capped(graph, cap, seed=2)) != edges_of(cut)


def test_every_pin_of_a_board_is_as_likely_to_be_kept():
    graph = BoardGraph.from_edges(np.arange(40), np.zeros(40, int), 40, 1)
    kept = np.zeros(40)
    for seed in range(400):
        kept += capped(graph, 10, seed).pin_degrees
    # Binomial(400, 1/4) for each pin: five standard deviations, 40 pins, false alarm below 1e-4.
    assert np.abs(kept - 100).max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_a_graph_without_pairs_is_an_error_and_leaves_nothing(tmp_path):
    lonely = folder_of(BoardGraph.from_edges([0, 1], [0, 1], 3, 2))
    with pytest.raises(DataError, match="graph: no pin has a neighbor"):
        mine_pairs(lonely, tmp_path / "pairs.parquet", Mining(**FAST), progress=False)
    assert list(tmp_path.iterdir()) == []
    # A shard of a larger graph may well be empty.
    mine_pairs(lonely, tmp_path / "part.parquet", Mining(**FAST), shard=(1, 2), progress=False)
    assert pq.read_table(tmp_path / "part.parquet").num_rows == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "guess"}, "method is 'guess', want one of walk, cooccurrence"),
        ({"walks": 0}, "walks is 0"),
        ({"length": -1}, "length is -1"),
        ({"restart": 1.5}, "restart is 1.5"),
        ({"restart": float("nan")}, "restart is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"board_cap": 1}, "board_cap is 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ConfigError) as error:
        Mining(**change)
    assert message in str(error.value)


class TestPairs:
    """Reading the table back."""

    IDS = tuple(str(number * 10) for number in range(120))

    @pytest.fixture
    def table(self, tmp_path):
        folder = folder_of(graph_of())
        mine_pairs(folder, tmp_path / "pairs.parquet", Mining(**FAST), progress=False)
        return tmp_path / "pairs.parquet"

    def rewrite(self, path, change):
        """The table with `change(columns)`, a dict of lists, its metadata kept."""
        table = pq.read_table(path)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        changed = pa.table({**columns, **(change(columns) or {})}).replace_schema_metadata(
            table.schema.metadata
        )
        pq.write_table(changed, path)

    def test_the_table_comes_back(self, table):
        pairs = NeighborPairs.load(table, self.IDS)
        neighbors, weights = NeighborMiner(graph_of(), Mining(**FAST)).mine(np.arange(120))
        for pin in range(120):
            mine_ = slice(pairs.indptr[pin], pairs.indptr[pin + 1])
            want = {(n, w) for n, w in zip(neighbors[pin], weights[pin]) if n >= 0}
            assert set(zip(pairs.neighbors[mine_], pairs.weights[mine_])) == want
            assert (np.diff(pairs.neighbors[mine_]) > 0).all()
        assert pairs.dropped == 0 and pairs.num_pins == 120

    def test_another_numbering_and_missing_pins(self, table):
        ids = self.IDS[:0:-1]  # turned round, and without pin 0
        pairs, whole = NeighborPairs.load(table, ids), NeighborPairs.load(table, self.IDS)
        pin_of = np.repeat(np.arange(120), np.diff(whole.indptr))
        gone = (pin_of == 0) | (whole.neighbors == 0)
        assert pairs.dropped == gone.sum() > 0
        assert len(pairs.neighbors) == (~gone).sum()
        usable = np.arange(120) != 0
        again = NeighborPairs.load(table, self.IDS, usable)
        assert again.dropped == pairs.dropped and (again.neighbors != 0).all()
        with pytest.raises(DataError, match="no pair names two pins of the data set"):
            NeighborPairs.load(table, ["x", "y"])

    def test_shards_are_joined_and_a_missing_one_is_named(self, table, tmp_path):
        shards = tmp_path / "shards"
        for part in range(3):
            out = shards / f"{part}.parquet"
            mine_pairs(folder_of(graph_of()), out, Mining(**FAST), shard=(part, 3), progress=False)
        joined, whole = NeighborPairs.load(shards, self.IDS), NeighborPairs.load(table, self.IDS)
        np.testing.assert_array_equal(joined.neighbors, whole.neighbors)
        np.testing.assert_array_equal(joined.weights, whole.weights)
        (shards / "1.parquet").unlink()
        with pytest.raises(DataError, match="has the shards 0/3, 2/3, want each of 3 once"):
            NeighborPairs.load(shards, self.IDS)
        other = Mining(**FAST, seed=1)
        mine_pairs(folder_of(graph_of()), shards / "1.parquet", other, shard=(1, 3), progress=False)
        with pytest.raises(DataError, match=r"1\.parquet: mined otherwise than .*0\.parquet"):
            NeighborPairs.load(shards, self.IDS)

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda c: {"weight": [0.0, *c["weight"][1:]]}, r"row 1: weight 0\.0 is not above zero"),
            (lambda c: {"weight": [*c["weight"][:-1], float("nan")]}, "weight nan is not above zero"),
            (lambda c: {"weight": [1] * len(c["weight"])}, "column 'weight' holds int64"),
            (lambda c: {"neighbor": [c["pin"][0], *c["neighbor"][1:]]}, "row 1: pin '0' is paired with"),
            (lambda c: {"pin": [None, *c["pin"][1:]]}, "row 1: no 'pin'"),
            (
                lambda c: {name: [c[name][0], *values[:-1]] for name, values in c.items()},
                "is there twice",
            ),
        ],
    )
    def test_what_is_no_table_of_pairs(self, table, change, message):
        self.rewrite(table, change)
        with pytest.raises(DataError, match=message):
            NeighborPairs.load(table, self.IDS)

    def test_a_table_of_somebody_else_says_nothing_of_a_split(self, table):
        pq.write_table(pq.read_table(table).replace_schema_metadata(), table)
        with pytest.raises(DataError, match="not a table that `pinclip graph mine` wrote"):
            NeighborPairs.load(table, self.IDS)
        table.write_bytes(table.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"pairs\.parquet"):
            NeighborPairs.load(table, self.IDS)

    @pytest.mark.parametrize(
        "split, message",
        [
            ({"kind": "none"}, "withheld nothing, the run withholds pins with data.cold_fraction = 0.15"),
            ({"kind": "pins", "fraction": 0.1, "seed": 0}, "fraction 0.1 and seed 0"),
            ({"kind": "pins", "fraction": 0.15, "seed": 1}, "fraction 0.15 and seed 1"),
            ({"kind": "edges", "fraction": 0.15, "seed": 0}, "withheld edges, not pins"),
            ({"kind": "time"}, "withheld the latest edges"),
        ],
    )
    def test_another_split_is_refused(self, table, split, message):
        pairs = NeighborPairs.load(table, self.IDS)
        good = {"split": {"kind": "pins", "fraction": 0.15, "seed": 0}}
        dataclasses.replace(pairs, record=good).check_split("p", 0.15, 0)
        with pytest.raises(DataError, match=message):
            dataclasses.replace(pairs, record={"split": split}).check_split("p", 0.15, 0)
