"""The external build against plain dicts and sets, and its independence of order, memory and threads."""

import csv
import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinclip import tables
from pinclip.errors import DataError
from pinclip.graph import board_graph, build, edge_source, ingest, splits, statistics
from pinclip.graph.build import Holdout, build_graph
from pinclip.graph.edge_source import EdgeArrays, EdgeTables, Moment
from pinclip.graph.folder import GraphFolder
from pinclip.graph.pruning import Pruning

MANY = [HealthCheck.function_scoped_fixture]


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers, batches and chunks of a few rows, so that a few rows make many runs and many ranges."""

    def set_rows(rows):
        monkeypatch.setattr(ingest, "_MAX_ROWS", rows)
        monkeypatch.setattr(build, "_CHUNK", rows)
        monkeypatch.setattr(board_graph, "_CHUNK", rows)
        monkeypatch.setattr(tables, "_BATCH", rows)
        monkeypatch.setattr(edge_source, "_ARRAY_BATCH", rows)
        monkeypatch.setattr(statistics, "plot", lambda graph, path: path.write_bytes(b""))

    return set_rows


def plain_build(rows, since, pruning, holdout):
    """(sorted pin ids, sorted board ids, training edges, withheld edges) of rows (pin, board, time)."""
    age = {}
    for pin, board, time in rows:
        if since is None or time >= since:
            age[pin, board] = min(time, age.get((pin, board), time))
    pins, boards = {pin for pin, _ in age}, {board for _, board in age}
    sizes = Counter(board for _, board in age)
    if pruning.max_board is not None:
        boards = {board for board in boards if sizes[board] <= pruning.max_board}
    while True:
        left = {edge for edge in age if edge[0] in pins and edge[1] in boards}
        sizes, degrees = Counter(board for _, board in left), Counter(pin for pin, _ in left)
        few_boards = {board for board in boards if sizes[board] < pruning.min_board}
        few_pins = {pin for pin in pins if degrees[pin] < pruning.min_pin}
        if not few_boards and not few_pins:
            break
        boards, pins = boards - few_boards, pins - few_pins

    def is_held(pin, board):
        if holdout.kind == "pins":
            return splits.is_withheld(str(pin), holdout.fraction, holdout.seed)
        if holdout.kind == "edges":
            hashes = [splits.id_hashes([id_], holdout.seed) for id_ in (pin, board)]
            return bool(splits.below(splits.edge_hashes(*hashes), holdout.fraction)[0])
        return holdout.kind == "time" and age[pin, board] >= holdout.since.value

    held = {edge for edge in left if is_held(*edge)}
    return sorted(pins), sorted(boards), left - held, held


def edges_by_id(graph, pin_ids, board_ids):
    """The edges of a graph by id, the same from both directions."""
    by_pin = {(pin_ids[pin], board_ids[b]) for pin in range(graph.num_pins) for b in graph.boards_of(pin)}
    by_board = {
        (pin_ids[pin], board_ids[board]) for board in range(graph.num_boards) for pin in graph.pins_of(board)
    }
    assert by_pin == by_board
    assert len(by_pin) == graph.num_edges
    return by_pin


def assert_equals_plain(folder, rows, since, pruning, holdout):
    pins, boards, training, held = plain_build(rows, since, pruning, holdout)
    graph = GraphFolder.open(folder)
    pin_ids, board_ids = graph.pin_ids.to_pylist(), graph.board_ids.to_pylist()
    assert (pin_ids, board_ids) == (pins, boards)
    assert edges_by_id(graph.graph, pin_ids, board_ids) == training
    if held:
        assert edges_by_id(graph.withheld, pin_ids, board_ids) == held
    else:
        assert graph.withheld is None
        assert not (folder / "withheld").exists()
    graph.check_split()
    return graph


def write_table(path, rows, integers):
    """Rows (pin, board, time) as a table of the suffix's kind."""
    columns = dict(zip(("pin", "board", "time"), zip(*rows) if rows else ((), (), ())))
    if path.suffix == ".parquet":
        kinds = [pa.int64() if whole else pa.string() for whole in integers]
        arrays = [pa.array(columns[name], kind) for name, kind in zip(("pin", "board"), kinds)]
        table = pa.table([*arrays, pa.array(columns["time"], pa.int64())], ["pin", "board", "time"])
        pq.write_table(table, path, row_group_size=5)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(dict(zip(columns, (p, b, str(t))))) for p, b, t in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)


@st.composite
def cases(draw):
    integers = (draw(st.booleans()), draw(st.booleans()))
    words = st.text("aAbé0\U0001f600", min_size=1, max_size=3)
    ids = [
        draw(st.lists(st.integers(0, 2**63 - 1) if whole else words, min_size=1, max_size=9, unique=True))
        for whole in integers
    ]
    edge = st.tuples(st.sampled_from(ids[0]), st.sampled_from(ids[1]), st.integers(-5, 5))
    rows = draw(st.lists(edge, min_size=1, max_size=50))
    files = draw(st.integers(1, min(3, len(rows))))  # a JSONL of no rows has no columns either
    suffixes = [".parquet"] if any(integers) else [".parquet", ".csv", ".tsv", ".jsonl"]
    names = [f"{part}{draw(st.sampled_from(suffixes))}" for part in range(files)]
    since = draw(st.none() | st.integers(-5, 5))
    low = draw(st.integers(0, 4))
    pruning = Pruning(low, draw(st.none() | st.integers(max(low, 1), 8)), draw(st.integers(0, 3)))
    share = st.sampled_from([0.0, 0.2, 0.5, 1.0])
    holdout = draw(
        st.just(Holdout())
        | st.builds(Holdout, st.sampled_from(["pins", "edges"]), share, st.integers(0, 9))
        | st.builds(lambda since: Holdout("time", since=Moment(str(since))), st.integers(-5, 6))
    )
    return integers, rows, names, since, pruning, holdout, draw(st.integers(1, 9)), draw(st.integers(1, 3))


@settings(max_examples=100, deadline=None, suppress_health_check=MANY)
@given(cases())
def test_build_equals_dicts_and_sets(tmp_path_factory, small_buffers, case):
    integers, rows, names, since, pruning, holdout, buffer, threads = case
    small_buffers(buffer)
    folder = tmp_path_factory.mktemp("case")
    for part, name in enumerate(names):
        write_table(folder / name, rows[part :: len(names)], integers)
    arguments = {
        "since": None if since is None else Moment(str(since)),
        "pruning": pruning,
        "holdout": holdout,
        "threads": threads,
        "progress": False,
    }
    source = EdgeTables([folder / name for name in names])
    if not plain_build(rows, since, pruning, holdout)[2]:
        with pytest.raises(DataError, match="no edge"):
            build_graph(source, folder / "g", **arguments)
        assert not (folder / "g").exists()
        return
    stats = build_graph(source, folder / "g", **arguments)
    graph = assert_equals_plain(folder / "g", rows, since, pruning, holdout)
    assert json.loads((folder / "g" / "stats.json").read_text()) == stats == graph.stats
    kept = [row for row in rows if since is None or row[2] >= since]
    assert stats["input"] == {
        "rows": len(rows),
        "rows_before_since": len(rows) - len(kept),
        "duplicates": len(kept) - len({row[:2] for row in kept}),
    }


def test_the_graph_is_the_same_for_any_order_memory_and_threads(tmp_path, small_buffers):
    rng = random.Random(0)
    rows = [(f"p{rng.randrange(40)}", f"b{rng.randrange(15)}", rng.randrange(9)) for _ in range(300)]
    seen = set()
    for trial, (buffer, threads) in enumerate([(2, 1), (7, 2), (1000, 3), (64, 2)]):
        small_buffers(buffer)
        folder = tmp_path / str(trial)
        folder.mkdir()
        for part in range(trial + 1):
            write_table(folder / f"{part}.csv", rows[part :: trial + 1], (False, False))
        build_graph(
            EdgeTables([folder]),
            tmp_path / "g",
            pruning=Pruning(3, 25, 2),
            holdout=Holdout("edges", 0.3, 1),
            threads=threads,
            progress=False,
        )
        seen.add(tuple((p.name, p.read_bytes()) for p in sorted((tmp_path / "g").rglob("*")) if p.is_file()))
        rng.shuffle(rows)
    assert len(seen) == 1
    names = [name for name, _ in seen.pop()]
    assert names.count("graph.json") == 2
    assert "degrees.png" in names


def test_integers_and_their_text_are_withheld_alike(tmp_path):
    rng = np.random.default_rng(0)
    pins, boards = rng.integers(0, 300, 3000), rng.integers(0, 60, 3000)
    for kind in ("pins", "edges"):
        found = []
        for ids in (lambda v: pa.array(v), lambda v: pa.array(map(str, v))):
            source = EdgeArrays("arrays", ids(pins), ids(boards))
            build_graph(source, tmp_path / "g", holdout=Holdout(kind, 0.2, 3), progress=False)
            graph = GraphFolder.open(tmp_path / "g")
            ids = [list(map(str, values.to_pylist())) for values in (graph.pin_ids, graph.board_ids)]
            found.append(edges_by_id(graph.withheld, *ids))
        assert found[0] == found[1]
        # Six standard deviations of the share; a pin has 10 edges, all or none of them.
        assert abs(len(found[0]) / 3000 - 0.2) < 6 * (0.2 * 0.8 / (300 if kind == "pins" else 3000)) ** 0.5


def test_dropped_rows_and_late_edges_together(tmp_path, small_buffers):
    """Rows before 3 are dropped; edges none of whose other rows is before 6 are withheld."""
    small_buffers(4)
    rng = random.Random(1)
    rows = [(f"p{rng.randrange(9)}", f"b{rng.randrange(6)}", rng.randrange(10)) for _ in range(200)]
    write_table(tmp_path / "e.csv", rows, (False, False))
    holdout, pruning = Holdout("time", since=Moment("6")), Pruning(min_board=0)
    build_graph(
        EdgeTables([tmp_path / "e.csv"]),
        tmp_path / "g",
        since=Moment("3"),
        pruning=pruning,
        holdout=holdout,
        progress=False,
    )
    graph = assert_equals_plain(tmp_path / "g", rows, 3, pruning, holdout)
    assert graph.withheld.num_edges > 3
    assert graph.graph.num_edges > 30


def degenerate(tmp_path, pins, boards, **options):
    source = EdgeArrays("arrays", pa.array(pins), pa.array(boards))
    stats = build_graph(source, tmp_path / "g", progress=False, **options)
    return GraphFolder.open(tmp_path / "g").graph, stats


def test_degenerate_graphs(tmp_path):
    with pytest.raises(DataError, match="no edges"):
        degenerate(tmp_path, pa.array([], pa.int64()), pa.array([], pa.int64()))
    graph, _ = degenerate(tmp_path, [5], [7], pruning=Pruning(min_board=1))
    assert (graph.num_pins, graph.num_boards, graph.num_edges) == (1, 1, 1)
    graph, _ = degenerate(tmp_path, [5, 6, 7], [1, 1, 1])
    assert graph.pins_of(0).tolist() == [0, 1, 2]
    graph, stats = degenerate(tmp_path, [5] * 4, [1, 2, 3, 4], pruning=Pruning(min_board=0))
    assert graph.boards_of(0).tolist() == [0, 1, 2, 3]
    assert stats["training"]["components"] == {"count": 1, "largest_pins": 1, "largest_boards": 4}
    # Pin 9 is alone on board 3, which goes; the pin stays, isolated, unless pins need an edge.
    graph, stats = degenerate(tmp_path, [5, 6, 9], [1, 1, 3])
    assert graph.pin_degrees.tolist() == [1, 1, 0]
    assert stats["training"]["isolated_pins"] == 1
    graph, _ = degenerate(tmp_path, [5, 6, 9], [1, 1, 3], pruning=Pruning(min_pin=1))
    assert graph.num_pins == 2


def test_a_board_of_all_pins_and_a_pin_on_a_million_boards(tmp_path):
    million = 1_000_000
    pins = np.concatenate([np.zeros(million, np.int64), np.arange(5000)])
    boards = np.concatenate([np.arange(million), np.full(5000, million)])
    graph, stats = degenerate(tmp_path, pins, boards, pruning=Pruning(min_board=1))
    assert graph.pin_degrees.max() == million + 1
    assert graph.board_sizes[million] == 5000
    assert stats["training"]["components"]["count"] == 1
    assert stats["bytes"]["graph_per_edge"] < 17  # as many boards as edges


def test_peeling_a_path_takes_every_round(tmp_path, small_buffers):
    """Pins and boards on a line: each round of pruning takes the two ends only."""
    small_buffers(64)
    pins = [*range(400), *range(1, 401)]
    boards = [*range(400), *range(400)]
    ring = ([*pins, 1000, 1001, 1000, 1001], [*boards, 1000, 1000, 1001, 1001])
    graph, stats = degenerate(tmp_path, *ring, pruning=Pruning(min_board=2, min_pin=2))
    assert (graph.num_pins, graph.num_boards, graph.num_edges) == (2, 2, 4)
    assert stats["pruned"] == {"boards_over_max": 0, "boards_under_min": 400, "pins_under_min": 401}


def test_keys_beyond_64_bits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_bits", lambda count: 32)
    with pytest.raises(DataError, match="are too many"):
        degenerate(tmp_path, [1, 2], [3, 3])


def test_buffers_hold_what_they_may(monkeypatch, tmp_path):
    work = ingest.Work(tmp_path, memory=300_000_000, threads=2, progress=False)
    room, text = work.buffer(), pa.array(["0123456789"] * 400_000, pa.large_string())
    cases = [(np.zeros(4_000_000, np.int64),) * 2, (text, text), (text, np.zeros(400_000, np.int64))]
    for batch in cases:
        batches = [
            (*(ids[start : start + 7_000] for ids in batch), None) for start in range(0, len(batch[0]), 7_000)
        ]
        for parts in (batches, [(*batch, None)]):
            weights = [sum(map(ingest._weight, buffer)) for buffer in ingest._buffers(iter(parts), work)]
            assert max(weights) <= room
            assert len(weights) < 2.2 * sum(weights) / room + 1  # and not much less
            assert sum(weights) == ingest._weight((*batch, None))
    monkeypatch.setattr(ingest, "_MAX_ROWS", 9_000)
    buffers = list(ingest._buffers(iter(batches), work))
    assert max(sum(len(piece[0]) for piece in buffer) for buffer in buffers) <= 9_000


def test_a_leak_would_stop_the_build(tmp_path, monkeypatch):
    def leak(training, withheld):
        assert training.num_edges + withheld.num_edges == 4
        raise DataError("leak")

    monkeypatch.setattr(splits, "check_no_edge_leak", leak)
    with pytest.raises(DataError, match="leak"):
        degenerate(tmp_path, [1, 2, 2, 3], [3, 3, 4, 4], holdout=Holdout("edges", 0.5, 2))
    assert list(tmp_path.iterdir()) == []


def test_widths():
    assert [ingest._bits(count) for count in (1, 2, 3, 4, 5, 2**31, 2**31 + 1)] == [1, 1, 2, 2, 3, 31, 32]
    # 31 bits of a number and the bit of its age fill 32.
    assert (ingest._list_type(31), ingest._list_type(32)) == (np.uint32, np.uint64)


@pytest.mark.parametrize("bits", [8, 31])
def test_lists_of_either_width(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(ingest, "_bits", lambda count: bits)
    narrow, _ = degenerate(tmp_path, [1, 2, 2, 3], [3, 3, 4, 4])
    monkeypatch.setattr(ingest, "_list_type", lambda bits: np.uint64)
    wide, _ = degenerate(tmp_path, [1, 2, 2, 3], [3, 3, 4, 4])
    assert narrow.pin_boards.tolist() == wide.pin_boards.tolist() == [0, 0, 1, 1]


MEASURE = """
import sys
from pinclip.graph.build import build_graph
from pinclip.graph.edge_source import EdgeTables
build_graph(EdgeTables([sys.argv[1]]), sys.argv[2], memory=int(sys.argv[3]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
def test_memory_stays_within_its_bound(tmp_path, text):
    """5 M edges of 0.5 M pins and 0.2 M boards within 350 MB, of which the interpreter has 90."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(tmp_path / "e.parquet", _schema(text)) as writer:
        for _ in range(5):
            pins = (500_000 * rng.random(1_000_000) ** 2).astype(np.int64)
            boards = (200_000 * rng.random(1_000_000) ** 2).astype(np.int64)
            ids = [pa.array(values).cast(_schema(text).field(0).type) for values in (pins, boards)]
            writer.write_table(pa.table(ids, _schema(text)))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "e.parquet"), str(tmp_path / "g"), "350000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 350e6


def _schema(text):
    kind = pa.string() if text else pa.int64()
    return pa.schema([("pin", kind), ("board", kind)])
