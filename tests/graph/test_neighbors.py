"""The neighbor sampler against plain Python and against its own exact law.

Every chi-square test here raises a false alarm with probability ALARM; its seed is fixed.
"""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.neighbors import NeighborSampler
from pinclip.graph.pairs import NeighborPairs
from pinclip.graph.splits import cold_split

ALARM = 1e-6
OPTIONS = [
    {},
    {"board_damping": 0.7},
    {"board_damping": -0.5},
    {"max_board": 5},
    {"board_damping": 1.0, "max_board": 9},
]


def random_graph(num_pins, num_boards, num_edges, seed=0):
    rng = np.random.default_rng(seed)
    pins = (num_pins * rng.random(num_edges) ** 1.5).astype(int)
    boards = (num_boards * rng.random(num_edges) ** 2).astype(int)
    return BoardGraph.from_edges(pins, boards, num_pins, num_boards)


def exact_affinity(graph, board_damping=0.0, max_board=None):
    """a_ij of the class docstring, dense."""
    affinity = np.zeros((graph.num_pins, graph.num_pins))
    for board in range(graph.num_boards):
        pins = graph.pins_of(board)
        if len(pins) >= 2 and (max_board is None or len(pins) <= max_board):
            affinity[np.ix_(pins, pins)] += len(pins) ** -float(board_damping) / len(pins)
    np.fill_diagonal(affinity, 0)
    return affinity


def chi_square(counts, probability):
    """p-value of counts under the probabilities; rare outcomes are pooled until 20 are expected of each."""
    expected = counts.sum() * probability
    assert (counts[expected == 0] == 0).all()
    order = np.argsort(expected)
    group = np.floor(np.cumsum(expected[order]) / 20)
    observed, wanted = (
        np.bincount(group.astype(int), counts[order]),
        np.bincount(group.astype(int), expected[order]),
    )
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1)


@pytest.mark.parametrize("options", OPTIONS)
def test_samples_follow_the_exact_law(options):
    graph = random_graph(30, 20, 120)
    sampler = NeighborSampler(graph, seed=5, **options)
    affinity = exact_affinity(graph, **options)
    pins = np.repeat(np.arange(30), 3000)
    drawn = sampler.sample(pins, step=1)
    tested = 0
    for pin in range(30):
        mine = drawn[pins == pin]
        if affinity[pin].sum() == 0:
            assert (mine == -1).all()
            continue
        # All tries fail with probability at most 2^-16: below the resolution of 3000 draws.
        mine = mine[mine >= 0]
        assert len(mine) >= 2998
        counts = np.bincount(mine, minlength=30)
        assert chi_square(counts, affinity[pin] / affinity[pin].sum()) > ALARM / 30
        tested += 1
    assert tested >= 15


def test_the_chi_square_test_can_fail():
    graph = random_graph(30, 20, 120)
    pins = np.zeros(3000, np.int64)
    counts = np.bincount(NeighborSampler(graph, 5).sample(pins, 1), minlength=30)
    wrong = exact_affinity(graph, board_damping=0.7)[0]
    assert chi_square(counts, wrong / wrong.sum()) < 1e-9


def test_a_sample_is_a_function_of_seed_step_slot_and_pin():
    graph = random_graph(500, 300, 3000)
    sampler = NeighborSampler(graph, seed=5, board_damping=0.5)
    pins = np.random.default_rng(0).integers(0, 500, 256)
    drawn = sampler.sample(pins, 7)
    np.testing.assert_array_equal(drawn, NeighborSampler(graph, 5, board_damping=0.5).sample(pins, 7))
    # A rank that draws the second half of the batch, or other pins in the other slots, changes nothing.
    np.testing.assert_array_equal(drawn[128:], sampler.sample(pins[128:], 7, first_slot=128))
    others = pins.copy()
    others[::2] = (others[::2] + 1) % 500
    np.testing.assert_array_equal(drawn[1::2], sampler.sample(others, 7)[1::2])
    for changed in (sampler.sample(pins, 8), NeighborSampler(graph, 6, board_damping=0.5).sample(pins, 7)):
        assert (changed != drawn).mean() > 0.5
    same_pin = sampler.sample(np.full(256, pins[0]), 7)
    assert len(np.unique(same_pin)) > 1


def test_only_training_edges_are_walked():
    graph = random_graph(200, 100, 900)
    split = cold_split([str(pin) for pin in range(200)], 0.3, seed=1)
    sampler = NeighborSampler(split.training_graph(graph), 3, anchors=split.train)
    drawn = np.concatenate([sampler.sample(split.train, step) for step in range(50)])
    assert not np.isin(drawn, split.cold).any()
    assert (sampler.sample(split.cold, 0) == -1).all()
    indptr, indices = sampler.known(np.arange(200), np.arange(200))
    assert (np.diff(indptr)[split.cold] == 0).all()
    assert not np.isin(indices, split.cold).any()
    assert np.isneginf(sampler.log_q(split.cold)).all()
    assert np.isfinite(sampler.log_q(split.train)).all()


@pytest.mark.parametrize(
    "edges, num_boards",
    [
        ([], 0),  # no board at all
        ([], 2),  # empty boards
        ([(0, 0), (1, 1), (2, 2)], 3),  # boards of one pin
    ],
)
@pytest.mark.parametrize("options", [{}, {"board_damping": 1.0}])
def test_graphs_without_a_pair(edges, num_boards, options):
    pins, boards = zip(*edges) if edges else ((), ())
    sampler = NeighborSampler(BoardGraph.from_edges(pins, boards, 3, num_boards), 0, **options)
    every = np.arange(3)
    assert sampler.sample(every, 0).tolist() == [-1, -1, -1]
    indptr, indices = sampler.known(every, every)
    assert indptr.tolist() == [0, 0, 0, 0] and len(indices) == 0
    # Every slot is an anchor.
    np.testing.assert_allclose(sampler.log_q(every), math.log(1 / 3), rtol=1e-6)


def test_one_board_of_all_pins():
    sampler = NeighborSampler(BoardGraph.from_edges(np.arange(4), np.zeros(4, int), 4, 1), 0)
    assert set(sampler.sample(np.zeros(200, int), 0)) == {1, 2, 3}
    indptr, indices = sampler.known([2], [0, 1, 2, 2, 3])
    assert (indptr.tolist(), indices.tolist()) == ([0, 3], [0, 1, 4])
    np.testing.assert_allclose(np.exp(sampler.log_q(np.arange(4))), 0.25, rtol=1e-6)


def test_a_pin_with_boards_of_one_pin_only_leaves_through_the_shared_one():
    boards = [*range(50), 50]
    graph = BoardGraph.from_edges([*([0] * 51), 1], [*boards, 50], 3, 51)
    drawn = NeighborSampler(graph, 0).sample(np.array([0] * 100 + [1] * 100 + [2, -1]), 0)
    assert drawn.tolist() == [1] * 100 + [0] * 100 + [-1, -1]


@st.composite
def batches(draw):
    num_pins = draw(st.integers(1, 8))
    edge = st.tuples(st.integers(0, num_pins - 1), st.integers(0, 5))
    edges = draw(st.lists(edge, max_size=30))
    pin = st.integers(-1, num_pins - 1)
    return num_pins, edges, draw(st.lists(pin, max_size=8)), draw(st.lists(pin, max_size=8))


@settings(deadline=None)
@given(batches(), st.integers(1, 3), st.sampled_from([None, 2, 4]), st.booleans())
def test_known_equals_sets(case, min_shared, max_board, mined):
    num_pins, edges, rows, cols = case
    pins, boards = zip(*edges) if edges else ((), ())
    graph = BoardGraph.from_edges(pins, boards, num_pins, 6)
    pairs = {(pin, other) for pin, other in zip(range(num_pins), range(1, num_pins))} if mined else set()
    sampler = NeighborSampler(graph, 0, pairs=pairs_of(pairs, num_pins) if mined else None)
    indptr, indices = sampler.known(rows, cols, min_shared=min_shared, max_board=max_board)
    assert indptr.dtype == indices.dtype == np.int64

    boards_of = {pin: {b for p, b in edges if p == pin} for pin in range(-1, num_pins)}
    size = {b: len({p for p, c in edges if c == b}) for b in range(6)}
    want_indptr, want_indices = [0], []
    for row in rows:
        for slot, col in enumerate(cols):
            shared = {b for b in boards_of[row] & boards_of[col] if max_board is None or size[b] <= max_board}
            if row != col and (len(shared) >= min_shared or (row, col) in pairs):
                want_indices.append(slot)
        want_indptr.append(len(want_indices))
    assert indptr.tolist() == want_indptr
    assert indices.tolist() == want_indices


def pairs_of(weights, num_pins):
    """NeighborPairs of {(pin, neighbor): weight}, or of a set of pairs that all weigh 1."""
    rows = sorted(weights)
    indptr = np.searchsorted([pin for pin, _ in rows], np.arange(num_pins + 1))
    values = [1.0 if isinstance(weights, set) else weights[row] for row in rows]
    neighbors = np.array([neighbor for _, neighbor in rows], np.int64)
    return NeighborPairs(indptr, neighbors, np.array(values, np.float32), {}, 0)


WEIGHTS = {(0, 1): 1.0, (0, 2): 3.0, (0, 4): 0.5, (1, 0): 2.0, (1, 3): 2.0, (3, 4): 1.0, (3, 0): 7.0}


def mined_sampler(seed=0, **options):
    graph = BoardGraph.from_edges([0, 1], [0, 0], 5, 1)
    return NeighborSampler(graph, seed, pairs=pairs_of(WEIGHTS, 5), **options)


def test_mined_samples_follow_the_weights():
    sampler = mined_sampler()
    for pin in range(5):
        want = np.array([WEIGHTS.get((pin, other), 0.0) for other in range(5)])
        drawn = sampler.sample(np.full(4000, pin), step=pin)
        if want.sum() == 0:
            assert (drawn == -1).all()
        else:
            assert chi_square(np.bincount(drawn, minlength=5), want / want.sum()) > ALARM


def test_a_mined_sample_is_a_function_of_seed_step_and_slot():
    sampler, pins = mined_sampler(), np.array([0, 3, 1, 0, -1, 2, 0, 3])
    drawn = sampler.sample(pins, 9)
    np.testing.assert_array_equal(drawn, mined_sampler().sample(pins, 9))
    np.testing.assert_array_equal(drawn[3:], sampler.sample(pins[3:], 9, first_slot=3))
    assert drawn[4] == drawn[5] == -1
    many = np.zeros(300, np.int64)
    for other in (sampler.sample(many, 10), mined_sampler(1).sample(many, 9)):
        assert (other != sampler.sample(many, 9)).mean() > 0.2


def test_log_q_of_mined_pairs():
    anchors = np.array([0, 1, 2])
    uniform = np.array([1, 1, 1, 0, 0]) / 3
    want = uniform / 2
    for pin in anchors:
        row = np.array([WEIGHTS.get((pin, other), 0.0) for other in range(5)])
        want += 0.5 / 3 * (row / row.sum() if row.sum() else uniform)
    log_q = mined_sampler(anchors=anchors).log_q(np.arange(5))
    np.testing.assert_allclose(np.exp(log_q.astype(float)), want, rtol=1e-6)


def test_pairs_of_another_graph_are_refused():
    with pytest.raises(ValueError, match="the pairs are of 4 pins, the graph has 5"):
        NeighborSampler(BoardGraph.from_edges([0], [0], 5, 1), 0, pairs=pairs_of(set(), 4))


@pytest.mark.parametrize("options", OPTIONS)
def test_log_q_equals_the_sum_over_anchors(options):
    graph = random_graph(40, 25, 90, seed=2)
    anchors = np.arange(0, 40, 3)
    affinity = exact_affinity(graph, **options)
    uniform = np.zeros(40)
    uniform[anchors] = 1 / len(anchors)
    want = uniform / 2
    for pin in anchors:
        total = affinity[pin].sum()
        # The probability that all 16 tries stay at home, from the transition probabilities with self.
        own = sum(
            len(graph.pins_of(b)) ** -float(options.get("board_damping", 0))
            * np.array([1 / len(graph.pins_of(b)), 1])
            for b in graph.boards_of(pin)
            if 2 <= len(graph.pins_of(b)) <= (options.get("max_board") or 40)
        )
        fails = 1.0 if total == 0 else (own[0] / own[1]) ** 16
        want += 0.5 * uniform[pin] * ((1 - fails) * affinity[pin] / (total or 1) + fails * uniform)
    log_q = NeighborSampler(graph, 0, anchors=anchors, **options).log_q(np.arange(40))
    assert log_q.dtype == np.float32
    np.testing.assert_allclose(np.exp(log_q.astype(float)), want, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(np.exp(log_q.astype(float)).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_log_q_equals_the_frequency_in_batches(options):
    graph = random_graph(60, 40, 200, seed=3)
    sampler = NeighborSampler(graph, 11, anchors=np.arange(50), **options)
    rng = np.random.default_rng(1)
    counts = np.zeros(60, np.int64)
    for step in range(200):
        neighbors = sampler.sample(rng.integers(0, 50, 200), step)
        neighbors = np.where(neighbors < 0, rng.integers(0, 50, 200), neighbors)
        counts += np.bincount(neighbors, minlength=60)
    # Slots of neighbors alone, which are independent; an anchor and its own neighbor are not.
    q = np.exp(sampler.log_q(np.arange(60)).astype(float))
    q_neighbor = 2 * q - (np.arange(60) < 50) / 50
    q_neighbor[np.abs(q_neighbor) < 1e-8] = 0
    assert chi_square(counts, q_neighbor / q_neighbor.sum()) > ALARM


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"board_damping": math.nan}, "board_damping is nan"),
        ({"max_board": 1}, "max_board is 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError) as error:
        NeighborSampler(random_graph(5, 5, 9), **({"seed": 0} | options))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="starts cannot be 5"):
        NeighborSampler(random_graph(5, 5, 9), 0).sample(np.array([5]), 0)


def test_a_batch_is_fast():
    """256 pins in under 1 ms, 256 x 256 known pairs in under 3 ms: processor time, the best of 40."""
    sampler = NeighborSampler(random_graph(10_000, 40_000, 900_000), 0, board_damping=0.5)
    rng = np.random.default_rng(0)
    rows, cols = rng.integers(0, 10_000, 256), rng.integers(0, 10_000, 256)

    def best(call):
        times = []
        for _ in range(40):
            begin = time.thread_time()
            call()
            times.append(time.thread_time() - begin)
        return min(times)

    assert best(lambda: sampler.sample(rows, 0)) < 1e-3
    assert best(lambda: sampler.known(rows, cols)) < 3e-3
