"""The C++ walker against the torch reference bit for bit, and both against exact transition probabilities.

Every chi-square test here raises a false alarm with probability ALARM; its seed is fixed.
"""

import dataclasses
import math
import threading
import time

import numpy as np
import pytest
import torch
from pinclip_kernels import extension
from scipy import stats
from walk_graphs import exact_steps, graph_of, offsets, random_adjacency

from pinclip.ops.random_walk import WalkGraph, board_alias, random_walk
from pinclip.reference.random_walk import philox4x32, walk_words
from pinclip.reference.random_walk import random_walk as reference

ALARM = 1e-6


def walk_by_reference(graph, starts, *, walks, length, restart=0.0, seed=0, first_walk=None):
    lists = (graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins, graph.board_alias)
    return reference(*lists, starts, first_walk, walks, length, restart, seed)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_equals_the_published_vectors(counter, key, words):
    """Known-answer vectors of the Random123 distribution."""
    drawn = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in drawn) == words


# Sizes: one lane and one more than a bundle of lanes, several bundles, enough hops that threads share them.
@pytest.mark.parametrize("num_starts, walks, length", [(1, 1, 1), (1, 65, 3), (40, 7, 5), (40, 300, 12)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_cpp_equals_the_reference(threads, num_starts, walks, length, weighted, index, num_threads):
    adjacency = random_adjacency(40, 25, 0.12)
    adjacency[3] = 0
    weights = torch.rand(25, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    graph = graph_of(adjacency, weights, index)
    starts = torch.arange(num_starts) - 1
    options = {"walks": walks, "length": length, "restart": 0.3, "seed": 2**62 + 12345}
    threads(num_threads)
    drawn = random_walk(graph, starts, **options)
    threads(1)
    assert drawn.shape == (num_starts, walks, length) and drawn.dtype == torch.int64
    assert torch.equal(drawn, walk_by_reference(graph, starts, **options))
    if num_starts > 4:
        assert (drawn[4] == -1).all() and (drawn[0] == -1).all()  # the isolated pin 3, and start -1
        assert (drawn[1:3] >= 0).all()


@pytest.mark.parametrize("restart", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_of_hops_follow_the_exact_law(restart, weighted):
    """(first, second) hop of 200,000 walks from one pin: T[s, i] ((1 - c) T[i, j] + c T[s, j])."""
    adjacency = random_adjacency(8, 6, 0.5, seed=4)
    assert (adjacency.sum(0) > 0).all() and (adjacency.sum(1) > 0).all()
    weights = [3.0, 0.2, 1.0, 0.0, 1.0, 2.5] if weighted else None
    drawn = random_walk(
        graph_of(adjacency, weights), torch.tensor([2]), walks=200_000, length=2, restart=restart
    )
    counts = np.bincount((drawn[0, :, 0] * 8 + drawn[0, :, 1]).numpy(), minlength=64)
    steps = exact_steps(adjacency, weights)
    law = steps[2][:, None] * ((1 - restart) * steps + restart * steps[2][None])
    expected = 200_000 * law.flatten().numpy()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert expected[kept].min() > 20
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert stats.chi2.sf(statistic, kept.sum() - 1) > ALARM


def test_walks_are_keyed_by_seed_start_and_walk():
    graph = graph_of(random_adjacency(40, 25, 0.3))
    starts = torch.tensor([5, 9, 5])
    drawn = random_walk(graph, starts, walks=50, length=4, restart=0.2, seed=7)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn, random_walk(graph, starts, walks=50, length=4, restart=0.2, seed=8))
    longer = random_walk(graph, starts, walks=60, length=9, restart=0.2, seed=7)
    assert torch.equal(longer[:, :50, :4], drawn)
    later = random_walk(
        graph, starts, walks=20, length=4, restart=0.2, seed=7, first_walk=torch.tensor([30, 10, 0])
    )
    assert torch.equal(later, torch.stack([drawn[0, 30:], drawn[1, 10:30], drawn[2, :20]]))
    last = torch.full((3,), 2**32 - 50)
    drawn = random_walk(graph, starts, walks=50, length=4, first_walk=last)
    assert torch.equal(drawn, walk_by_reference(graph, starts, walks=50, length=4, first_walk=last))


def walk_by_hand(graph, start, walk, length, restart, seed, pin_shift=0):
    """One walk, in Python integers, from the words of Philox alone; pins are numbered from `pin_shift` on."""
    boards_of, pins_of = (
        [lists[begin:end].tolist() for begin, end in zip(indptr.tolist(), indptr[1:].tolist())]
        for lists, indptr in ((graph.pin_boards, graph.pin_indptr), (graph.board_pins, graph.board_indptr))
    )
    home, pin, visited = start + pin_shift, start, []
    for hop in range(length):
        counter = (hop, walk, home % 2**32, home // 2**32)
        back, for_board, for_pin, _ = (int(w) for w in philox4x32(tuple(map(torch.tensor, counter)), seed))
        pin = start if back < int(restart * 2**32) else pin
        board = boards_of[pin][for_board * len(boards_of[pin]) >> 32]
        pin = pins_of[board][for_pin * len(pins_of[board]) >> 32]
        visited.append(pin + pin_shift)
    return visited


def test_a_walk_by_hand():
    graph = graph_of(random_adjacency(12, 9, 0.4))
    starts = torch.arange(12)[graph.pin_indptr.diff() > 0]
    drawn = random_walk(graph, starts, walks=3, length=6, restart=0.4, seed=99)
    want = [[walk_by_hand(graph, start, walk, 6, 0.4, 99) for walk in range(3)] for start in starts.tolist()]
    assert drawn.tolist() == want


def test_pins_and_edges_beyond_32_bits():
    """Addresses moved back make a small graph look like the far end of one of 2^33 pins and 2^34 edges."""
    graph = graph_of(random_adjacency(12, 9, 0.4), index=torch.int64)
    pin_shift, edge_shift, walks, length = 2**33, 2**34, 3, 6
    starts = torch.arange(12)[graph.pin_indptr.diff() > 0] + pin_shift
    pin_indptr, board_indptr = graph.pin_indptr + edge_shift, graph.board_indptr + edge_shift
    board_pins = graph.board_pins + pin_shift
    visited = torch.zeros(len(starts), walks, length, dtype=torch.int64)
    compiled = extension.load()
    far = compiled.Graph(
        pin_indptr.data_ptr() - 8 * pin_shift,
        graph.pin_boards.data_ptr() - 8 * edge_shift,
        board_indptr.data_ptr(),
        board_pins.data_ptr() - 8 * edge_shift,
        0,
        True,
    )
    plan = extension.walk_plan(starts, None, walks, length, 0.4, 99)
    compiled.random_walk(far, plan, visited.data_ptr(), 1)
    want = [
        [walk_by_hand(graph, start - pin_shift, walk, length, 0.4, 99, pin_shift) for walk in range(walks)]
        for start in starts.tolist()
    ]
    assert visited.tolist() == want
    hand = philox4x32((torch.tensor(4), torch.tensor(2), torch.tensor(5), torch.tensor(2)), 99)
    assert walk_words(4, torch.tensor(2), torch.tensor(5 + pin_shift), 99) == hand


@pytest.mark.parametrize("walker", [random_walk, walk_by_reference])
def test_the_boundary_of_a_weighted_draw(walker):
    """A word below the threshold keeps the entry, one that equals it goes to the alias."""
    graph = graph_of([[1, 1], [1, 0], [0, 1]])  # pin 0 is on both boards, 1 and 2 on one each
    words = [int(word) for word in walk_words(0, torch.tensor(0), torch.tensor(0), 5)]
    own = words[1] * 2 >> 32
    for threshold, board in ((words[3] + 1, own), (words[3], 1 - own)):
        table = torch.full((4,), 2**32 - 1)
        table[own] = ((1 - own) << 32) + threshold
        weighted = dataclasses.replace(graph, board_alias=table)
        swapped = dataclasses.replace(weighted, board_pins=torch.tensor([1, 0, 2, 0], dtype=torch.int32))
        drawn = {int(walker(g, torch.tensor([0]), walks=1, length=1, seed=5)) for g in (weighted, swapped)}
        assert drawn == {0, 1 + board}  # either pin of the one board, by the order of its list


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_the_alias_table_holds_the_weights(index):
    """What the table gives each board, summed over its entries, is the board's share up to n 2^-32."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([0, 1, 2, 3, 7, 500, 4])
    boards = torch.cat([torch.randperm(500, generator=generator)[:n] for n in lengths.tolist()])
    weights = torch.rand(500, generator=generator, dtype=torch.float64) ** 8
    weights[::5] = 0
    weights[boards[-4:]] = 0
    table = board_alias(offsets(lengths), boards.to(index), weights)
    begin = 0
    for length in lengths.tolist():
        mine, entries = boards[begin : begin + length], table[begin : begin + length]
        begin += length
        if weights[mine].sum() == 0:
            assert (entries == -1).all()
            continue
        own = (entries & 0xFFFFFFFF).double() / 2**32
        share = own.index_add(0, entries >> 32, 1 - own) / length
        want = weights[mine] / weights[mine].sum()
        assert (share - want).abs().max() <= length * 2.0**-32
        assert (share[want == 0] == 0).all()


def test_a_pin_on_millions_of_boards_has_a_table():
    count = 3 * 2**20 + 1
    boards = torch.arange(count, dtype=torch.int32)
    weights = torch.linspace(0.1, 10, count, dtype=torch.float64)
    entries = board_alias(torch.tensor([0, count]), boards, weights)
    own = (entries & 0xFFFFFFFF).double() / 2**32
    share = own.index_add(0, entries >> 32, 1 - own) / count
    assert ((share * weights.sum() / weights) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
def test_degenerate_graphs(index, weighted):
    def walk(adjacency, starts):
        weights = [1.0] * len(adjacency[0]) if weighted else None
        graph = graph_of(torch.tensor(adjacency).reshape(len(adjacency), -1), weights, index)
        drawn = random_walk(graph, torch.tensor(starts, dtype=torch.int64), walks=3, length=2, restart=0.5)
        want = walk_by_reference(
            graph, torch.tensor(starts, dtype=torch.int64), walks=3, length=2, restart=0.5
        )
        assert torch.equal(drawn, want)
        return drawn

    assert walk([[0]], [0, -1]).unique().tolist() == [-1]  # an empty board
    assert walk([[1]], [0]).unique().tolist() == [0]  # one pin on one board
    assert walk([[1], [1], [0]], [0, 1, 2]).tolist()[2] == [[-1, -1]] * 3
    assert walk([[1]], []).shape == (0, 3, 2)


def test_a_graph_without_pins():
    none, start = torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    graph = WalkGraph(start, none, start, none)
    for starts in (torch.empty(0, dtype=torch.int64), torch.tensor([-1])):
        drawn = random_walk(graph, starts, walks=2, length=3)
        assert torch.equal(drawn, torch.full((len(starts), 2, 3), -1))
        assert torch.equal(drawn, walk_by_reference(graph, starts, walks=2, length=3))


def test_a_pin_whose_boards_all_weigh_nothing_is_stuck():
    graph = graph_of([[1, 0], [1, 1], [0, 1]], [0.0, 1.0])
    drawn = random_walk(graph, torch.arange(3), walks=40, length=2)
    assert (drawn[0] == -1).all()
    assert set(drawn[1:].unique().tolist()) == {1, 2}
    assert torch.equal(drawn, walk_by_reference(graph, torch.arange(3), walks=40, length=2))


def test_a_pin_on_very_many_boards():
    adjacency = torch.zeros(3, 100_000, dtype=torch.int64)
    adjacency[0] = 1
    adjacency[1, ::2] = 1
    adjacency[2, 1::2] = 1
    drawn = random_walk(graph_of(adjacency), torch.tensor([0]), walks=20_000, length=1)
    share = (drawn == torch.arange(3)).double().mean(dim=(0, 1))
    # Six standard deviations of a share of 20,000 draws.
    assert (share - torch.tensor([0.5, 0.25, 0.25])).abs().max() < 6 * (0.25 / 20_000) ** 0.5


def test_the_gil_is_released(threads):
    threads(1)
    graph = graph_of(random_adjacency(2000, 500, 0.05), torch.ones(500))
    starts = torch.arange(2000)
    random_walk(graph, starts, walks=1)  # loads the extension
    walker = threading.Thread(target=random_walk, args=(graph, starts), kwargs={"walks": 200, "length": 20})
    ticks = [time.perf_counter()]
    walker.start()
    while walker.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    walker.join()
    # While the GIL is held this thread does not wake: one gap is nearly the whole walk of 8 M hops.
    assert np.diff(ticks).max() < 0.5 * (ticks[-1] - ticks[0])


def test_opcheck_and_compile():
    graph = graph_of(random_adjacency(20, 10, 0.3), torch.ones(10))
    lists = (graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins)
    for table, first_walk in ((None, None), (graph.board_alias, torch.arange(20))):
        torch.library.opcheck(
            torch.ops.pinclip.random_walk, (*lists, table, torch.arange(20), first_walk, 3, 2, 0.5, 1)
        )
    compiled = torch.compile(
        lambda starts: random_walk(graph, starts, walks=3, length=2).sum(-1),
        fullgraph=True,
        backend="aot_eager",
    )
    starts = torch.arange(20)
    assert torch.equal(compiled(starts), random_walk(graph, starts, walks=3, length=2).sum(-1))


@pytest.mark.parametrize(
    "starts, options, message",
    [
        (torch.tensor([4]), {}, "starts cannot be 4"),
        (torch.tensor([-2]), {}, "starts cannot be -2"),
        (torch.tensor([1], dtype=torch.int32), {}, "starts cannot be torch.int32"),
        (torch.tensor(1), {}, "starts cannot be ()"),
        (torch.tensor([1]), {"walks": 0}, "walks cannot be 0"),
        (torch.tensor([1]), {"length": 2**32}, "length cannot be 4294967296"),
        (torch.tensor([1]), {"restart": 1.5}, "restart cannot be 1.5"),
        (torch.tensor([1]), {"restart": float("nan")}, "restart cannot be nan"),
        (torch.tensor([1]), {"seed": -1}, "seed cannot be -1"),
        (torch.tensor([1]), {"first_walk": torch.tensor([2**32])}, "first_walk cannot be 4294967296"),
        (torch.tensor([1]), {"first_walk": torch.tensor([0, 1])}, "first_walk cannot be (2,)"),
    ],
)
def test_refused_arguments(starts, options, message):
    with pytest.raises(ValueError) as error:
        random_walk(graph_of([[1, 0], [1, 1], [0, 1], [1, 0]]), starts, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("pin_indptr", torch.tensor([0, 1, 3])),
        ("pin_indptr", torch.tensor([0, 4, 3, 4])),
        ("pin_indptr", torch.tensor([0, 1, 3, 4], dtype=torch.int32)),
        ("board_indptr", torch.tensor([0, 1, 4])),  # both directions valid, but not of the same edges
        ("pin_boards", torch.tensor([0, 0, 1, 2], dtype=torch.int32)),
        ("board_pins", torch.tensor([0, 1, 1, -1], dtype=torch.int32)),
        ("board_pins", torch.tensor([0, 1, 1, 2])),
        ("board_pins", torch.tensor([0, 1, 1, 2], dtype=torch.int32).repeat(2)[::2]),
        ("board_alias", torch.zeros(3, dtype=torch.int64)),
        ("board_alias", torch.zeros(4)),
        ("board_alias", torch.tensor([1 << 32, 0, 0, 0])),  # beyond the list of the first pin
        ("board_alias", torch.tensor([0, -2, 0, 0])),
    ],
)
def test_walk_graph_refuses(name, value):
    good = vars(graph_of([[1, 0], [1, 1], [0, 1]]))
    WalkGraph(**good)
    with pytest.raises(ValueError, match="random_walk: "):
        WalkGraph(**(good | {name: value}))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, math.inf], [math.nan, 1.0], [1.0]])
def test_the_alias_table_refuses(weights):
    with pytest.raises(ValueError, match="board_weights cannot be"):
        board_alias(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor(weights, dtype=torch.float64))


def test_the_loader_names_the_build_command(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    extension.load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"pip install -e \. --no-build-isolation"):
            extension.load()
    finally:
        extension.load.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_cuda_equals_cpp(weighted, index):
    adjacency = random_adjacency(400, 250, 0.05)
    adjacency[3] = 0
    weights = torch.rand(250, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    graph = graph_of(adjacency, weights, index)
    on_gpu = WalkGraph(*(None if t is None else t.cuda() for t in vars(graph).values()))
    starts = torch.arange(400) - 1
    options = {"walks": 37, "length": 9, "restart": 0.3, "seed": 2**62 + 12345}
    for first_walk in (None, starts + 2**31):
        drawn = random_walk(
            on_gpu, starts.cuda(), **options, first_walk=None if first_walk is None else first_walk.cuda()
        )
        assert torch.equal(drawn.cpu(), random_walk(graph, starts, **options, first_walk=first_walk))
