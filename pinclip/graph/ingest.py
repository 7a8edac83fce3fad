"""Edges, in whatever order, into both directions of a graph: read, numbered, sorted, in bounded memory.

One external merge sort (`pinclip.graph.external`), used four times. A buffer of rows becomes its sorted
distinct pin ids and board ids, and two int32 codes a row; the merged ids are the numbers; codes become 64-bit
keys (board, pin, late), which merge into the lists of the boards; keys (pin, board, late) merge into those of
the pins. There is no table of all ids or all edges in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pinclip.errors import DataError
from pinclip.graph.board_graph import indptr_of
from pinclip.graph.edge_source import EdgeArrays, EdgeTables, Moment
from pinclip.graph.external import (
    DiskArray,
    DiskTexts,
    Runs,
    factorize,
    first_of_each,
    join,
    number,
    ordered_map,
)
from pinclip.graph.pruning import Side

# Memory a pin and a board take at most, in all steps of a build (43 measured, of withheld edges).
ID_BYTES = 44
# Memory a row takes while it is in a buffer, beside its text, and how many times the text is held.
_ROW_BYTES, _TEXT_COPIES = 96, 5
# Larger buffers only miss the cache more; smaller ones make too many runs.
_MAX_ROWS, _MIN_BUFFER = 1 << 21, 2 << 20
# The interpreter, NumPy, Arrow and its readers, matplotlib: what a process has that does nothing else.
_LIBRARIES = 200 << 20


@dataclass(frozen=True)
class Work:
    """Where and with what a build works: its temporary folder, bound on memory, threads."""

    folder: Path
    memory: int
    threads: int
    progress: bool

    def buffer(self, ids: int = 0) -> int:
        """The bytes that each of the buffers may take at this point, beside `ids` pins and boards.

        Raises DataError where `memory` is too little.
        """
        fixed = _LIBRARIES + ID_BYTES * ids
        # One for each thread, one waiting to be written, one being filled.
        buffers = self.threads + 2
        buffer = (self.memory - fixed) // buffers
        if buffer < _MIN_BUFFER:
            least = (fixed + buffers * _MIN_BUFFER) / 1e6
            of_what = f" for {ids:,} pins and boards" if ids else ""
            raise DataError(
                f"{self.memory / 1e6:.0f} MB of memory is too little{of_what}: {least:.0f} MB is needed"
            )
        return buffer

    def rows(self, ids: int = 0) -> int:
        """The rows of integers that fit a buffer."""
        return min(self.buffer(ids) // _ROW_BYTES, _MAX_ROWS)

    def bar(self, what: str, total: int | None = None) -> tqdm:
        disable = None if self.progress else True
        return tqdm(total=total, desc=what, unit=" edges", unit_scale=True, disable=disable, mininterval=0.5)


@dataclass(eq=False)
class Ingested:
    """Both directions of all distinct edges, the ids by number, and what was counted on the way."""

    pins: Side
    boards: Side
    pin_ids: DiskArray | DiskTexts
    board_ids: DiskArray | DiskTexts
    counts: dict[str, int]


def ingest(
    edges: EdgeTables | EdgeArrays, since: Moment | None, late_from: Moment | None, work: Work
) -> Ingested:
    """Read `edges` and sort them.

    since:     rows before this are dropped.
    late_from: an edge is late if none of its rows is before this; None for no late edge.

    Raises DataError for what cannot be read, no edge, and more pins and boards than 64 bits tell apart.
    """
    rows = _read(edges, since, late_from, work)
    if rows.ends[-1] == 0:
        raise DataError("no edges" if rows.dropped == 0 else f"no edges: all are before {since.text}")
    pins, boards = _number(rows, work)
    low = {"pins": _bits(len(pins.ids)), "boards": _bits(len(boards.ids))}
    if sum(low.values()) + 1 > 64:
        raise DataError(f"{len(pins.ids):,} pins and {len(boards.ids):,} boards are too many")
    ids = len(pins.ids) + len(boards.ids)
    by_board = _keys(rows, pins, boards, low["pins"], work, ids)
    by_pin = Runs(work.folder / "by_pin")
    board_side = _merge(by_board, len(boards.ids), low["pins"], low["boards"], by_pin, work, ids)
    pin_side = _merge(by_pin, len(pins.ids), low["boards"], low["pins"], None, work, ids)
    counts = {
        "rows": rows.ends[-1] + rows.dropped,
        "rows_before_since": rows.dropped,
        "duplicates": rows.ends[-1] - len(pin_side.lists),
    }
    return Ingested(pin_side, board_side, pins.ids, boards.ids, counts)


@dataclass(eq=False)
class _Column:
    """The pins or boards of all rows: codes into the sorted distinct ids of each buffer."""

    codes: DiskArray
    runs: Runs
    ids: DiskArray | DiskTexts | None = None
    ranks: DiskArray | None = None

    def of_buffer(self, buffer: int, where: slice) -> np.ndarray:
        """The numbers of the ids of a buffer's rows: uint64."""
        return self.ranks[self.runs.span(buffer)][self.codes[where]].astype(np.uint64)


@dataclass(eq=False)
class _Rows:
    """All rows, buffer after buffer; `ends` of the buffers begins with 0."""

    pins: _Column
    boards: _Column
    late: DiskArray | None
    ends: list[int]
    dropped: int


def _read(
    edges: EdgeTables | EdgeArrays, since: Moment | None, late_from: Moment | None, work: Work
) -> _Rows:
    columns = {
        name: _Column(DiskArray(work.folder / f"{name}_codes", np.int32), Runs(work.folder / f"{name}_runs"))
        for name in ("pins", "boards")
    }
    late_file = None if late_from is None else DiskArray(work.folder / "late", bool)
    rows = _Rows(columns["pins"], columns["boards"], late_file, [0], 0)
    bounds = [bound for bound in (since, late_from) if bound is not None]

    def kept() -> Iterator[tuple]:
        for batch in edges.batches(bounds):
            pins, boards, late = _plain(batch.pins), _plain(batch.boards), None
            if late_from is not None:
                late = batch.not_before[-1]
            if since is not None:
                keep = batch.not_before[0]
                rows.dropped += len(keep) - int(np.count_nonzero(keep))
                pins, boards = (_filter(values, keep) for values in (pins, boards))
                late = late if late is None else late[keep]
            yield pins, boards, late

    def encode(batches: list[tuple]) -> tuple:
        pins, boards, late = zip(*batches)
        return factorize(join(pins)), factorize(join(boards)), None if late_from is None else join(late)

    with work.bar("read") as bar:
        for pins, boards, late in ordered_map(encode, _buffers(kept(), work), work.threads):
            for column, (distinct, codes) in ((rows.pins, pins), (rows.boards, boards)):
                column.runs.append(distinct)
                column.codes.append(codes)
            if late is not None:
                rows.late.append(late)
            rows.ends.append(rows.ends[-1] + len(pins[1]))
            bar.update(len(pins[1]))
    pa.default_memory_pool().release_unused()
    return rows


def _buffers(batches: Iterator[tuple], work: Work) -> Iterator[list[tuple]]:
    """Batches, as many as fit a buffer at a time."""
    room, buffer, size, rows = work.buffer(), [], 0, 0
    for piece in (piece for batch in batches for piece in _pieces(batch, room)):
        if buffer and (size + _weight(piece) > room or rows + len(piece[0]) > _MAX_ROWS):
            yield buffer
            buffer, size, rows = [], 0, 0
        buffer.append(piece)
        size, rows = size + _weight(piece), rows + len(piece[0])
    if buffer:
        yield buffer


def _pieces(batch: tuple, room: int) -> Iterator[tuple]:
    """A batch, parted where it does not fit a buffer."""
    rows = len(batch[0])
    parts = max(-(-_weight(batch) // room), -(-rows // _MAX_ROWS), 1)
    step = max(-(-rows // parts), 1)
    for start in range(0, rows, step):
        yield tuple(None if values is None else values[start : start + step] for values in batch)


def _weight(batch: tuple) -> int:
    """The memory that a batch takes while its ids are sorted."""
    pins, boards, _ = batch
    return len(pins) * _ROW_BYTES + _TEXT_COPIES * (_text_bytes(pins) + _text_bytes(boards))


def _number(rows: _Rows, work: Work) -> tuple[_Column, _Column]:
    """Give both columns their ids and ranks."""
    room = max(stop - start for start, stop in zip(rows.ends, rows.ends[1:]))
    for name, column in (("pins", rows.pins), ("boards", rows.boards)):
        column.ids = column.runs.disk_like(work.folder / f"{name}_ids")
        dtype = np.int32 if len(column.runs) < 2**31 else np.int64
        column.ranks = DiskArray(work.folder / f"{name}_ranks", dtype)
        with work.bar(f"number {name}", len(column.runs)) as bar:
            number(column.runs, column.ids, column.ranks, room, work.threads, bar.update)
        column.runs.remove()
    return rows.pins, rows.boards


def _keys(rows: _Rows, pins: _Column, boards: _Column, pin_bits: int, work: Work, ids: int) -> Runs:
    """The keys (board, pin, late) of all rows as sorted runs, one for each buffer."""

    def keys_of(buffer: int) -> tuple[int, np.ndarray]:
        where = slice(rows.ends[buffer], rows.ends[buffer + 1])
        keys = boards.of_buffer(buffer, where) << np.uint64(pin_bits)
        keys |= pins.of_buffer(buffer, where)
        keys <<= np.uint64(1)
        if rows.late is not None:
            keys |= rows.late[where].astype(np.uint64)
        return len(keys), _distinct_edges(keys)

    runs = Runs(work.folder / "by_board")
    work.buffer(ids)
    with work.bar("sort", rows.ends[-1]) as bar:
        for count, keys in ordered_map(keys_of, range(len(rows.ends) - 1), work.threads):
            runs.append(keys)
            bar.update(count)
    for column in (pins, boards):
        column.codes.remove()
        column.ranks.remove()
    if rows.late is not None:
        rows.late.remove()
    return runs


def _merge(runs: Runs, count: int, low: int, high: int, turned: Runs | None, work: Work, ids: int) -> Side:
    """Merge keys (row, column, late) into the lists of `count` rows; `low`, `high` bits tell columns, rows.

    turned: is given the keys (column, row, late) as runs.
    """
    counts = np.zeros(count, np.int64)
    lists = DiskArray(work.folder / f"lists_{'pins' if turned is None else 'boards'}", _list_type(low))
    column_mask = np.uint64(2 ** (low + 1) - 1)

    def merge(slices: list[slice]) -> tuple:
        keys = _distinct_edges(runs.read(slices))
        rows, columns = keys >> np.uint64(low + 1), keys & column_mask
        first = np.flatnonzero(first_of_each(rows))
        lengths = np.diff(first, append=len(rows))
        turned_keys = None
        if turned is not None:
            turned_keys = columns >> np.uint64(1)
            turned_keys <<= np.uint64(high)
            turned_keys |= rows
            turned_keys <<= np.uint64(1)
            turned_keys |= columns & np.uint64(1)
            turned_keys.sort()
        total = sum(where.stop - where.start for where in slices)
        return total, columns.astype(lists.dtype), rows[first].astype(np.int64), lengths, turned_keys

    ranges = runs.ranges(work.rows(ids), align=lambda key: key & ~1)
    with work.bar("lists of pins" if turned is None else "lists of boards", len(runs)) as bar:
        for total, columns, rows, lengths, turned_keys in ordered_map(merge, ranges, work.threads):
            lists.append(columns)
            counts[rows] += lengths
            if turned is not None:
                turned.append(turned_keys)
            bar.update(total)
    runs.remove()
    return Side(indptr_of(counts), lists, np.ones(count, bool))


def _distinct_edges(keys: np.ndarray) -> np.ndarray:
    """Sort keys (in place) and keep the first of each edge: the one that is not late, if there is one."""
    keys.sort()
    return keys[first_of_each(keys >> np.uint64(1))]


def _bits(count: int) -> int:
    return max(count - 1, 1).bit_length()


def _list_type(bits: int) -> type:
    return np.uint32 if bits + 1 <= 32 else np.uint64


def _plain(ids: pa.Array) -> np.ndarray | pa.LargeStringArray:
    return ids.to_numpy() if pa.types.is_integer(ids.type) else ids


def _filter(values: np.ndarray | pa.LargeStringArray, keep: np.ndarray) -> np.ndarray | pa.LargeStringArray:
    return values[keep] if isinstance(values, np.ndarray) else values.filter(pa.array(keep))


def _text_bytes(ids: np.ndarray | pa.LargeStringArray) -> int:
    return 0 if isinstance(ids, np.ndarray) else ids.nbytes
