"""Walking alone: the C++ walker against vectorised NumPy and vectorised torch, per core, in one run.

    python bench/random_walk.py [--threads 1] [--repeats 7]

A hop is pin -> board -> pin: two edges. The rivals draw from their libraries' own generators and, unlike the
walker, give other walks in other chunks; each runs at its best chunk size.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from pinclip.graph.board_graph import BoardGraph
from pinclip.graph.neighbors import NeighborSampler
from pinclip.ops.random_walk import WalkGraph, random_walk
from pinclip.reference.random_walk import random_walk as reference

PINS, BOARDS, EDGES = 9_800, 37_500, 900_000
WALKS, LENGTH, RESTART = 10, 10, 0.15
CHUNKS = (4_096, 16_384, 98_000)


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


def rate(walk: Callable[[], object], hops: int, repeats: int) -> tuple[float, float]:
    """Best and median M hops per second of processor time, so that a busy machine disturbs them less."""
    walk()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        walk()
        seconds.append(time.process_time() - begin)
    return hops / min(seconds) / 1e6, hops / float(np.median(seconds)) / 1e6


def check(walks: WalkGraph, starts: torch.Tensor) -> None:
    """No time is reported unless the walker equals the reference."""
    lists = (walks.pin_indptr, walks.pin_boards, walks.board_indptr, walks.board_pins, walks.board_alias)
    want = reference(*lists, starts, None, WALKS, LENGTH, RESTART, 1)
    got = random_walk(walks, starts, walks=WALKS, length=LENGTH, restart=RESTART, seed=1)
    if not torch.equal(got, want):
        raise SystemExit("the C++ walker differs from the reference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of the walker and of torch")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    graph = power_law_graph()
    lists = [graph.pin_indptr, graph.pin_boards, graph.board_indptr, graph.board_pins]
    plain = WalkGraph(*map(torch.from_numpy, lists))
    damped = NeighborSampler(graph, 0, board_damping=0.5).walk_graph
    pins = torch.arange(PINS)
    for walks in (plain, damped):
        check(walks, pins[::50])
    hops = PINS * WALKS * LENGTH
    starts = np.repeat(np.arange(PINS), WALKS)
    tensors = [*map(torch.from_numpy, [*lists, graph.pin_degrees, graph.board_sizes])]

    def chunked(walk, chunk):
        return lambda: [walk(starts[first : first + chunk]) for first in range(0, len(starts), chunk)]

    def ours(walks):
        return lambda: random_walk(walks, pins, walks=WALKS, length=LENGTH, restart=RESTART, seed=1)

    rng = np.random.default_rng(0)
    rivals = {
        "NumPy": lambda part: numpy_walk(graph, part, rng),
        "torch": lambda part: torch_walk(tensors, torch.from_numpy(part)),
    }
    rows = {
        name: max(rate(chunked(walk, chunk), hops, options.repeats) for chunk in CHUNKS)
        for name, walk in rivals.items()
    }
    best_rival = max(best for best, _ in rows.values())
    rows["pinclip C++"] = rate(ours(plain), hops, options.repeats)
    rows["pinclip C++, damped boards"] = rate(ours(damped), hops, options.repeats)
    versions = f"numpy {np.__version__}, torch {torch.__version__}"
    print(f"{platform.processor() or platform.machine()}, {options.threads} thread(s), {versions}")
    print(f"{graph!r}, {WALKS} walks of {LENGTH} hops from each pin, restart {RESTART}")
    print(f"{'':28}{'M hops/core-s':>14}{'median':>9}{'of best rival':>15}")
    for name, (best, median) in rows.items():
        print(f"{name:28}{best:14.1f}{median:9.1f}{best / best_rival:15.2f}")


if __name__ == "__main__":
    main()
