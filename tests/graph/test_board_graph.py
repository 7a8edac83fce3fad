"""BoardGraph against plain Python sets, and folders damaged in every way we could think of."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinclip.errors import DataError
from pinclip.graph import board_graph
from pinclip.graph.board_graph import BoardGraph, _sorted_pairs, edge_chunks, edge_rows, indptr_of


@pytest.fixture(params=[2, None], ids=["small chunks", "one chunk"])
def chunk(request, monkeypatch):
    """What goes through all edges does so in chunks; these graphs would all fit one."""
    if request.param:
        monkeypatch.setattr(board_graph, "_CHUNK", request.param)
    return request.param


@st.composite
def edge_lists(draw):
    num_pins, num_boards = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    edge = st.tuples(st.integers(0, num_pins - 1), st.integers(0, num_boards - 1))
    return num_pins, num_boards, draw(st.lists(edge, max_size=30))


def build(num_pins, num_boards, edges):
    pins, boards = zip(*edges) if edges else ((), ())
    return BoardGraph.from_edges(list(pins), list(boards), num_pins, num_boards)


def edge_set(graph):
    by_pin = {(pin, int(board)) for pin in range(graph.num_pins) for board in graph.boards_of(pin)}
    by_board = {(int(pin), board) for board in range(graph.num_boards) for pin in graph.pins_of(board)}
    assert by_pin == by_board
    assert len(by_pin) == graph.num_edges
    return by_pin


def arrays(graph):
    return graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins


def assert_same(left, right):
    for a, b in zip(arrays(left), arrays(right)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@settings(deadline=None)
@given(edge_lists())
def test_from_edges_equals_a_set(case):
    num_pins, num_boards, edges = case
    graph = build(*case)
    assert (graph.num_pins, graph.num_boards) == (num_pins, num_boards)
    assert edge_set(graph) == set(edges)
    for pin in range(num_pins):
        assert graph.boards_of(pin).tolist() == sorted({b for p, b in edges if p == pin})
        assert graph.pin_degrees[pin] == len(graph.boards_of(pin))
    for board in range(num_boards):
        assert graph.pins_of(board).tolist() == sorted({p for p, b in edges if b == board})
        assert graph.board_sizes[board] == len(graph.pins_of(board))
    assert graph.pin_indptr.dtype == graph.board_indptr.dtype == np.int64
    assert graph.pin_boards.dtype == graph.board_pins.dtype == np.int32


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 9))
def test_chunks_cover_every_edge_once(counts, size):
    indptr = indptr_of(np.array(counts, np.int64))
    rows = np.repeat(np.arange(len(counts)), counts)
    chunks = list(edge_chunks(indptr, size))
    assert [at for start, stop in chunks for at in range(start, stop)] == list(range(len(rows)))
    for start, stop in chunks:
        assert 0 < stop - start <= size
        found = edge_rows(indptr, start, stop)
        assert found.tolist() == rows[start:stop].tolist()
        assert found[-1] - found[0] < size


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edge_lists(), st.data())
def test_without_pins_equals_filtering_the_edges(chunk, case, data):
    num_pins, num_boards, edges = case
    gone = data.draw(st.lists(st.integers(0, num_pins - 1)))
    want = build(num_pins, num_boards, [(p, b) for p, b in edges if p not in gone])
    mask = np.zeros(num_pins, bool)
    mask[np.array(gone, int)] = True
    for pins in (gone, mask):
        assert_same(build(*case).without_pins(pins), want)


@settings(deadline=None)
@given(edge_lists())
def test_co_board_pins_equal_a_set(case):
    num_pins, _, edges = case
    graph = build(*case)
    for pin, others in graph.iter_co_board_pins():
        boards = {b for p, b in edges if p == pin}
        assert others.tolist() == sorted({p for p, b in edges if b in boards} - {pin})
        assert others.dtype == np.int64
    assert [pin for pin, _ in graph.iter_co_board_pins([num_pins - 1, 0])] == [num_pins - 1, 0]


@given(edge_lists(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_save_and_load_give_the_same_graph(tmp_path_factory, case, mmap):
    folder = tmp_path_factory.mktemp("graph") / "deep" / "g"
    graph = build(*case)
    graph.save(folder)
    graph.save(folder)  # over an older one
    loaded = BoardGraph.load(folder, mmap=mmap)
    assert_same(loaded, graph)
    assert isinstance(loaded.pin_indptr, np.memmap) == mmap
    assert os.listdir(folder.parent) == ["g"]


@pytest.mark.parametrize("num_pins, num_boards", [(0, 0), (5, 0), (0, 5), (3, 1)])
def test_graphs_without_edges(tmp_path, num_pins, num_boards):
    graph = BoardGraph.from_edges([], [], num_pins, num_boards)
    assert (graph.num_pins, graph.num_boards, graph.num_edges) == (num_pins, num_boards, 0)
    assert_same(graph.without_pins(np.arange(num_pins)), graph)
    assert all(len(others) == 0 for _, others in graph.iter_co_board_pins())
    graph.save(tmp_path / "g")
    assert_same(BoardGraph.load(tmp_path / "g"), graph)


def test_indices_are_int64_where_int32_does_not_hold_them():
    boards = [2**31 + 5, 0, 2**31 + 5]
    pins = np.array([1, 1, 0])
    # The board direction of such a graph would need 2^31 offsets; the sorting and dtype rule do not.
    by_pin, by_board = _sorted_pairs(pins, np.array(boards), 2**31 + 6)
    assert list(zip(by_pin.tolist(), by_board.tolist())) == [(0, 2**31 + 5), (1, 0), (1, 2**31 + 5)]


def test_pairs_whose_product_passes_int64_sort_alike():
    rng = np.random.default_rng(0)
    pins, boards = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    small = _sorted_pairs(pins, boards, 5)
    large = _sorted_pairs(pins * 2**40, boards * 2**40, 2**43)
    np.testing.assert_array_equal(small[0] * 2**40, large[0])
    np.testing.assert_array_equal(small[1] * 2**40, large[1])


@pytest.mark.parametrize(
    "pins, boards, message",
    [
        ([0, 5], [0, 0], "edge 1 names pin 5, which is not in [0, 5)"),
        ([0, 1], [-1, 0], "edge 0 names board -1, which is not in [0, 3)"),
        ([0, 1], [0], "2 pins against 1 boards"),
        ([0.5], [0], "pins has dtype float64"),
        (["a"], [0], "pins has dtype <U1"),
        ([[0]], [[0]], "pins has shape (1, 1)"),
        (np.array([2**63], np.uint64), [0], "beyond int64"),
    ],
)
def test_from_edges_refuses(pins, boards, message):
    with pytest.raises(DataError) as error:
        BoardGraph.from_edges(pins, boards, 5, 3)
    assert message in str(error.value)


@pytest.mark.parametrize("pins", [np.zeros(4, bool), [7], [-1], [0.5]])
def test_without_pins_refuses(pins):
    graph = build(3, 2, [(0, 0), (1, 1)])
    with pytest.raises((ValueError, TypeError)):
        graph.without_pins(pins)


def edit(name, change):
    def damage(folder):
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return damage


def edit_info(**values):
    def damage(folder):
        info = json.loads((folder / "graph.json").read_text())
        (folder / "graph.json").write_text(json.dumps(info | values))

    return damage


def put(position, value):
    def change(array):
        array[position] = value
        return array

    return change


def truncate(name):
    def damage(folder):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:-3])

    return damage


DAMAGES = {
    "no info": (lambda folder: (folder / "graph.json").unlink(), "cannot read"),
    "info is not JSON": (lambda folder: (folder / "graph.json").write_text("{"), "not JSON"),
    "info is not UTF-8": (lambda folder: (folder / "graph.json").write_bytes(b"\xff{}"), "not JSON"),
    "info is a list": (lambda folder: (folder / "graph.json").write_text("[]"), "not a graph of format 1"),
    "later format": (edit_info(format=2), "not a graph of format 1"),
    "count is negative": (edit_info(edges=-1), "edges is -1"),
    "count is text": (edit_info(pins="4"), "pins is '4'"),
    "other pins": (edit_info(pins=5), "pin_indptr.npy: has 5 entries, want 6"),
    "other edges": (edit_info(edges=8), "pin_indptr.npy: does not rise from 0 to 8"),
    "no array": (lambda folder: (folder / "board_pins.npy").unlink(), "board_pins.npy"),
    "truncated array": (truncate("pin_boards.npy"), "pin_boards.npy: not a whole .npy file"),
    "empty file": (lambda folder: (folder / "pin_boards.npy").write_bytes(b""), "not a whole .npy file"),
    "not an array": (lambda folder: (folder / "pin_boards.npy").write_text("hello"), "not a whole .npy file"),
    "two dimensions": (edit("pin_boards.npy", lambda a: a.reshape(-1, 1)), "want one dimension"),
    "floats": (edit("pin_boards.npy", lambda a: a.astype(float)), "dtype is float64"),
    "short offsets": (edit("pin_indptr.npy", lambda a: a.astype(np.int32)), "dtype is int32, want int64"),
    "falling offsets": (edit("pin_indptr.npy", put(1, 6)), "pin_indptr.npy: does not rise from 0 to 7"),
    "falling later": (edit("pin_indptr.npy", put(3, 3)), "pin_indptr.npy: does not rise from 0 to 7"),
    "one list is long": (edit("pin_boards.npy", lambda a: np.append(a, a[-1:])), "has 8 entries, want 7"),
    "board out of range": (edit("pin_boards.npy", put(0, 3)), "pin_boards.npy: has an index outside [0, 3)"),
    "pin out of range": (edit("board_pins.npy", put(0, -1)), "board_pins.npy: has an index outside [0, 4)"),
    "unsorted": (edit("pin_boards.npy", lambda a: a[[1, 0, 2, 3, 4, 5, 6]]), "breaks the order"),
    "unsorted later": (
        edit("pin_boards.npy", lambda a: a[[0, 1, 2, 3, 4, 6, 5]]),
        "entry 6 breaks the order",
    ),
    "an edge twice": (edit("pin_boards.npy", put(1, 0)), "pin_boards.npy: entry 1 breaks the order"),
    "mixed dtypes": (edit("pin_boards.npy", lambda a: a.astype(np.int64)), "pin_boards is int64"),
    "another edge": (edit("board_pins.npy", put(2, 2)), "hold different edges"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("mmap", [True, False])
def test_load_refuses_a_damaged_folder(tmp_path, name, mmap, chunk):
    damage, message = DAMAGES[name]
    build(4, 3, [(0, 0), (0, 1), (1, 0), (1, 2), (3, 0), (3, 1), (3, 2)]).save(tmp_path / "g")
    BoardGraph.load(tmp_path / "g", mmap)
    damage(tmp_path / "g")
    with pytest.raises(DataError) as error:
        BoardGraph.load(tmp_path / "g", mmap)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_load_survives_any_flipped_byte(tmp_path):
    """The damaged folder is refused with a DataError, or (padding in a header) still is the same graph."""
    graph = build(6, 5, [(p, b) for p in range(6) for b in range(5) if (p * b + p) % 3])
    graph.save(tmp_path / "g")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        path = tmp_path / "g" / rng.choice(os.listdir(tmp_path / "g"))
        raw = path.read_bytes()
        at = int(rng.integers(len(raw)))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ int(rng.integers(1, 256))]) + raw[at + 1 :])
        try:
            assert_same(BoardGraph.load(tmp_path / "g"), graph)
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(raw)
    assert refused > 400


def test_a_missing_or_unwritable_folder(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*graph\.json"):
        BoardGraph.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        build(1, 1, [(0, 0)]).save(tmp_path / "file" / "deep" / "g")


def test_loading_takes_little_memory_beside_the_graph(tmp_path):
    """The checks go through the edges in chunks: a hundred times the edges do not take a hundred times."""
    rng = np.random.default_rng(0)
    graph = BoardGraph.from_edges(*rng.integers(0, 20_000, (2, 2_000_000)), 20_000, 20_000)
    graph.save(tmp_path / "g")
    for work in (lambda: BoardGraph.load(tmp_path / "g"), lambda: graph.without_pins(np.arange(20_000))):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8e6  # 16 MB were the lists of one direction as int64
