"""Walking and mining: the C++ walker and miner against vectorised NumPy and torch, in one run.

    python bench/random_walk.py [--repeats 7] [--graph DIR]

A hop is pin -> board -> pin: two edges. "Walking" draws walks and keeps them; "mining" draws them, counts the
visits of each start, damps the counts by degree and keeps the best 50. The rivals draw from their libraries'
own generators and, unlike ours, give other walks in other chunks; each runs at its best chunk size. Times are
processor time, so that a busy machine disturbs them less, but for the lines that say wall time. With --graph,
a folder of `pinclip graph build`, mining is measured on that graph as well, from random pins.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.mine import NeighborMiner
from pinclip.graph.mining import Mining
from pinclip.graph.neighbors import walk_graph
from pinclip.ops.random_walk import WalkGraph, random_walk
from pinclip.reference.random_walk import random_walk as reference
from pinclip.reference.walk_neighbors import walk_neighbors as mining_reference

PINS, BOARDS, EDGES = 9_800, 37_500, 900_000
WALKS, LENGTH, RESTART, TOP_K = 100, 10, 0.15, 50
CHUNKS = (4_096, 16_384, 65_536)


def power_law_graph(seed: int = 0) -> BoardGraph:
    """Pins and boards drawn with density x^-1/2 over their range: few large ones, many small."""
    rng = np.random.default_rng(seed)
    pins = (PINS * rng.random(EDGES) ** 2).astype(np.int64)
    boards = (BOARDS * rng.random(EDGES) ** 2).astype(np.int64)
    return BoardGraph.from_edges(pins, boards, PINS, BOARDS)


def numpy_walk(graph: BoardGraph, starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    visited = np.empty((LENGTH, len(starts)), np.int32)
    pin = starts
    for hop in range(LENGTH):
        back, to_board, to_pin = rng.random((3, len(starts)), np.float32)
        pin = np.where(back < RESTART, starts, pin)
        edge = graph.pin_indptr[pin] + (to_board * graph.pin_degrees[pin]).astype(np.int64)
        board = graph.pin_boards[edge]
        edge = graph.board_indptr[board] + (to_pin * graph.board_sizes[board]).astype(np.int64)
        pin = visited[hop] = graph.board_pins[edge]
    return visited


def torch_walk(lists: list[torch.Tensor], starts: torch.Tensor) -> torch.Tensor:
    pin_indptr, pin_boards, board_indptr, board_pins, pin_degrees, board_sizes = lists
    visited = torch.empty((LENGTH, len(starts)), dtype=torch.int32)
    pin = starts
    for hop in range(LENGTH):
        back, to_board, to_pin = torch.rand(3, len(starts))
        pin = torch.where(back < RESTART, starts, pin)
        edge = pin_indptr[pin] + (to_board * pin_degrees[pin]).long()
        board = pin_boards[edge]
        edge = board_indptr[board] + (to_pin * board_sizes[board]).long()
        pin = visited[hop] = board_pins[edge]
    return visited


def numpy_top(visited: np.ndarray, starts: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort, count, damp, sort by (start, weight), keep the first of each start."""
    keys = np.sort((starts.astype(np.int64) << 32 | visited).ravel())
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(first, append=len(keys))
    row, pin = keys[first] >> 32, keys[first] & 0xFFFFFFFF
    other = row != pin
    row, pin, counts = row[other], pin[other], counts[other]
    weights = counts.astype(np.float32) * scale[pin]
    order = np.argsort(row << 32 | (0x7FFFFFFF - weights.view(np.int32)))
    row, pin, weights = row[order], pin[order], weights[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    return pin[rank < TOP_K], weights[rank < TOP_K]


def torch_top(
    visited: torch.Tensor, starts: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    keys, counts = torch.unique(starts << 32 | visited.long(), return_counts=True)
    row, pin = keys >> 32, keys & 0xFFFFFFFF
    other = row != pin
    row, pin, counts = row[other], pin[other], counts[other]
    weights = counts.float() * scale[pin]
    order = torch.argsort(row << 32 | (0x7FFFFFFF - weights.view(torch.int32).long()))
    row, pin, weights = row[order], pin[order], weights[order]
    rank = torch.arange(len(row)) - torch.searchsorted(row, row)
    return pin[rank < TOP_K], weights[rank < TOP_K]


def rate(
    work: Callable[[], object], hops: int, repeats: int, clock: Callable[[], float] = time.process_time
) -> tuple[float, float]:
    """Best and median M hops per second."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = clock()
        work()
        seconds.append(clock() - begin)
    return hops / min(seconds) / 1e6, hops / float(np.median(seconds)) / 1e6


def check(walks: WalkGraph, miner: NeighborMiner, starts: torch.Tensor) -> None:
    """No time is reported unless walker and miner equal their references."""
    want = reference(*vars(walks).values(), starts, None, WALKS, LENGTH, RESTART, 1)
    if not torch.equal(random_walk(walks, starts, walks=WALKS, length=LENGTH, restart=RESTART, seed=1), want):
        raise SystemExit("the C++ walker differs from the reference")
    plan = (WALKS, LENGTH, RESTART, TOP_K, 0, miner.mining.seed)
    want = mining_reference(*vars(miner._walks).values(), miner._pin_scale, starts, *plan)
    if not all(np.array_equal(a, b.numpy()) for a, b in zip(miner.mine(starts.numpy()), want)):
        raise SystemExit("the C++ miner differs from the reference")


def check_rival(graph: BoardGraph, miner: NeighborMiner, rng: np.random.Generator) -> None:
    """The NumPy pipeline finds what ours finds, up to the noise of its own walks."""
    pins = np.arange(0, PINS, 400)
    starts = np.repeat(pins, WALKS * 20)
    found = numpy_top(numpy_walk(graph, starts, rng), starts, miner._pin_scale.numpy())[1].sum()
    mining = Mining(**{**vars(miner.mining), "walks": WALKS * 20})
    ours = NeighborMiner(graph, mining).mine(pins)[1].sum()
    if abs(found / ours - 1) > 0.01:
        raise SystemExit(f"the NumPy pipeline differs: total weight {found}, ours {ours}")


def igraph_walk(graph: BoardGraph) -> Callable[[], object] | None:
    """igraph's own walk, without restart; pins are numbered first, then boards."""
    try:
        igraph = importlib.import_module("igraph")
    except ImportError:
        return None
    pins = np.repeat(np.arange(PINS), graph.pin_degrees)
    whole = igraph.Graph(PINS + BOARDS, np.stack([pins, PINS + graph.pin_boards], axis=1))
    return lambda: [whole.random_walk(int(pin), 2 * LENGTH) for pin in range(0, PINS, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--graph", metavar="DIR", help="a graph folder to mine in as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    graph = power_law_graph()
    rng = np.random.default_rng(0)
    plain = walk_graph(graph, np.ones(BOARDS))
    damped = walk_graph(graph, np.maximum(graph.board_sizes, 1) ** -0.5)
    settings = {"walks": WALKS, "length": LENGTH, "restart": RESTART, "top_k": TOP_K, "seed": 1}
    miners = {
        "pinclip C++": NeighborMiner(graph, Mining(**settings, board_damping=0.0)),
        "pinclip C++, damped boards": NeighborMiner(graph, Mining(**settings)),
    }
    pins = np.arange(PINS)
    for walks, miner in zip((plain, damped), miners.values()):
        check(walks, miner, torch.from_numpy(pins[::200]))
    check_rival(graph, miners["pinclip C++"], rng)

    lists = [graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins]
    tensors = [*map(torch.from_numpy, [*lists, graph.pin_degrees, graph.board_sizes])]
    scale = miners["pinclip C++"]._pin_scale
    starts = np.repeat(pins[::10], WALKS)  # a tenth is work enough for the rivals
    own = PINS * WALKS * LENGTH

    def chunked(work, chunk):
        return lambda: [work(starts[first : first + chunk]) for first in range(0, len(starts), chunk)]

    def best_chunk(work):
        return max(rate(chunked(work, chunk), len(starts) * LENGTH, options.repeats) for chunk in CHUNKS)

    def ours(walks):
        # The result is written over and over, as the rivals do with theirs.
        parts = torch.from_numpy(pins).split(256)
        return lambda: [
            random_walk(walks, part, walks=WALKS, length=LENGTH, restart=RESTART, seed=1) for part in parts
        ]

    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, torch {torch.__version__}")
    print(f"{graph!r}, {WALKS} walks of {LENGTH} hops from each pin, restart {RESTART}, one thread")
    walking = {
        "NumPy": best_chunk(lambda part: numpy_walk(graph, part, rng)),
        "torch": best_chunk(lambda part: torch_walk(tensors, torch.from_numpy(part))),
        "pinclip C++": rate(ours(plain), own, options.repeats),
        "pinclip C++, damped boards": rate(ours(damped), own, options.repeats),
    }
    by_igraph = igraph_walk(graph)
    if by_igraph:
        walking["igraph, no restart"] = rate(by_igraph, len(range(0, PINS, 10)) * LENGTH, options.repeats)
    _print("walking, M hops/core-s", walking)
    if not by_igraph:
        print(f"{'igraph':28}  not installed")

    def by_torch(part):
        return torch_top(torch_walk(tensors, torch.from_numpy(part)), torch.from_numpy(part), scale)

    mining = {
        "NumPy": best_chunk(lambda part: numpy_top(numpy_walk(graph, part, rng), part, scale.numpy())),
        "torch": best_chunk(by_torch),
        **{
            name: rate(lambda miner=miner: miner.mine(pins), own, options.repeats)
            for name, miner in miners.items()
        },
    }
    _print("mining, M hops/core-s", mining)

    print("\nmining on more threads, wall time, M hops/s")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        best, median = rate(lambda: miners["pinclip C++"].mine(pins), own, options.repeats, time.perf_counter)
        print(f"{threads} thread(s){best:31.1f}{median:9.1f}")

    if options.graph:
        torch.set_num_threads(1)
        large = BoardGraph.load(options.graph)
        some = rng.choice(np.flatnonzero(large.pin_degrees), 20_000, replace=False)
        print(f"\nmining in {large!r} from {len(some):,} random pins, M hops/core-s")
        for name, damping in (("pinclip C++", 0.0), ("pinclip C++, damped boards", 0.5)):
            miner = NeighborMiner(large, Mining(**settings, board_damping=damping))
            best, median = rate(lambda miner=miner: miner.mine(some), len(some) * WALKS * LENGTH, 3)
            print(f"{name:28}{best:14.1f}{median:9.1f}")


def _print(title: str, rows: dict[str, tuple[float, float]]) -> None:
    best_rival = max(best for name, (best, _) in rows.items() if not name.startswith("pinclip"))
    print(f"\n{title:28}{'best':>14}{'median':>9}{'of best rival':>15}")
    for name, (best, median) in rows.items():
        print(f"{name:28}{best:14.1f}{median:9.1f}{best / best_rival:15.2f}")


if __name__ == "__main__":
    main()
