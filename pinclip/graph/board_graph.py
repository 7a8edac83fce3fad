"""The Pin-Board graph: a bipartite graph kept as compressed sparse rows in both directions.

Shape legend: P pins, B boards, E distinct (pin, board) edges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pinclip.errors import DataError
from pinclip.io import atomic_directory, read_json

_FORMAT = 1
# Edges looked at together by what goes through all of them: their temporaries stay in a core's cache.
_CHUNK = 1 << 16
_ARRAYS = ("pin_indptr", "pin_boards", "board_indptr", "board_pins")


@dataclass(frozen=True, eq=False)
class BoardGraph:
    """Which pin is saved on which board.

    The boards of pin p are `pin_boards[pin_indptr[p]:pin_indptr[p + 1]]`, the pins of board b are
    `board_pins[board_indptr[b]:board_indptr[b + 1]]`; every list is strictly increasing (no edge
    twice) and both directions hold the same edges.

    Args:
        pin_indptr: int64 [P + 1].
        pin_boards: int32 [E], or int64 when P or B needs it.
        board_indptr: int64 [B + 1].
        board_pins: [E], the dtype of `pin_boards`.

    Build one with `from_edges` or `load`; both check what they are given. The arrays are shared, not
    copied, and must not be written to.
    """

    pin_indptr: np.ndarray
    pin_boards: np.ndarray
    board_indptr: np.ndarray
    board_pins: np.ndarray

    @property
    def num_pins(self) -> int:
        return len(self.pin_indptr) - 1

    @property
    def num_boards(self) -> int:
        return len(self.board_indptr) - 1

    @property
    def num_edges(self) -> int:
        return len(self.pin_boards)

    @cached_property
    def pin_degrees(self) -> np.ndarray:
        """Boards of each pin, int64 [P]."""
        return np.diff(self.pin_indptr)

    @cached_property
    def board_sizes(self) -> np.ndarray:
        """Pins of each board, int64 [B]."""
        return np.diff(self.board_indptr)

    def __repr__(self) -> str:
        return f"BoardGraph({self.num_pins} pins, {self.num_boards} boards, {self.num_edges} edges)"

    @classmethod
    def from_edges(cls, pins, boards, num_pins: int, num_boards: int) -> BoardGraph:
        """The graph of the edges (pins[e], boards[e]); repeated edges count once.

        Args:
            pins, boards: integers [n], in [0, num_pins) and [0, num_boards).

        Extra memory: about 40 bytes per given edge. Raises DataError for lists of unequal length, for
        what is not an integer, and for an edge that names a pin or board out of range.
        """
        pins, boards = _index_list(pins, "pins"), _index_list(boards, "boards")
        if len(pins) != len(boards):
            raise DataError(f"edges: {len(pins)} pins against {len(boards)} boards")
        _check_range(pins, num_pins, "pin")
        _check_range(boards, num_boards, "board")
        dtype = index_dtype(num_pins, num_boards)
        by_pin, by_board = _sorted_pairs(pins, boards, num_boards)
        pin_indptr = _indptr(by_pin, num_pins)
        pin_boards = by_board.astype(dtype)
        # A stable sort by board of what is already sorted by pin leaves each board's pins increasing.
        order = np.argsort(pin_boards, kind="stable")
        return cls(pin_indptr, pin_boards, _indptr(by_board, num_boards), by_pin[order].astype(dtype))

    def without_pins(self, pins) -> BoardGraph:
        """The same pins and boards with every edge of `pins` withdrawn.

        Args:
            pins: bool mask [P], or integer pin indices.

        Raises ValueError for a mask of another length or an index out of range.
        """
        gone = self._pin_mask(pins)
        degrees = np.where(gone, 0, self.pin_degrees)
        pin_boards = np.empty(degrees.sum(), self.pin_boards.dtype)
        board_pins = np.empty_like(pin_boards)
        sizes = np.zeros(self.num_boards, np.int64)
        at = 0
        for start, stop in edge_chunks(self.pin_indptr):
            kept = self.pin_boards[start:stop][~gone[edge_rows(self.pin_indptr, start, stop)]]
            pin_boards[at : at + len(kept)] = kept
            at += len(kept)
        at = 0
        for start, stop in edge_chunks(self.board_indptr):
            keep = ~gone[self.board_pins[start:stop]]
            kept = self.board_pins[start:stop][keep]
            boards = edge_rows(self.board_indptr, start, stop)
            sizes[boards[0] : boards[-1] + 1] += np.bincount(
                boards[keep] - boards[0], minlength=boards[-1] - boards[0] + 1
            )
            board_pins[at : at + len(kept)] = kept
            at += len(kept)
        return BoardGraph(indptr_of(degrees), pin_boards, indptr_of(sizes), board_pins)

    def boards_of(self, pin: int) -> np.ndarray:
        """The boards of one pin, increasing (a view)."""
        return self.pin_boards[self.pin_indptr[pin] : self.pin_indptr[pin + 1]]

    def pins_of(self, board: int) -> np.ndarray:
        """The pins of one board, increasing (a view)."""
        return self.board_pins[self.board_indptr[board] : self.board_indptr[board + 1]]

    def co_board_pins(self, pin: int) -> np.ndarray:
        """The other pins that share at least one board with `pin`: int64, increasing."""
        boards = self.boards_of(pin)
        if len(boards) == 0:
            return np.empty(0, np.int64)
        others = np.unique(np.concatenate([self.pins_of(board) for board in boards])).astype(np.int64)
        return others[others != pin]

    def iter_co_board_pins(self, pins=None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (pin, co_board_pins(pin)) for each of `pins` (default: every pin), in that order."""
        for pin in range(self.num_pins) if pins is None else pins:
            yield int(pin), self.co_board_pins(int(pin))

    def save(self, path: str | os.PathLike) -> None:
        """Write the folder `path` atomically: four .npy files and graph.json.

        Raises DataError where the folder cannot be written.
        """
        with atomic_directory(path) as folder:
            for name in _ARRAYS:
                np.save(folder / f"{name}.npy", np.ascontiguousarray(getattr(self, name)))
            write_info(folder, self.num_pins, self.num_boards, self.num_edges)

    @classmethod
    def load(cls, path: str | os.PathLike, mmap: bool = True) -> BoardGraph:
        """Read a folder written by `save` and check every edge of it.

        Args:
            mmap: map the arrays into memory (private, shared between processes until written to)
                instead of reading them.

        Raises DataError, naming the file, for a folder that is missing, truncated or inconsistent.
        """
        path = Path(path)
        info = _read_info(path / "graph.json")
        graph = cls(**{name: _read_array(path / f"{name}.npy", mmap) for name in _ARRAYS})
        graph._check(path, info)
        return graph

    def _pin_mask(self, pins) -> np.ndarray:
        pins = np.asarray(pins)
        if pins.dtype == bool:
            if pins.shape != (self.num_pins,):
                raise ValueError(f"pin mask has shape {pins.shape}, want ({self.num_pins},)")
            return pins
        pins = pins.astype(np.int64, casting="same_kind") if pins.size else np.empty(0, np.int64)
        if pins.size and (pins.min() < 0 or pins.max() >= self.num_pins):
            wrong = pins[(pins < 0) | (pins >= self.num_pins)][0]
            raise ValueError(f"pin {wrong} is not in [0, {self.num_pins})")
        mask = np.zeros(self.num_pins, bool)
        mask[pins] = True
        return mask

    def _check(self, path: Path, info: dict) -> None:
        sides = (
            ("pin_indptr", self.pin_indptr, "pin_boards", self.pin_boards, "pins", info["boards"]),
            ("board_indptr", self.board_indptr, "board_pins", self.board_pins, "boards", info["pins"]),
        )
        for indptr_name, indptr, list_name, lists, owners, bound in sides:
            _check_indptr(path / f"{indptr_name}.npy", indptr, info[owners], info["edges"])
            _check_lists(path / f"{list_name}.npy", indptr, lists, info["edges"], bound)
        if self.pin_boards.dtype != self.board_pins.dtype:
            raise DataError(
                f"{path}: pin_boards is {self.pin_boards.dtype}, board_pins {self.board_pins.dtype}"
            )
        pins_sum = _edge_hash(self.pin_indptr, self.pin_boards, rows_are_pins=True)
        if pins_sum != _edge_hash(self.board_indptr, self.board_pins, rows_are_pins=False):
            raise DataError(f"{path}: pin_boards.npy and board_pins.npy hold different edges")


def edge_chunks(indptr: np.ndarray, size: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) that together cover all edges, each at most `size` edges of at most `size` rows."""
    size = size or _CHUNK
    for row in range(0, len(indptr) - 1, size):
        stop = int(indptr[min(row + size, len(indptr) - 1)])
        for start in range(int(indptr[row]), stop, size):
            yield start, min(start + size, stop)


def edge_rows(indptr: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The row of each edge from `start` to `stop`: int64 [stop - start]."""
    first = int(np.searchsorted(indptr, start, side="right")) - 1
    last = int(np.searchsorted(indptr, stop))
    counts = np.diff(np.clip(indptr[first : last + 1], start, stop))
    return np.repeat(np.arange(first, last), counts)


def write_info(folder: Path, pins: int, boards: int, edges: int) -> None:
    """Write the graph.json of a folder that holds the arrays of such a graph."""
    info = {"format": _FORMAT, "pins": pins, "boards": boards, "edges": edges}
    (folder / "graph.json").write_text(json.dumps(info) + "\n", encoding="utf-8")


def _index_list(values, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1:
        raise DataError(f"edges: {name} has shape {values.shape}, want one dimension")
    if values.size == 0:
        return np.empty(0, np.int64)
    if values.dtype.kind not in "iu":
        raise DataError(f"edges: {name} has dtype {values.dtype}, want integers")
    if values.dtype == np.uint64 and values.max() > np.iinfo(np.int64).max:
        raise DataError(f"edges: {name} has the value {values.max()}, beyond int64")
    return values.astype(np.int64, copy=False)


def _check_range(values: np.ndarray, bound: int, kind: str) -> None:
    if values.size and (values.min() < 0 or values.max() >= bound):
        row = int(np.argmax((values < 0) | (values >= bound)))
        raise DataError(f"edge {row} names {kind} {values[row]}, which is not in [0, {bound})")


def index_dtype(num_pins: int, num_boards: int) -> type:
    """The type of the lists of a graph of this size."""
    return np.int32 if max(num_pins, num_boards) <= np.iinfo(np.int32).max else np.int64


def _sorted_pairs(major: np.ndarray, minor: np.ndarray, num_minor: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (major, minor) pairs in lexicographic order."""
    if major.size == 0:
        return major, minor
    if (int(major.max()) + 1) * num_minor <= np.iinfo(np.int64).max:
        keys = np.unique(major * np.int64(num_minor) + minor)
        return keys // num_minor, keys % num_minor
    order = np.lexsort((minor, major))
    major, minor = major[order], minor[order]
    first = np.concatenate(([True], (np.diff(major) != 0) | (np.diff(minor) != 0)))
    return major[first], minor[first]


def _indptr(rows: np.ndarray, num_rows: int) -> np.ndarray:
    return indptr_of(np.bincount(rows, minlength=num_rows))


def indptr_of(counts: np.ndarray) -> np.ndarray:
    """Where the lists of these lengths begin, and where the last one ends: int64 [n + 1]."""
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _read_info(path: Path) -> dict:
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format") != _FORMAT:
        raise DataError(f"{path}: not a graph of format {_FORMAT}")
    for key in ("pins", "boards", "edges"):
        if not isinstance(info.get(key), int) or info[key] < 0:
            raise DataError(f"{path}: {key} is {info.get(key)!r}, want a count")
    return info


def _read_array(path: Path, mmap: bool) -> np.ndarray:
    try:
        # Copy-on-write, not read-only: torch shares a read-only array only with a warning.
        array = np.load(path, mmap_mode="c" if mmap else None)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # numpy evaluates the text of the header: a damaged one can raise anything
        raise DataError(f"{path}: not a whole .npy file ({type(error).__name__})") from error
    if array.ndim != 1:
        raise DataError(f"{path}: has shape {array.shape}, want one dimension")
    return array


def _check_indptr(path: Path, indptr: np.ndarray, rows: int, edges: int) -> None:
    if indptr.dtype != np.int64:
        raise DataError(f"{path}: dtype is {indptr.dtype}, want int64")
    if len(indptr) != rows + 1:
        raise DataError(f"{path}: has {len(indptr)} entries, want {rows + 1}")
    rises = all(
        (indptr[row + 1 : row + 1 + _CHUNK] >= indptr[row : row + _CHUNK][: rows - row]).all()
        for row in range(0, rows, _CHUNK)
    )
    if indptr[0] != 0 or indptr[-1] != edges or not rises:
        raise DataError(f"{path}: does not rise from 0 to {edges}")


def _check_lists(path: Path, indptr: np.ndarray, lists: np.ndarray, edges: int, bound: int) -> None:
    if lists.dtype not in (np.int32, np.int64):
        raise DataError(f"{path}: dtype is {lists.dtype}, want int32 or int64")
    if len(lists) != edges:
        raise DataError(f"{path}: has {len(lists)} entries, want {edges}")
    for start in range(0, edges, _CHUNK):
        # One entry more than the chunk, so that the step from one chunk into the next is looked at too.
        some = lists[start : start + _CHUNK + 1]
        if some.min() < 0 or some.max() >= bound:
            raise DataError(f"{path}: has an index outside [0, {bound})")
        falls = start + 1 + np.flatnonzero(some[1:] <= some[:-1])
        # The step from one list into the next is free.
        wrong = falls[indptr[np.searchsorted(indptr, falls)] != falls]
        if len(wrong):
            raise DataError(f"{path}: entry {wrong[0]} breaks the order of its list")


def _edge_hash(indptr: np.ndarray, lists: np.ndarray, *, rows_are_pins: bool) -> int:
    """A sum over edges that does not depend on their order, to compare the two directions."""
    total = 0
    for start, stop in edge_chunks(indptr):
        rows, columns = edge_rows(indptr, start, stop).view(np.uint64), lists[start:stop].astype(np.uint64)
        pins, boards = (rows, columns) if rows_are_pins else (columns, rows)
        mixed = (pins * np.uint64(0x9E3779B97F4A7C15)) ^ (boards * np.uint64(0xC2B2AE3D27D4EB4F))
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        total += int((mixed ^ (mixed >> np.uint64(32))).sum(dtype=np.uint64))
    return total % 2**64
