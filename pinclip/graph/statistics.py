"""What a graph looks like: degrees, components, a plot; in memory bounded by pins and boards, not by edges.

Shape legend: P pins, B boards, E edges.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pinclip.graph.board_graph import BoardGraph, edge_chunks

_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def distribution(counts: np.ndarray) -> dict[str, float]:
    """Mean and quantiles: the q-quantile of n values is the ceil(q n)-th smallest, and so one of them.

    Args:
        counts: integers [n]. Empty gives zeros.

    Extra memory: a copy.
    """
    n = len(counts)
    if n == 0:
        return dict.fromkeys([*_QUANTILES, "mean"], 0)
    rising = np.sort(counts)
    found = {name: int(rising[max(int(np.ceil(q * n)) - 1, 0)]) for name, q in _QUANTILES.items()}
    return found | {"mean": round(float(rising.sum(dtype=np.float64) / n), 4)}


@dataclass(frozen=True)
class Components:
    """Connected components, those of pins and boards without an edge left out."""

    count: int
    largest_pins: int
    largest_boards: int


def components(graph: BoardGraph) -> Components:
    """The connected components of the graph.

    Every pin points to a pin of its component with no greater number, itself at first. A round gives each
    board the least pointer among its pins and each pin the least among its boards, hooks the pin that it
    pointed to onto that as well, and shortens all pointers to their ends; it is over when nothing changes.
    So trees of pointers merge rather than labels creep, and the rounds grow with the logarithm of the
    diameter (FastSV: Zhang, Azad, Hu, SIAM PP 2020, where both ends are of one kind).

    Extra memory: 16 to 24 bytes a pin, 4 to 8 a board, and a chunk of edges. Time: two passes over the
    edges a round; power-law graphs take three or four.
    """
    dtype = np.int32 if graph.num_pins < 2**31 else np.int64
    pointer = np.arange(graph.num_pins, dtype=dtype)
    while True:
        of_board = _least(graph.board_indptr, graph.board_pins, pointer, graph.num_pins)
        least = _least(graph.pin_indptr, graph.pin_boards, of_board, graph.num_pins)
        changed = np.flatnonzero(least < pointer)
        if len(changed) == 0:
            break
        np.minimum.at(pointer, pointer[changed], least[changed])
        np.minimum(pointer, least, out=pointer)
        del least, changed
        while not np.array_equal(shorter := pointer[pointer], pointer):
            pointer = shorter
    linked = np.diff(graph.pin_indptr) > 0
    sizes = np.bincount(pointer[linked], minlength=1)
    if not linked.any():
        return Components(0, 0, 0)
    largest = int(np.argmax(sizes))
    return Components(
        count=int(np.count_nonzero(sizes)),
        largest_pins=int(sizes[largest]),
        largest_boards=int(np.count_nonzero(of_board == largest)),
    )


def describe(graph: BoardGraph) -> dict:
    """Counts, distributions and components of a graph, JSON-ready."""
    found = components(graph)
    degrees, sizes = np.diff(graph.pin_indptr), np.diff(graph.board_indptr)
    return {
        "pins": graph.num_pins,
        "boards": graph.num_boards,
        "edges": graph.num_edges,
        "isolated_pins": int(np.count_nonzero(degrees == 0)),
        "empty_boards": int(np.count_nonzero(sizes == 0)),
        "pin_degrees": distribution(degrees),
        "board_sizes": distribution(sizes),
        "components": {
            "count": found.count,
            "largest_pins": found.largest_pins,
            "largest_boards": found.largest_boards,
        },
    }


def plot(graph: BoardGraph, path: str | os.PathLike) -> None:
    """Draw the distributions of pin degrees and board sizes, log-log, as the PNG file `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    sides = (
        ("pins", "boards of a pin", np.diff(graph.pin_indptr), "#1f77b4"),
        ("boards", "pins of a board", np.diff(graph.board_indptr), "#d62728"),
    )
    for axes, (kind, label, counts, color) in zip(figure.subplots(1, 2), sides, strict=True):
        number = np.bincount(counts)[1:]
        values = np.flatnonzero(number) + 1
        number = number[values - 1]
        axes.loglog(
            values, number, ".", color=color, alpha=0.35, markersize=4, label=f"{kind} with exactly x"
        )
        at_least = np.cumsum(number[::-1])[::-1]
        axes.loglog(values, at_least, color=color, linewidth=1.5, label=f"{kind} with x or more")
        axes.set(xlabel=label, ylabel=kind, title=f"{number.sum():,} {kind} with an edge")
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(frameon=False)
    with open(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _least(indptr: np.ndarray, lists: np.ndarray, values: np.ndarray, none: int) -> np.ndarray:
    """The least of `values` over each row's list, `none` for an empty one: [R], the dtype of `values`."""
    result = np.full(len(indptr) - 1, none, values.dtype)
    for start, stop in edge_chunks(indptr):
        first = int(np.searchsorted(indptr, start, side="right")) - 1
        last = int(np.searchsorted(indptr, stop))
        begins = np.maximum(indptr[first:last], start)
        rows = np.flatnonzero(indptr[first + 1 : last + 1] > begins)
        found = np.minimum.reduceat(values[lists[start:stop]], begins[rows] - start)
        # A list that is parted by the end of a chunk is met twice.
        result[first + rows] = np.minimum(result[first + rows], found)
    return result
