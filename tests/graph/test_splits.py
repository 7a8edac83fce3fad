"""Cold splits: sizes, independence of order, and the proof that nothing leaks."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinclip.errors import DataError
from pinclip.graph import board_graph
from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.splits import (
    Split,
    below,
    check_edge_sides,
    check_no_edge_leak,
    check_no_leak,
    cold_split,
    edge_hashes,
    id_hashes,
    is_withheld,
)

IDS = [f"pin-{number}" for number in range(200)]


def cold_ids(ids, *arguments, **options):
    return {ids[pin] for pin in cold_split(ids, *arguments, **options).cold}


@settings(deadline=None)
@given(st.lists(st.text(), unique=True, max_size=30), st.floats(0, 1), st.integers(-(2**63), 2**64))
def test_a_partition(ids, fraction, seed):
    split = cold_split(ids, fraction, seed)
    assert sorted([*split.train, *split.cold]) == list(range(len(ids)))
    for part in (split.train, split.cold):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def test_nothing_everything_and_a_share_between():
    ids = [str(number) for number in range(20_000)]
    assert len(cold_split(ids, 0.0, 1).cold) == 0
    assert len(cold_split(ids, 1.0, 1).train) == 0
    # Six standard deviations: one seed in 5e8 would fail, and this one is fixed.
    assert abs(len(cold_split(ids, 0.15, 1).cold) - 3_000) < 6 * (20_000 * 0.15 * 0.85) ** 0.5


def test_order_of_the_ids_does_not_matter():
    shuffled = [IDS[pin] for pin in np.random.default_rng(0).permutation(len(IDS))]
    assert cold_ids(IDS, 0.15, 3) == cold_ids(shuffled, 0.15, 3)


def test_seeds_and_ids_decide():
    # Two independent 15% samples of 200 share 4.5 pins on average; all 30 with probability below 1e-30.
    assert cold_ids(IDS, 0.15, 3) != cold_ids(IDS, 0.15, 4)
    shared = len(cold_ids(IDS, 0.15, 3) & cold_ids(IDS, 0.15, 4))
    assert shared < 20


def test_added_pins_move_nobody():
    more = [*IDS, *(f"new-{number}" for number in range(20))]
    assert cold_ids(more, 0.15, 3) & set(IDS) == cold_ids(IDS, 0.15, 3)


def test_ineligible_pins_are_trained_on():
    eligible = np.arange(len(IDS)) % 2 == 0
    split = cold_split(IDS, 0.3, 0, eligible)
    assert {IDS[pin] for pin in split.cold} == cold_ids(IDS, 0.3, 0) & {
        IDS[pin] for pin in np.flatnonzero(eligible)
    }


def test_refusals():
    with pytest.raises(DataError, match="'a' is there twice"):
        cold_split(["a", "b", "a"], 0.5, 0)
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        cold_split(IDS, 1.5, 0)
    with pytest.raises(ValueError, match="eligible has shape"):
        cold_split(IDS, 0.5, 0, np.ones(3, bool))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_training_graph_loses_exactly_the_cold_edges(seed, fraction):
    rng = np.random.default_rng(seed)
    pins, boards = rng.integers(0, 200, 500), rng.integers(0, 40, 500)
    graph = BoardGraph.from_edges(pins, boards, 200, 40)
    split = cold_split(IDS, fraction, seed)
    training = split.training_graph(graph)
    keep = ~np.isin(pins, split.cold)
    want = BoardGraph.from_edges(pins[keep], boards[keep], 200, 40)
    np.testing.assert_array_equal(training.pin_boards, want.pin_boards)
    np.testing.assert_array_equal(training.board_pins, want.board_pins)


def test_check_no_leak_sees_either_direction():
    graph = BoardGraph.from_edges([0, 1, 2], [0, 0, 1], 3, 2)
    clean = graph.without_pins([1])
    check_no_leak(clean, [1])
    with pytest.raises(DataError, match="cold pin 1 has 1 training edges"):
        check_no_leak(graph, [1])
    half = dataclasses.replace(clean, board_indptr=graph.board_indptr, board_pins=graph.board_pins)
    with pytest.raises(DataError, match="cold pin 1 is on training board 0"):
        check_no_leak(half, [1])


def test_training_graph_refuses_another_number_of_pins():
    with pytest.raises(ValueError, match="200 pins, the graph has 3"):
        cold_split(IDS, 0.1, 0).training_graph(BoardGraph.from_edges([0], [0], 3, 1))


def test_record_round_trip_in_another_order():
    split = cold_split(IDS, 0.15, 3)
    record = json.loads(json.dumps(split.to_dict(IDS)))
    again = Split.from_dict(record, IDS)
    np.testing.assert_array_equal(again.cold, split.cold)
    np.testing.assert_array_equal(again.train, split.train)
    back = IDS[::-1]
    assert {back[pin] for pin in Split.from_dict(record, back).cold} == {IDS[pin] for pin in split.cold}


@pytest.mark.parametrize(
    "change, ids, message",
    [
        ({}, IDS[:-1], "another set of pins (200 then, 199 now)"),
        ({}, [*IDS[:-1], "other"], "another set of pins"),
        ({"format": 9}, IDS, "not a split of format 1"),
        ({"cold": None}, IDS, "damaged split"),
        ({"cold": ["nobody"]}, IDS, "cold pin 'nobody' is not among the pins"),
    ],
)
def test_from_dict_refuses(change, ids, message):
    record = cold_split(IDS, 0.15, 3).to_dict(IDS) | change
    with pytest.raises(DataError) as error:
        Split.from_dict(record, ids)
    assert message in str(error.value)


def test_from_dict_refuses_what_is_no_record():
    for record in ([], None, {"format": 1}):
        with pytest.raises(DataError):
            Split.from_dict(record, IDS)


@given(st.lists(st.text(max_size=5) | st.integers(0, 2**63)), st.floats(0, 1), st.integers(0, 2**63))
def test_hashes_decide_as_is_withheld(ids, fraction, seed):
    hashes = id_hashes(ids, seed)
    assert hashes.dtype == np.uint64
    assert below(hashes, fraction).tolist() == [is_withheld(str(id_), fraction, seed) for id_ in ids]


def test_many_ids_are_hashed_as_one_by_one():
    many = id_hashes(range(70_000), 1)
    assert len(many) == 70_000
    for id_ in (0, 65_535, 65_536, 69_999):
        assert many[id_] == id_hashes([id_], 1)[0]


def test_below_at_the_ends():
    hashes = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert below(hashes, 0.0).tolist() == [False] * 5
    assert below(hashes, 1.0).tolist() == [True] * 5
    assert below(hashes, 0.5).tolist() == [True, True, True, False, False]
    assert below(hashes, 2.0**-64).tolist() == [True, False, False, False, False]


def test_edge_hashes_are_even_and_tell_the_ends_apart():
    pins, boards = id_hashes(range(300), 1), id_hashes(range(300), 1)
    table = edge_hashes(np.repeat(pins, 300), np.tile(boards, 300)).reshape(300, 300)
    assert len(np.unique(table)) == 90_000
    # Six standard deviations, along each pin, each board, and over all.
    withheld = below(table.ravel(), 0.3).reshape(300, 300)
    assert abs(withheld.mean() - 0.3) < 6 * (0.21 / 90_000) ** 0.5
    for sums in (withheld.mean(0), withheld.mean(1)):
        assert np.abs(sums - 0.3).max() < 6 * (0.21 / 300) ** 0.5
    assert (table != table.T).sum() == 90_000 - 300


@st.composite
def two_graphs(draw):
    """Training and withheld edges of the same pins and boards, which may share some."""
    num_pins, num_boards = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    edge = st.tuples(st.integers(0, num_pins - 1), st.integers(0, num_boards - 1))
    return num_pins, num_boards, draw(st.sets(edge, max_size=20)), draw(st.sets(edge, max_size=20))


def graph_of(num_pins, num_boards, edges):
    pins, boards = zip(*edges) if edges else ((), ())
    return BoardGraph.from_edges(pins, boards, num_pins, num_boards)


@settings(max_examples=200, deadline=None)
@given(two_graphs(), st.integers(1, 9))
def test_check_no_edge_leak_finds_shared_edges(case, chunk):
    num_pins, num_boards, kept, held = case
    training, withheld = (graph_of(num_pins, num_boards, edges) for edges in (kept, held))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board_graph, "_CHUNK", chunk)
        if not kept & held:
            check_no_edge_leak(training, withheld)
            return
        pin, board = min(kept & held)
        with pytest.raises(
            DataError, match=f"the withheld edge of pin {pin} and board {board} is a training"
        ):
            check_no_edge_leak(training, withheld)
        # The same, where only the other direction holds it.
        clean = graph_of(num_pins, num_boards, kept - held)
        half = dataclasses.replace(clean, board_indptr=training.board_indptr, board_pins=training.board_pins)
        board, pin = min((board, pin) for pin, board in kept & held)
        with pytest.raises(
            DataError, match=f"the withheld edge of pin {pin} and board {board} is a training"
        ):
            check_no_edge_leak(half, withheld)


def test_a_shared_edge_behind_many_others_is_found(monkeypatch):
    """Between two training edges that are looked at together lie more withheld edges than these."""
    monkeypatch.setattr(board_graph, "_CHUNK", 2)
    training, clean = graph_of(1, 9, {(0, 0), (0, 8)}), graph_of(1, 9, {(0, 0)})
    withheld = graph_of(1, 9, {(0, board) for board in range(1, 9)})
    half = dataclasses.replace(clean, pin_indptr=training.pin_indptr, pin_boards=training.pin_boards)
    for graph in (training, half):
        with pytest.raises(DataError, match="pin 0 and board 8 is a training edge"):
            check_no_edge_leak(graph, withheld)


def test_check_no_edge_leak_refuses_other_numbers():
    with pytest.raises(DataError, match="different pins or boards"):
        check_no_edge_leak(graph_of(2, 2, {(0, 0)}), graph_of(2, 3, {(0, 1)}))


def test_check_edge_sides():
    rng = np.random.default_rng(0)
    edges = {(int(pin), int(board)) for pin, board in rng.integers(0, 30, (300, 2))}
    hashes = id_hashes(range(30), 4)
    held = {(p, b) for p, b in edges if below(edge_hashes(hashes[p : p + 1], hashes[b : b + 1]), 0.3)[0]}
    training, withheld = graph_of(30, 30, edges - held), graph_of(30, 30, held)
    check_edge_sides(training, withheld, hashes, hashes, 0.3)
    moved = min(held)
    for kept, gone, side in ((edges - held | {moved}, held, "training"), (edges - held, edges, "withheld")):
        with pytest.raises(DataError, match=f"by its hash the {side} edge of pin"):
            check_edge_sides(graph_of(30, 30, kept), graph_of(30, 30, gone), hashes, hashes, 0.3)
