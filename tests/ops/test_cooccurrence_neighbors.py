"""Neighbors by shared boards: C++ against the reference bit for bit, and against a matrix product."""

import pytest
import torch
from walk_graphs import graph_of, random_adjacency, wide_graph

from pinclip.ops.cooccurrence_neighbors import cooccurrence_neighbors
from pinclip.ops.random_walk import WalkGraph
from pinclip.reference.cooccurrence_neighbors import cooccurrence_neighbors as reference


def by_reference(graph, starts, board_weights, pin_scale, top_k):
    lists = (graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins)
    return reference(*lists, board_weights, pin_scale, starts, top_k)


def weights_of(count, seed):
    """Weights with ties and zeros among them."""
    values = torch.tensor([0.0, 0.25, 1 / 3, 1.0, 2.0], dtype=torch.float64)
    return values[torch.randint(5, (count,), generator=torch.Generator().manual_seed(seed))]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 80])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_cpp_equals_the_reference_and_a_matrix_product(threads, index, weighted, top_k, num_threads):
    adjacency = random_adjacency(200, 60, 0.05)
    adjacency[3] = 0
    graph, starts = graph_of(adjacency, index=index), torch.arange(200) - 1
    board_weights = weights_of(60, 0) if weighted else None
    pin_scale = weights_of(200, 1).float() if weighted else None
    threads(num_threads)
    neighbors, weights = cooccurrence_neighbors(
        graph, starts, top_k=top_k, board_weights=board_weights, pin_scale=pin_scale
    )
    threads(1)
    want = by_reference(graph, starts, board_weights, pin_scale, top_k)
    assert torch.equal(neighbors, want[0]) and torch.equal(weights, want[1])

    a = adjacency.double()
    dense = (a * (board_weights if weighted else 1.0)) @ a.T
    dense = dense.float() * (pin_scale if weighted else 1.0)
    dense.fill_diagonal_(0)
    for start, found, weight in zip(starts.tolist(), neighbors, weights):
        row = dense[start] if start >= 0 else torch.zeros(200)
        kept = found >= 0
        assert kept.sum() == min(top_k, int((row > 0).sum()))
        torch.testing.assert_close(weight[kept], row[found[kept]], rtol=1e-6, atol=0)
        torch.testing.assert_close(weight, row.sort(descending=True).values[:top_k], rtol=1e-6, atol=0)
        ties = weight.diff()[kept[1:]] == 0
        assert (found.diff()[kept[1:]][ties] > 0).all()  # of equal ones the lower first


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_many_pins(index):
    graph = wide_graph(index=index)
    starts = torch.cat([torch.arange(0, 140_000, 700), torch.tensor([-1, 139_999])])
    board_weights, scale = weights_of(2_000, 0), graph.pin_indptr.diff().clamp_min(1).float() ** -0.5
    found = cooccurrence_neighbors(graph, starts, top_k=25, board_weights=board_weights, pin_scale=scale)
    want = by_reference(graph, starts, board_weights, scale, 25)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert (found[0] > 2**17).any() and ((found[0] >= 0).sum(1) == 25).any()


def test_degenerate_graphs():
    for adjacency in ([[0]], [[1]], [[1, 1]]):
        neighbors, weights = cooccurrence_neighbors(
            graph_of(torch.tensor(adjacency)), torch.tensor([0, -1]), top_k=3
        )
        assert (neighbors == -1).all() and (weights == 0).all()
    none, start = torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    empty = WalkGraph(start, none, start, none)
    assert cooccurrence_neighbors(empty, torch.tensor([-1]), top_k=2)[0].tolist() == [[-1, -1]]
    everyone = graph_of(torch.ones(300, 1, dtype=torch.int64))
    assert cooccurrence_neighbors(everyone, torch.tensor([7]), top_k=9)[0].tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 8, 9]
    ]


def test_opcheck():
    graph = graph_of(random_adjacency(20, 10, 0.3))
    lists = (graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins)
    plan = (torch.ones(10).double(), torch.ones(20), torch.arange(20), 4)
    torch.library.opcheck(torch.ops.pinclip.cooccurrence_neighbors, (*lists, *plan))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"starts": torch.tensor([4])}, "names pin 4"),
        ({"starts": torch.tensor([[0]])}, "starts is torch.int64 (1, 1)"),
        ({"top_k": 0}, "top_k is 0"),
        ({"board_weights": torch.ones(2)}, "board_weights is torch.float32 (2,), want torch.float64 (1,)"),
        ({"board_weights": torch.tensor([-1.0]).double()}, "board_weights must be finite"),
        ({"pin_scale": torch.ones(1)}, "pin_scale is torch.float32 (1,)"),
    ],
)
def test_refused_arguments(change, message):
    good = {"starts": torch.tensor([0]), "top_k": 2}
    graph = graph_of(torch.ones(4, 1, dtype=torch.int64))
    cooccurrence_neighbors(graph, **good)
    with pytest.raises(ValueError) as error:
        cooccurrence_neighbors(graph, **(good | change))
    assert message in str(error.value)
