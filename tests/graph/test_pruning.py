"""Pruning against a plain repetition over sets, on graphs where one removal brings on the next."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinclip.errors import DataError
from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.external import DiskArray
from pinclip.graph.pruning import Pruning, Side, prune


def sides(graph, folder):
    """Both directions on disk; every third edge is late, which pruning must not mind."""
    for name, indptr, lists in (
        ("pins", graph.pin_indptr, graph.pin_boards),
        ("boards", graph.board_indptr, graph.board_pins),
    ):
        on_disk = DiskArray(folder / name, np.uint32)
        on_disk.append(lists.astype(np.uint32) * 2 + (np.arange(len(lists)) % 3 == 0))
        yield Side(indptr, on_disk, np.ones(len(indptr) - 1, bool))


def plain_prune(edges, num_pins, num_boards, pruning):
    """(pins, boards) that are left, and the counts."""
    pins, boards = set(range(num_pins)), set(range(num_boards))
    sizes = [sum(board == b for _, b in edges) for board in range(num_boards)]
    if pruning.max_board is not None:
        boards = {board for board in boards if sizes[board] <= pruning.max_board}
    counts = {"boards_over_max": num_boards - len(boards), "boards_under_min": 0, "pins_under_min": 0}
    while True:
        left = [(pin, board) for pin, board in edges if pin in pins and board in boards]
        few_boards = {b for b in boards if sum(board == b for _, board in left) < pruning.min_board}
        few_pins = {p for p in pins if sum(pin == p for pin, _ in left) < pruning.min_pin}
        if not few_boards and not few_pins:
            return pins, boards, counts
        boards, pins = boards - few_boards, pins - few_pins
        counts["boards_under_min"] += len(few_boards)
        counts["pins_under_min"] += len(few_pins)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**32),
    st.integers(1, 25),
    st.integers(1, 25),
    st.integers(1, 70),
    st.integers(0, 3),
    st.none() | st.integers(3, 7),
    st.integers(0, 3),
    st.integers(1, 40),
)
def test_prune_equals_repetition(tmp_path_factory, seed, pins, boards, edges, low, high, least, chunk):
    rng = np.random.default_rng(seed)
    graph = BoardGraph.from_edges(rng.integers(0, pins, edges), rng.integers(0, boards, edges), pins, boards)
    pruning = Pruning(low, high, least)
    pin_side, board_side = sides(graph, tmp_path_factory.mktemp("sides"))
    counts = prune(pin_side, board_side, pruning, chunk)
    edges = [(pin, int(board)) for pin in range(pins) for board in graph.boards_of(pin)]
    left_pins, left_boards, want = plain_prune(edges, pins, boards, pruning)
    assert counts == want
    assert set(np.flatnonzero(pin_side.alive)) == left_pins
    assert set(np.flatnonzero(board_side.alive)) == left_boards


def test_a_giant_board_counts_for_no_pin(tmp_path):
    graph = BoardGraph.from_edges([0, 1, 2, 3, 0, 1], [0, 0, 0, 0, 1, 1], 4, 2)
    pin_side, board_side = sides(graph, tmp_path)
    counts = prune(pin_side, board_side, Pruning(2, 3, 1), 2)
    assert counts == {"boards_over_max": 1, "boards_under_min": 0, "pins_under_min": 2}
    assert pin_side.alive.tolist() == [True, True, False, False]


@pytest.mark.parametrize("bounds", [(-1,), (2, None, -1), (2, 1), (0, 0)])
def test_refusals(bounds):
    with pytest.raises(DataError):
        Pruning(*bounds)
