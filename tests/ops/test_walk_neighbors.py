"""Neighbors by walks: C++ against the reference bit for bit, both against brute force and the exact law."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from walk_graphs import exact_steps, graph_of, random_adjacency, wide_graph

from pinclip.ops.random_walk import WalkGraph, random_walk
from pinclip.ops.walk_neighbors import walk_neighbors
from pinclip.reference.walk_neighbors import walk_neighbors as reference

ALARM = 1e-6


def by_reference(graph, starts, *, pin_scale=None, stop_visits=0, seed=0, restart=0.0, **plan):
    plan = (plan["walks"], plan["length"], restart, plan["top_k"], stop_visits, seed)
    return reference(*vars(graph).values(), pin_scale, starts, *plan)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def scale_of(num_pins, seed=0):
    """Weights of pins with ties and zeros among them."""
    values = torch.tensor([0.0, 0.25, 1 / 3, 1.0, 2.0])
    return values[torch.randint(5, (num_pins,), generator=torch.Generator().manual_seed(seed))]


# (walks, length): less than a bundle, all starts in one buffer, start by start, several rounds a start.
@pytest.mark.parametrize("walks, length", [(3, 2), (200, 5), (70, 300), (1000, 700)])
@pytest.mark.parametrize("stop_visits", [0, 9])
@pytest.mark.parametrize("scaled, weighted, index", [(False, False, torch.int32), (True, True, torch.int64)])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_cpp_equals_the_reference(threads, walks, length, stop_visits, scaled, weighted, index, num_threads):
    adjacency = random_adjacency(60, 25, 0.1)
    adjacency[3] = 0
    graph = graph_of(adjacency, torch.rand(25).double() if weighted else None, index)
    starts = torch.arange(8 if walks * length > 10_000 else 40) - 1
    options = {
        "walks": walks,
        "length": length,
        "restart": 0.3,
        "top_k": 7,
        "pin_scale": scale_of(60) if scaled else None,
        "stop_visits": stop_visits,
        "seed": 2**62 + 9,
    }
    threads(num_threads)
    neighbors, weights = walk_neighbors(graph, starts, **options)
    threads(1)
    want_neighbors, want_weights = by_reference(graph, starts, **options)
    assert neighbors.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(neighbors, want_neighbors)
    assert torch.equal(weights, want_weights)
    assert (neighbors[0] == -1).all() and (neighbors[4] == -1).all()  # start -1, and the isolated pin 3
    assert (neighbors[1] >= 0).any()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("stop_visits", [0, 3])
def test_many_pins(index, stop_visits):
    graph = wide_graph(index=index)
    starts = torch.cat([torch.arange(0, 140_000, 700), torch.tensor([-1, 139_999])])
    options = {"walks": 130, "length": 12, "restart": 0.2, "top_k": 40, "stop_visits": stop_visits, "seed": 3}
    scale = graph.pin_indptr.diff().clamp_min(1).float() ** -0.5
    found = walk_neighbors(graph, starts, pin_scale=scale, **options)
    want = by_reference(graph, starts, pin_scale=scale, **options)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert (found[0] > 2**17).any() and ((found[0] >= 0).sum(1) == 40).any()


def by_hand(visited, home, scale, top_k):
    """The law of the docstring, from the walks, in Python."""
    counts = Counter(pin for pin in visited.flatten().tolist() if pin not in (home, -1))
    weights = {pin: float(np.float32(count) * np.float32(scale[pin])) for pin, count in counts.items()}
    best = sorted((pin for pin in weights if weights[pin] > 0), key=lambda pin: (-weights[pin], pin))[:top_k]
    return best, [weights[pin] for pin in best]


def unpadded(neighbors, weights):
    kept = neighbors >= 0
    assert (weights[~kept] == 0).all() and (kept.int().diff() <= 0).all()
    return neighbors[kept].tolist(), weights[kept].tolist()


@pytest.mark.parametrize("top_k", [1, 6, 100])
def test_neighbors_are_the_most_visited(top_k):
    graph, scale = graph_of(random_adjacency(60, 25, 0.12)), scale_of(60)
    starts = torch.arange(60)
    visited = random_walk(graph, starts, walks=50, length=6, restart=0.3, seed=4)
    found = walk_neighbors(
        graph, starts, walks=50, length=6, restart=0.3, seed=4, top_k=top_k, pin_scale=scale
    )
    for pin in range(60):
        assert unpadded(found[0][pin], found[1][pin]) == by_hand(visited[pin], pin, scale.tolist(), top_k)


def test_an_early_stop_ends_after_the_round_that_suffices():
    graph = graph_of(random_adjacency(60, 25, 0.12))
    starts = torch.arange(60)
    visited = random_walk(graph, starts, walks=640, length=4, seed=1)
    found = walk_neighbors(graph, starts, walks=640, length=4, seed=1, top_k=5, stop_visits=40)
    rounds = []
    for pin in range(60):
        for last in range(64, 641, 64):
            counts = Counter(p for p in visited[pin, :last].flatten().tolist() if p not in (pin, -1))
            if sum(count >= 40 for count in counts.values()) >= 5:
                break
        rounds.append(last // 64)
        want = by_hand(visited[pin, :last], pin, [1.0] * 60, 5)
        assert unpadded(found[0][pin], found[1][pin]) == want
    assert len(set(rounds)) > 2  # some stop early and at different rounds


def test_shards_are_parts_of_the_whole():
    graph = graph_of(random_adjacency(60, 25, 0.12))
    options = {"walks": 30, "length": 5, "restart": 0.2, "top_k": 4, "seed": 3}
    whole = walk_neighbors(graph, torch.arange(60), **options)
    for first, last in ((0, 17), (17, 18), (18, 60)):
        part = walk_neighbors(graph, torch.arange(first, last), **options)
        assert torch.equal(part[0], whole[0][first:last]) and torch.equal(part[1], whole[1][first:last])


@pytest.mark.parametrize("damped", [False, True])
def test_visits_follow_the_exact_stationary_law(damped):
    """Chi-square of the ends of independent walks against power iteration; false alarm ALARM, seed fixed.

    A long walk with restart c visits by π = c Σ_t (1 - c)^t e_s T^(t+1); every walk gives one sample, its
    last hop. `damped`: boards weigh, and pin_scale multiplies the counts as the formula says.
    """
    adjacency = random_adjacency(8, 6, 0.5, seed=4)
    weights = [3.0, 0.2, 1.0, 0.5, 1.0, 2.5] if damped else None
    steps = exact_steps(adjacency, weights).numpy()
    law, state = np.zeros(8), np.eye(8)[2]
    for _ in range(200):
        state = state @ steps
        law += 0.4 * state
        state = 0.6 * state
    graph, walks = graph_of(adjacency, weights), 100_000
    ends = random_walk(graph, torch.tensor([2]), walks=walks, length=60, restart=0.4, seed=5)[0, :, -1]
    counts = np.bincount(ends.numpy(), minlength=8)
    expected = walks * law
    assert expected.min() > 20
    assert stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), 7) > ALARM
    # And the miner counts exactly such visits: over many hops its shares come to the same law.
    scale = torch.linspace(0.5, 2, 8) if damped else None
    neighbors, visits = walk_neighbors(
        graph,
        torch.tensor([2]),
        walks=2000,
        length=1000,
        restart=0.4,
        top_k=8,
        seed=6,
        pin_scale=scale,
    )
    want = law * (scale.double().numpy() if damped else 1.0)
    want[2] = 0
    got = np.zeros(8)
    kept = neighbors[0] >= 0
    got[neighbors[0][kept]] = visits[0][kept]
    # 2 M correlated visits: a correlation length below 10 hops leaves a relative error below 1 %.
    np.testing.assert_allclose(got / got.sum(), want / want.sum(), rtol=0.02)


def test_degenerate_graphs():
    for adjacency in ([[0]], [[1]], [[1, 1]]):
        graph = graph_of(torch.tensor(adjacency))
        neighbors, weights = walk_neighbors(graph, torch.tensor([0, -1]), walks=3, length=2, top_k=4)
        assert (neighbors == -1).all() and (weights == 0).all()
    none, start = torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    empty = WalkGraph(start, none, start, none)
    assert walk_neighbors(empty, torch.tensor([-1]), walks=3, length=2, top_k=4)[0].shape == (1, 4)
    pair = graph_of(torch.tensor([[1], [1]]))
    neighbors, weights = walk_neighbors(pair, torch.tensor([0, 1]), walks=64, length=8, top_k=2)
    assert neighbors.tolist() == [[1, -1], [0, -1]]
    assert 200 < weights[0, 0] < 312  # of 512 hops half end at the other pin


def test_a_pin_that_scales_to_zero_is_no_neighbor():
    graph = graph_of(torch.ones(4, 1, dtype=torch.int64))
    scale = torch.tensor([1.0, 0.0, 1.0, 1.0])
    neighbors, _ = walk_neighbors(graph, torch.tensor([0]), walks=64, length=8, top_k=4, pin_scale=scale)
    assert sorted(neighbors[0].tolist()) == [-1, -1, 2, 3]


def test_opcheck_and_compile():
    graph, starts = graph_of(random_adjacency(20, 10, 0.3), torch.ones(10)), torch.arange(20)
    plan = (torch.ones(20), starts, 3, 2, 0.5, 4, 0, 1)
    torch.library.opcheck(torch.ops.pinclip.walk_neighbors, (*vars(graph).values(), *plan))
    call = lambda pins: walk_neighbors(graph, pins, walks=3, length=2, top_k=4)[1].sum(-1)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(starts), call(starts))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"starts": torch.tensor([4])}, "names pin 4, which is not in"),
        ({"starts": torch.tensor([-2])}, "names pin -2"),
        ({"starts": torch.tensor([0.0])}, "starts cannot be torch.float32"),
        ({"top_k": 0}, "top_k is 0"),
        ({"walks": 0}, "walks cannot be 0"),
        ({"stop_visits": -1}, "stop_visits cannot be -1"),
        ({"pin_scale": torch.ones(3)}, "pin_scale is torch.float32 (3,), want torch.float32 (4,)"),
        ({"pin_scale": torch.ones(4).double()}, "pin_scale is torch.float64"),
        ({"pin_scale": torch.tensor([1, 1, 1, torch.inf])}, "pin_scale must be finite"),
        ({"pin_scale": torch.tensor([1, 1, 1, -1.0])}, "pin_scale must be finite and not negative"),
    ],
)
def test_refused_arguments(change, message):
    good = {"starts": torch.tensor([0]), "walks": 2, "length": 2, "top_k": 2}
    graph = graph_of(torch.ones(4, 1, dtype=torch.int64))
    walk_neighbors(graph, **good)
    with pytest.raises(ValueError) as error:
        walk_neighbors(graph, **(good | change))
    assert message in str(error.value)


def test_no_threads_to_be_had_is_no_error(threads):
    """More threads than the machine gives: those that start do the work."""
    graph = graph_of(random_adjacency(60, 25, 0.12))
    want = walk_neighbors(graph, torch.arange(60), walks=9, length=3, top_k=3)
    threads(500)
    again = walk_neighbors(graph, torch.arange(60), walks=9, length=3, top_k=3)
    assert torch.equal(want[0], again[0])


@pytest.mark.gpu
@pytest.mark.parametrize("stop_visits", [0, 9])
def test_the_gpu_finds_the_same(stop_visits):
    graph, starts = graph_of(random_adjacency(400, 250, 0.05), torch.rand(250)), torch.arange(400)
    on_gpu = WalkGraph(*(t.cuda() for t in vars(graph).values()))
    scale = scale_of(400)
    options = {"walks": 200, "length": 9, "restart": 0.3, "top_k": 20, "stop_visits": stop_visits, "seed": 8}
    here = walk_neighbors(graph, starts, pin_scale=scale, **options)
    there = walk_neighbors(on_gpu, starts.cuda(), pin_scale=scale.cuda(), **options)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
