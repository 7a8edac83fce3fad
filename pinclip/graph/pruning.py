"""Leaving out boards and pins until every one that is left has edges enough.

Shape legend: R rows of one side (pins or boards), E edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pinclip.errors import DataError
from pinclip.graph.board_graph import edge_rows
from pinclip.graph.external import DiskArray


@dataclass(frozen=True)
class Pruning:
    """Which boards and pins are left out of a graph.

    max_board: boards of more pins are left out first; None for no bound. A giant board ("my pins") says
               little about any two of its pins.
    min_board: boards of fewer pins are left out; a board of one pin relates nothing.
    min_pin:   pins on fewer boards are left out. With 0, pins that lost their boards stay, isolated.

    The last two are repeated until nothing changes, so both hold for what is left.
    Raises DataError for a bound that leaves nothing, and for a negative one.
    """

    min_board: int = 2
    max_board: int | None = None
    min_pin: int = 0

    def __post_init__(self) -> None:
        for name in ("min_board", "min_pin"):
            if getattr(self, name) < 0:
                raise DataError(f"{name} is {getattr(self, name)}, want at least 0")
        if self.max_board is not None and self.max_board < max(self.min_board, 1):
            raise DataError(f"max_board is {self.max_board}, below min_board ({self.min_board})")


@dataclass(eq=False)
class Side:
    """The edges in the order of one side: those of row r are `lists[indptr[r]:indptr[r + 1]]`.

    indptr: int64 [R + 1].
    lists:  [E] on disk, 2 * (number on the other side) + (1 where the edge is late), rising within a row.
    alive:  bool [R], the rows that are kept.
    """

    indptr: np.ndarray
    lists: DiskArray
    alive: np.ndarray

    def columns(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(number on the other side int64, late bool) of the edges from `start` to `stop`."""
        values = self.lists[start:stop]
        return (values >> 1).astype(np.int64), (values & 1).astype(bool)


def prune(pins: Side, boards: Side, pruning: Pruning, chunk: int) -> dict[str, int]:
    """Clear `alive` of every pin and board that `pruning` leaves out; returns how many for which reason.

    The edges of what is left out are read once, by at most `chunk` at a time; the result does not depend on
    the order of the removals. Extra memory: 8 bytes a pin and a board and about 50 per edge of a chunk.
    """
    degrees, sizes = np.diff(pins.indptr), np.diff(boards.indptr)
    counts = {"boards_over_max": 0, "boards_under_min": 0, "pins_under_min": 0}
    if pruning.max_board is not None:
        gone = np.flatnonzero(sizes > pruning.max_board)
        counts["boards_over_max"] = len(gone)
        _remove(boards, gone, degrees, chunk)
    some_boards = np.flatnonzero(boards.alive & (sizes < pruning.min_board))
    some_pins = np.flatnonzero(degrees < pruning.min_pin)
    while len(some_boards) or len(some_pins):
        counts["boards_under_min"] += len(some_boards)
        counts["pins_under_min"] += len(some_pins)
        # Both fall together: an edge between two of them is counted down twice, at rows that are gone.
        touched_pins = _remove(boards, some_boards, degrees, chunk)
        touched_boards = _remove(pins, some_pins, sizes, chunk)
        some_pins = _too_few(touched_pins, pins.alive, degrees, pruning.min_pin)
        some_boards = _too_few(touched_boards, boards.alive, sizes, pruning.min_board)
    return counts


def _remove(side: Side, rows: np.ndarray, counts: np.ndarray, chunk: int) -> np.ndarray:
    """Leave out `rows` of `side` and count their edges down on the other side; returns whom they touched."""
    side.alive[rows] = False
    # Many edges are taken to touch everybody; so a round costs what it removes, and memory is bounded.
    few = 8 * np.sum(side.indptr[rows + 1] - side.indptr[rows]) < len(counts)
    touched = [np.empty(0, np.int64)]
    for columns in _edges_of(side, rows, chunk):
        np.subtract.at(counts, columns, 1)
        if few:
            touched.append(columns)
    return np.unique(np.concatenate(touched)) if few else np.arange(len(counts))


def _too_few(touched: np.ndarray, alive: np.ndarray, counts: np.ndarray, least: int) -> np.ndarray:
    return touched[alive[touched] & (counts[touched] < least)]


def _edges_of(side: Side, rows: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """The other ends of all edges of `rows` (rising), some at a time."""
    rows = rows[side.indptr[rows + 1] > side.indptr[rows]]
    # Rows whose lists begin in the same stretch of the file are read together, with what lies between.
    firsts = np.flatnonzero(np.diff(side.indptr[rows] // chunk, prepend=-1))
    for some in np.split(rows, firsts[1:]) if len(rows) else ():
        wanted = np.zeros(some[-1] - some[0] + 1, bool)
        wanted[some - some[0]] = True
        stop = int(side.indptr[some[-1] + 1])
        for start in range(int(side.indptr[some[0]]), stop, chunk):
            end = min(start + chunk, stop)
            columns, _ = side.columns(start, end)
            yield columns if wanted.all() else columns[wanted[edge_rows(side.indptr, start, end) - some[0]]]
