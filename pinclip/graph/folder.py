"""The folder that `pinclip graph build` writes: the graph of the training edges, its ids and its split.

    graph.json, pin_indptr.npy, pin_boards.npy, board_indptr.npy, board_pins.npy    the training edges
    pins.parquet      pin      int64 | string, strictly increasing; row = the pin's number
    boards.parquet    board    likewise
    split.json        format, kind none | pins | edges | time, fraction, seed, since, counts
    withheld/         the withheld edges as a graph of the same numbering; only where there are any
    stats.json, degrees.png    what the graph looks like (`pinclip.graph.statistics`)

The folder is written aside and renamed into place, and never changed afterwards.
"""

from __future__ import annotations

import difflib
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pinclip import tables
from pinclip.errors import DataError
from pinclip.graph import splits
from pinclip.graph.board_graph import BoardGraph
from pinclip.io import read_json

SPLIT_FORMAT = STATS_FORMAT = 1
SPLIT_KINDS = ("none", "pins", "edges", "time")
# An unknown id is compared with so many of its neighbors in the order of the ids.
_NEAR = 5_000


@dataclass(frozen=True, eq=False)
class GraphFolder:
    """A built graph, opened.

    path:               the folder.
    graph:              the training edges, memory-mapped; withheld edges are not in it.
    pin_ids, board_ids: int64 or large_string, one chunk; the id of a pin or board, by its number.
    split:              the record of split.json.

    Memory: the ids; the graph stays on disk.
    """

    path: Path
    graph: BoardGraph
    pin_ids: pa.Array
    board_ids: pa.Array
    split: dict

    @classmethod
    def open(cls, path: str | os.PathLike) -> GraphFolder:
        """Open the folder and check all of it but the withheld edges.

        Raises DataError, naming the file, for what is missing, damaged, or does not fit the rest.
        """
        path = Path(path)
        if not (path / "graph.json").is_file() or not (path / "split.json").is_file():
            raise DataError(f"{path}: not a graph folder (`pinclip graph build` makes one)")
        graph = BoardGraph.load(path)
        pin_ids = _read_ids(path / "pins.parquet", "pin", graph.num_pins)
        board_ids = _read_ids(path / "boards.parquet", "board", graph.num_boards)
        return cls(path, graph, pin_ids, board_ids, _read_split(path / "split.json"))

    @cached_property
    def withheld(self) -> BoardGraph | None:
        """The withheld edges, in the numbering of `graph`; None where nothing is withheld.

        Raises DataError for a damaged folder, and for one of another numbering.
        """
        path = self.path / "withheld"
        if not self.split["counts"]["edges"]:
            return None
        graph = BoardGraph.load(path)
        if (graph.num_pins, graph.num_boards) != (self.graph.num_pins, self.graph.num_boards):
            raise DataError(f"{path}: {graph!r} does not fit the {self.graph!r}")
        if graph.num_edges != self.split["counts"]["edges"]:
            want = self.split["counts"]["edges"]
            raise DataError(f"{path}: {graph.num_edges} edges, split.json says {want}")
        return graph

    @cached_property
    def stats(self) -> dict:
        """The record of stats.json."""
        path = self.path / "stats.json"
        stats = _read_record(path)
        if stats.get("format") != STATS_FORMAT or not isinstance(stats.get("training"), dict):
            raise DataError(f"{path}: not statistics of format {STATS_FORMAT}")
        return stats

    def check_split(self) -> list[str]:
        """Prove that nothing withheld can be reached in training; returns what was proven, in sentences.

        Both directions of the training graph are searched for every withheld edge. A split by hash is
        worked out anew from the ids: no training edge may be on the withheld side, no withheld one on the
        other. Raises DataError that names the first edge or pin that breaks it. Extra memory: 9 bytes a pin
        or, of single edges, 8 a pin and a board.
        """
        withheld = self.withheld
        if withheld is None:
            return ["nothing is withheld"]
        splits.check_no_edge_leak(self.graph, withheld)
        facts = [f"none of the {withheld.num_edges:,} withheld edges is in the lists of a pin or of a board"]
        fraction, seed = self.split["fraction"], self.split["seed"]
        if self.split["kind"] == "pins":
            cold = splits.below(splits.id_hashes(_each(self.pin_ids), seed), fraction)
            splits.check_no_leak(self.graph, np.flatnonzero(cold))
            splits.check_no_leak(withheld, np.flatnonzero(~cold))
            facts.append(f"none of the {np.count_nonzero(cold):,} withheld pins has a training edge")
        elif self.split["kind"] == "edges":
            hashes = [splits.id_hashes(_each(ids), seed) for ids in (self.pin_ids, self.board_ids)]
            splits.check_edge_sides(self.graph, withheld, *hashes, fraction)
            facts.append("the hash of every edge of either graph is on its side of the withheld share")
        return facts

    def pin_index(self, ids: Sequence[str | int]) -> np.ndarray:
        """The numbers of the pins of these ids: int64 [n]. The text "17" finds the integer 17 as well.

        Raises DataError naming the first id that the graph does not have, and the nearest that it has.
        """
        integers = pa.types.is_integer(self.pin_ids.type)
        known = self.pin_ids.to_numpy() if integers else _Texts(self.pin_ids)
        found = np.empty(len(ids), np.int64)
        for row, given in enumerate(ids):
            wanted = _as_integer(given) if integers else str(given)
            at = -1 if wanted is None else _find(known, wanted)
            if at < 0:
                raise DataError(f"{self.path}: no pin {given!r}{self._nearest(wanted)}")
            found[row] = at
        return found

    def _nearest(self, wanted: str | int | None) -> str:
        if not isinstance(wanted, str):
            return "; its pins are integers" if wanted is None else ""
        at = bisect_left(_Texts(self.pin_ids), wanted)
        around = self.pin_ids.slice(max(at - _NEAR, 0), 2 * _NEAR).to_pylist()
        near = difflib.get_close_matches(wanted, around, n=1, cutoff=0.4)
        return f"; the nearest is {near[0]!r}" if near else ""


class _Texts:
    """An Arrow array of text as a sequence of str, whose order is that of the UTF-8 bytes."""

    def __init__(self, values: pa.Array):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> str:
        return self._values[index].as_py()


def _find(known: Sequence, wanted: str | int) -> int:
    at = bisect_left(known, wanted)
    return at if at < len(known) and known[at] == wanted else -1


def _as_integer(given: str | int) -> int | None:
    """The integer that is written so, if any: "17" is 17, "017" and "+17" are nothing."""
    try:
        value = int(given)
    except ValueError:
        return None
    return value if str(value) == str(given) and 0 <= value < 2**63 else None


def _read_ids(path: Path, column: str, count: int) -> pa.Array:
    """The table of ids in one chunk, strictly increasing."""
    tables.require(path, tables.column_names(path), column)
    parts, kind = [], None
    for row, batch in tables.read(path, [column]):
        values = batch[column]
        kind = pa.int64() if pa.types.is_integer(values.type) else pa.large_string()
        if kind == pa.large_string():
            values = tables.strings(values, path, row, column)
        if values.null_count:
            raise DataError(f"{path} row {row + values.is_null().index(True).as_py()}: no {column!r}")
        parts.append(values.cast(kind))
    ids = pa.concat_arrays(parts) if parts else pa.array([], pa.int64())
    if len(ids) != count:
        raise DataError(f"{path}: {len(ids)} ids, graph.json says {count}")
    rises = pc.less(ids.slice(0, max(len(ids) - 1, 0)), ids.slice(1))
    if not pc.all(rises, min_count=0).as_py():
        raise DataError(f"{path} row {rises.index(False).as_py() + 2}: the ids do not rise")
    return ids


def _each(ids: pa.Array) -> Iterator[str | int]:
    for start in range(0, len(ids), _NEAR):
        yield from ids.slice(start, _NEAR).to_pylist()


def _read_record(path: Path) -> dict:
    record = read_json(path)
    if not isinstance(record, dict):
        raise DataError(f"{path}: not a record")
    return record


def _read_split(path: Path) -> dict:
    split = _read_record(path)
    kind, counts = split.get("kind"), split.get("counts")
    if split.get("format") != SPLIT_FORMAT:
        raise DataError(f"{path}: not a split of format {SPLIT_FORMAT}")
    if kind not in SPLIT_KINDS:
        raise DataError(f"{path}: kind is {kind!r}, want one of {', '.join(SPLIT_KINDS)}")
    if not isinstance(counts, dict) or not all(isinstance(counts.get(key), int) for key in ("edges", "pins")):
        raise DataError(f"{path}: counts is {counts!r}, want the withheld edges and pins")
    if kind in ("pins", "edges") and not (
        isinstance(split.get("fraction"), int | float) and isinstance(split.get("seed"), int)
    ):
        raise DataError(f"{path}: a split by {kind} without its fraction and seed")
    return split
