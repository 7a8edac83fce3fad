"""Distributions against NumPy, components against SciPy, and a plot that is one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse

from pinclip.graph import board_graph, statistics
from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.statistics import components, describe, distribution, plot


def scipy_components(graph):
    """(number, pins of the largest, boards of the largest) among those with an edge."""
    links = sparse.csr_matrix(
        (np.ones(graph.num_edges), graph.pin_boards, graph.pin_indptr), (graph.num_pins, graph.num_boards)
    )
    whole = sparse.bmat([[None, links], [links.T, None]])
    _, labels = sparse.csgraph.connected_components(whole, directed=False)
    pins, boards = labels[: graph.num_pins], labels[graph.num_pins :]
    sizes = np.bincount(pins[graph.pin_degrees > 0])
    largest = np.flatnonzero(sizes == sizes.max())
    return np.count_nonzero(sizes), sizes.max(), {np.count_nonzero(boards == label) for label in largest}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 20), st.integers(1, 60), st.integers(1, 70))
def test_components_equal_scipys(seed, pins, boards, edges, chunk):
    rng = np.random.default_rng(seed)
    graph = BoardGraph.from_edges(rng.integers(0, pins, edges), rng.integers(0, boards, edges), pins, boards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board_graph, "_CHUNK", chunk)
        found = components(graph)
    count, largest, boards_of_largest = scipy_components(graph)
    assert (found.count, found.largest_pins) == (count, largest)
    assert found.largest_boards in boards_of_largest


def test_a_long_path_is_one_component_in_few_rounds(monkeypatch):
    """Labels that only crept from pin to pin would need 20,000 rounds."""
    order = np.random.default_rng(0).permutation(20_000)
    pins, boards = np.concatenate([order[:-1], order[1:]]), np.tile(np.arange(19_999), 2)
    graph = BoardGraph.from_edges(pins, boards, 20_000, 19_999)
    passes, least = [], statistics._least
    monkeypatch.setattr(statistics, "_least", lambda *given: passes.append(1) or least(*given))
    found = components(graph)
    assert (found.count, found.largest_pins, found.largest_boards) == (1, 20_000, 19_999)
    assert len(passes) <= 2 * 15  # 2 a round, log2(20,000) rounds


def test_no_edge():
    graph = BoardGraph.from_edges([], [], 3, 0)
    found = describe(graph)
    assert found["components"] == {"count": 0, "largest_pins": 0, "largest_boards": 0}
    assert found["isolated_pins"] == 3
    assert set(found["board_sizes"].values()) == {0}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_quantiles_are_numpys_inverted_cdf(counts):
    found = distribution(np.array(counts))
    for name, q in (("min", 0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1)):
        assert found[name] == np.quantile(counts, q, method="inverted_cdf")
    assert found["mean"] == pytest.approx(np.mean(counts), abs=1e-4)


def test_counts():
    graph = BoardGraph.from_edges([0, 1, 1, 3], [0, 0, 1, 2], 5, 4)
    found = describe(graph)
    assert (found["pins"], found["boards"], found["edges"]) == (5, 4, 4)
    assert (found["isolated_pins"], found["empty_boards"]) == (2, 1)
    assert found["components"] == {"count": 2, "largest_pins": 2, "largest_boards": 2}
    assert found["pin_degrees"]["max"] == 2


def test_the_plot_shows_something(tmp_path):
    rng = np.random.default_rng(0)
    pins, boards = (rng.random((2, 3000)) ** 2 * [[300], [100]]).astype(int)
    plot(BoardGraph.from_edges(pins, boards, 300, 100), tmp_path / "degrees.png")
    image = np.asarray(Image.open(tmp_path / "degrees.png").convert("RGB"))
    assert image.shape[0] > 300
    assert image.shape[1] > 800
    for half, color in ((image[:, :550], [31, 119, 180]), (image[:, 550:], [214, 39, 40])):
        assert np.count_nonzero((half == color).all(-1)) > 300
