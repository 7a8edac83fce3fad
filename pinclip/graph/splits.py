"""Splits: pins withheld with all their edges, or single edges, by hashes of ids and a seed; and their proof.

A hash sees the id as text, so that the integer 17 and the text "17" are on the same side.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pinclip.errors import DataError
from pinclip.graph.board_graph import BoardGraph, edge_chunks, edge_rows

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Split:
    """A partition of the pins: `train` and `cold`, both int64 and increasing.

    A cold pin is withheld with all its edges; its image and text are not trained on either.
    """

    train: np.ndarray
    cold: np.ndarray

    @property
    def num_pins(self) -> int:
        return len(self.train) + len(self.cold)

    def training_graph(self, graph: BoardGraph) -> BoardGraph:
        """`graph` with every edge of a cold pin withdrawn (indices stay), checked for leaks.

        Raises ValueError where the graph has another number of pins.
        """
        if graph.num_pins != self.num_pins:
            raise ValueError(f"the split is of {self.num_pins} pins, the graph has {graph.num_pins}")
        training = graph.without_pins(self.cold)
        check_no_leak(training, self.cold)
        return training

    def to_dict(self, ids: Sequence[str]) -> dict:
        """A JSON-ready record: the cold ids, and a digest of all ids (which does not see their order)."""
        if len(ids) != self.num_pins:
            raise ValueError(f"the split is of {self.num_pins} pins, {len(ids)} ids were given")
        return {
            "format": _FORMAT,
            "pins": self.num_pins,
            "digest": _digest(ids),
            "cold": [str(ids[pin]) for pin in self.cold],
        }

    @classmethod
    def from_dict(cls, record: dict, ids: Sequence[str]) -> Split:
        """The split of `to_dict`, for the same set of ids in whatever order they stand now.

        Raises DataError where the record is no split, or is one of another set of pins.
        """
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise DataError(f"not a split of format {_FORMAT}")
        try:
            pins, digest, cold_ids = record["pins"], record["digest"], list(record["cold"])
        except (KeyError, TypeError) as error:
            raise DataError(f"damaged split: {error}") from error
        if pins != len(ids) or digest != _digest(ids):
            raise DataError(f"the split was made for another set of pins ({pins} then, {len(ids)} now)")
        where = {str(id_): pin for pin, id_ in enumerate(ids)}
        unknown = next((id_ for id_ in cold_ids if id_ not in where), None)
        if unknown is not None:
            raise DataError(f"damaged split: cold pin {unknown!r} is not among the pins")
        return cls._of_cold(np.array([where[id_] for id_ in cold_ids], np.int64), pins)

    @classmethod
    def _of_cold(cls, cold: np.ndarray, num_pins: int) -> Split:
        mask = np.zeros(num_pins, bool)
        mask[cold] = True
        return cls(np.flatnonzero(~mask).astype(np.int64), np.flatnonzero(mask).astype(np.int64))


def cold_split(ids: Sequence[str], fraction: float, seed: int, eligible=None) -> Split:
    """Withhold every eligible pin whose hash of (seed, id), as a share of 2^64, is below `fraction`.

    So the side of a pin depends on its own id and the seed alone: not on the order of the ids, and not on
    which other pins there are. A graph, a table of pairs and a run that name the same fraction and seed agree
    on every pin. About fraction * n pins are withheld, with a standard deviation below sqrt(n) / 2.

    Args:
        ids: n distinct ids.
        fraction: in [0, 1].
        eligible: bool [n] or None (all); a pin that is not eligible is a training pin.

    Raises ValueError for a fraction out of range or a mask of another length, DataError for an id
    that is there twice.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, want a value in [0, 1]")
    names = [str(id_) for id_ in ids]
    _check_distinct(names)
    cold = below(id_hashes(names, seed), fraction)
    if eligible is not None:
        eligible = np.asarray(eligible, bool)
        if eligible.shape != cold.shape:
            raise ValueError(f"eligible has shape {eligible.shape}, want ({len(names)},)")
        cold &= eligible
    return Split._of_cold(np.flatnonzero(cold), len(names))


def is_withheld(name: str, fraction: float, seed: int) -> bool:
    """Whether `cold_split` withholds the pin of this id."""
    return _hash(name, seed) < fraction * 2.0**64


def id_hashes(ids: Iterable[str | int], seed: int) -> np.ndarray:
    """The hash of (seed, id) of each id: uint64 [n]. `is_withheld` compares it with the fraction."""
    keyed = hashlib.blake2b(digest_size=8, key=_key(seed))

    def digest(id_: str | int) -> bytes:
        hash_ = keyed.copy()
        hash_.update(_raw(str(id_)))
        return hash_.digest()

    digests, parts = map(digest, ids), []
    while some := b"".join(islice(digests, 1 << 16)):  # so that few of them are objects at a time
        parts.append(np.frombuffer(some, "<u8"))
    return np.concatenate([np.empty(0, np.uint64), *parts])


def edge_hashes(pin_hashes: np.ndarray, board_hashes: np.ndarray) -> np.ndarray:
    """The hash of each edge, from the hashes of its pin and its board: uint64 [n].

    Two rounds of the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), one for each end.
    """
    return mixed(mixed(pin_hashes + np.uint64(0x9E3779B97F4A7C15)) ^ board_hashes)


def below(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which hashes, as a share of 2^64, are below `fraction`: bool [n]."""
    bound = math.ceil(fraction * 2.0**64)
    if bound >= 2**64:
        return np.ones(len(hashes), bool)
    return hashes < np.uint64(bound)


def check_no_leak(training_graph: BoardGraph, cold) -> None:
    """Prove that no edge of a cold pin is in the training graph, looking at both directions.

    Args:
        cold: integer pin indices.

    Raises DataError that names the first cold pin found. Extra memory: a bounded chunk of edges.
    """
    mask = np.zeros(training_graph.num_pins, bool)
    mask[np.asarray(cold, np.int64)] = True
    leaking = np.flatnonzero(mask & (training_graph.pin_degrees > 0))
    if len(leaking):
        raise DataError(
            f"leak: cold pin {leaking[0]} has {training_graph.pin_degrees[leaking[0]]} training edges"
        )
    for start, stop in edge_chunks(training_graph.board_indptr):
        pins = training_graph.board_pins[start:stop]
        reached = np.flatnonzero(mask[pins])
        if len(reached):
            board = edge_rows(training_graph.board_indptr, start, stop)[reached[0]]
            raise DataError(f"leak: cold pin {pins[reached[0]]} is on training board {board}")


def check_no_edge_leak(training_graph: BoardGraph, withheld: BoardGraph) -> None:
    """Prove that no withheld edge is in the training graph, looking at both directions of both.

    Raises DataError that names the first such edge, and where the two do not have the same pins and boards.
    Extra memory: a bounded chunk of edges.
    """
    if (training_graph.num_pins, training_graph.num_boards) != (withheld.num_pins, withheld.num_boards):
        raise DataError(f"{withheld!r} and {training_graph!r} are of different pins or boards")
    for direction in ("pin", "board"):
        shared = _shared_edge(_lists(training_graph, direction), _lists(withheld, direction))
        if shared is not None:
            pin, board = shared if direction == "pin" else shared[::-1]
            raise DataError(f"leak: the withheld edge of pin {pin} and board {board} is a training edge")


def check_edge_sides(
    training_graph: BoardGraph,
    withheld: BoardGraph,
    pin_hashes: np.ndarray,
    board_hashes: np.ndarray,
    fraction: float,
) -> None:
    """Prove that the hash of every withheld edge is below `fraction`, and that of no training edge.

    Raises DataError that names the first edge found on the wrong side. Extra memory: a chunk of edges.
    """
    for graph, side in ((training_graph, "training"), (withheld, "withheld")):
        for start, stop in edge_chunks(graph.pin_indptr):
            pins, boards = edge_rows(graph.pin_indptr, start, stop), graph.pin_boards[start:stop]
            held = below(edge_hashes(pin_hashes[pins], board_hashes[boards]), fraction)
            wrong = np.flatnonzero(held == (graph is training_graph))
            if len(wrong):
                pin, board = pins[wrong[0]], boards[wrong[0]]
                raise DataError(
                    f"leak: by its hash the {side} edge of pin {pin} and board {board} is not one"
                )


def _lists(graph: BoardGraph, direction: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(offsets, lists, how many there can be in a list) of one direction."""
    if direction == "pin":
        return graph.pin_indptr, graph.pin_boards, graph.num_boards
    return graph.board_indptr, graph.board_pins, graph.num_pins


def _shared_edge(training: tuple, withheld: tuple) -> tuple[int, int] | None:
    """The first (row, column) that is in the lists of both; None where there is none."""
    indptr, lists, width = training
    held_indptr, held_lists, _ = withheld
    for start, stop in edge_chunks(indptr):
        rows, columns = edge_rows(indptr, start, stop), lists[start:stop]
        keys = (rows - rows[0]) * width + columns
        # The withheld edges from the first to the last edge of this chunk; they may be many more.
        begin = _place(held_indptr, held_lists, rows[0], columns[0], "left")
        end = _place(held_indptr, held_lists, rows[-1], columns[-1], "right")
        for first in range(begin, end, len(keys)):
            last = min(first + len(keys), end)
            held = (edge_rows(held_indptr, first, last) - rows[0]) * width + held_lists[first:last]
            at = np.searchsorted(keys, held)
            shared = np.flatnonzero(keys[np.minimum(at, len(keys) - 1)] == held)
            if len(shared):
                row, column = divmod(int(held[shared[0]]), width)
                return row + int(rows[0]), column
    return None


def _place(indptr: np.ndarray, lists: np.ndarray, row: int, column: int, side: str) -> int:
    """Where in the lists the edge (row, column) is, or would be. A list may be far longer than a chunk."""
    bisect = bisect_left if side == "left" else bisect_right
    where = range(int(indptr[row]), int(indptr[row + 1]))
    return where.start + bisect(where, column, key=lambda at: lists[at : at + 1][0])


def _check_distinct(names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"pin id {name!r} is there twice")
        seen.add(name)


def _hash(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(_raw(name), digest_size=8, key=_key(seed)).digest(), "little")


def _key(seed: int) -> bytes:
    return int(seed).to_bytes(16, "little", signed=True)


def _raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value, uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _digest(ids: Sequence[str]) -> str:
    return f"{sum(_hash(str(id_), 0) for id_ in ids) % 2**64:016x}"
