"""Where edges come from: tables in files, or arrays in memory; read batch by batch and checked.

An id is a string or an integer that is not negative. Integer columns of Parquet stay integers, everything
else is text; all files of one source agree about it, column by column. CSV, TSV and JSONL hold text. A time
is an integer, a float, a date, a timestamp, or text that is one of these; times without a zone are UTC.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa

from pinclip import tables
from pinclip.errors import DataError

_HEADERLESS = ("board", "pin", "time")
_ARRAY_BATCH = 1 << 16
# A row of edges is short, and the reader of CSV holds many blocks.
_CSV_BLOCK = 1 << 20
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1, "day": 86_400_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Moment:
    """A bound on the time of an edge, as it was given: a number, or an ISO-8601 date or time.

    Raises DataError for what is neither.
    """

    text: str
    value: int | float = field(init=False)
    is_number: bool = field(init=False)

    def __post_init__(self) -> None:
        value = _number(self.text)
        object.__setattr__(self, "is_number", value is not None)
        object.__setattr__(self, "value", _microseconds(self.text) if value is None else value)
        if not isinstance(self.value, int) and (self.value is None or not math.isfinite(self.value)):
            raise DataError(f"time {self.text!r}: neither a number nor an ISO-8601 date or time")


@dataclass(frozen=True)
class EdgeBatch:
    """Some edges: ids as int64 or large_string, and for every bound that was asked, whether time >= bound."""

    pins: pa.Array
    boards: pa.Array
    not_before: Sequence[np.ndarray]


@dataclass(frozen=True)
class EdgeTables:
    """The edges of tables: Parquet, JSONL, CSV, TSV; files, folders and patterns.

    A TSV may do without a header: if its first line has neither the board's nor the pin's column name among
    its cells, and these are the usual ones, its columns are board, pin and, if there is a third, time.
    """

    paths: Sequence[str | os.PathLike]
    board_column: str = "board"
    pin_column: str = "pin"
    time_column: str = "time"

    def batches(self, bounds: Sequence[Moment] = ()) -> Iterator[EdgeBatch]:
        """Yield the edges in order, each time compared with every one of `bounds`.

        Raises DataError naming the file, and the row where there is one, for an unreadable file, a missing
        column, a missing or negative id, ids of two types, and a time that cannot be compared with a bound.
        Memory: a batch of the reader, of CSV and TSV 32 MB.
        """
        files = list(dict.fromkeys(file for path in self.paths for file in _find(path)))
        wanted = (self.board_column, self.pin_column, *((self.time_column,) if bounds else ()))
        options = ("--board-column", "--pin-column", "--time-column")
        kinds = _Kinds()
        for file in files:
            columns, names = wanted, headerless_names(file, self.board_column, self.pin_column)
            if names is not None:
                columns = _HEADERLESS[: len(wanted)]
                if len(columns) > len(names):
                    raise DataError(f"{file}: no header and no third column, so there is no time")
            else:
                present = tables.column_names(file)
                for column, option in zip(wanted, options):
                    tables.require(file, present, column, option)
            # A column may serve twice, say as board and as time.
            for row, batch in tables.read(file, list(dict.fromkeys(columns)), names, _CSV_BLOCK):
                boards, pins = (_ids(batch[column], file, row, column) for column in columns[:2])
                kinds.check("board", boards.type, file)
                kinds.check("pin", pins.type, file)
                times = [_not_before(batch[columns[2]], bound, file, row, columns[2]) for bound in bounds]
                yield EdgeBatch(pins, boards, times)


@dataclass(frozen=True)
class EdgeArrays:
    """Edges in memory: `pins[e]` is on `boards[e]`. `name` is what messages call them; no times."""

    name: str
    pins: pa.Array
    boards: pa.Array

    def batches(self, bounds: Sequence[Moment] = ()) -> Iterator[EdgeBatch]:
        """Yield the edges in order. Raises DataError as `EdgeTables.batches` does."""
        if bounds:
            raise DataError(f"{self.name}: its edges have no time")
        if len(self.pins) != len(self.boards):
            raise DataError(f"{self.name}: {len(self.pins)} pins against {len(self.boards)} boards")
        for start in range(0, len(self.pins), _ARRAY_BATCH):
            pins, boards = (
                _ids(values.slice(start, _ARRAY_BATCH), Path(self.name), start + 1, column)
                for column, values in (("pin", self.pins), ("board", self.boards))
            )
            yield EdgeBatch(pins, boards, ())


def headerless_names(file: Path, board_column: str, pin_column: str) -> Sequence[str] | None:
    """The columns of a TSV without a header line; None for any other table."""
    if file.suffix.lower() != ".tsv":
        return None
    cells = tables.first_text_line(file).split("\t")
    if board_column in cells or pin_column in cells:
        return None
    if (board_column, pin_column) != _HEADERLESS[:2]:
        return None  # the user named columns, so a header was meant: `require` says which is missing
    if len(cells) not in (2, 3):
        raise DataError(
            f"{file}: no header with {board_column!r} and {pin_column!r}, and without one it must have the "
            f"two or three columns board, pin[, time]; its first line has {len(cells)}"
        )
    return _HEADERLESS[: len(cells)]


class _Kinds:
    """Which file said first whether a column's ids are integers or text."""

    def __init__(self):
        self._first: dict[str, tuple[pa.DataType, Path]] = {}

    def check(self, column: str, kind: pa.DataType, file: Path) -> None:
        first, where = self._first.setdefault(column, (kind, file))
        if first != kind:
            raise DataError(
                f"mixed id types: the {column}s are {_kind(first)} in {where} and {_kind(kind)} in {file}"
            )


def _kind(type_: pa.DataType) -> str:
    return "integers" if pa.types.is_integer(type_) else "text"


def _find(path: str | os.PathLike) -> list[Path]:
    return tables.find_files(path, tables.SUFFIXES)


def _ids(values: pa.Array, file: Path, first_row: int, column: str) -> pa.Array:
    """A column of ids as int64 or large_string, none of them missing, empty or negative."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type):
        raise DataError(f"{file} row {first_row}: no {column!r}")
    if not pa.types.is_integer(values.type):
        if pa.types.is_floating(values.type) or pa.types.is_boolean(values.type):
            raise DataError(f"{file}: column {column!r} holds {values.type}; an id is a string or an integer")
        return tables.canonical_ids(values, file, first_row, column).cast(pa.large_string())
    if values.null_count:
        missing = values.is_null().index(True).as_py()
        raise DataError(f"{file} row {first_row + missing}: no {column!r}")
    numbers = values.to_numpy(zero_copy_only=False)
    wrong = numbers > np.iinfo(np.int64).max if numbers.dtype == np.uint64 else numbers < 0
    if wrong.any():
        row = int(np.argmax(wrong))
        trouble = "beyond int64" if numbers.dtype == np.uint64 else "negative"
        raise DataError(f"{file} row {first_row + row}: {column!r} is {numbers[row]}, which is {trouble}")
    return pa.array(numbers.astype(np.int64, copy=False))


def _not_before(times: pa.Array, bound: Moment, file: Path, first_row: int, column: str) -> np.ndarray:
    """time >= bound of every row: bool."""
    if times.null_count:
        missing = times.is_null().index(True).as_py()
        raise DataError(f"{file} row {first_row + missing}: no {column!r}")
    kind = times.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if is_text:
        times = _parsed(tables.strings(times, file, first_row, column), bound, file, first_row, column)
        kind = times.type
    if bound.is_number and pa.types.is_integer(kind):
        return times.to_numpy() >= math.ceil(bound.value)
    if bound.is_number and pa.types.is_floating(kind):
        numbers = times.to_numpy()
        if np.isnan(numbers).any():
            row = first_row + int(np.argmax(np.isnan(numbers)))
            raise DataError(f"{file} row {row}: {column!r} is not a number")
        return numbers >= bound.value
    if not bound.is_number and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return _instants_not_before(times, bound.value)
    want = "a number" if bound.is_number else "a date or time"
    raise DataError(
        f"{file}: column {column!r} holds {kind}, which cannot be compared with {want} ({bound.text})"
    )


def _instants_not_before(times: pa.Array, microseconds: int) -> np.ndarray:
    """Compared in the unit of the column, so that nothing is rounded."""
    if pa.types.is_date32(times.type):
        unit, counts = "day", times.cast(pa.int32())
    else:
        unit, counts = ("ms" if pa.types.is_date64(times.type) else times.type.unit), times.cast(pa.int64())
    if unit == "ns":
        return counts.to_numpy() >= microseconds * 1_000
    return counts.to_numpy() >= -(-microseconds // _MICROSECONDS[unit])


def _parsed(texts: pa.Array, bound: Moment, file: Path, first_row: int, column: str) -> pa.Array:
    """Text as float64, or as timestamps, whichever can be compared with the bound."""
    kinds = [pa.float64()] if bound.is_number else [pa.timestamp("us"), pa.timestamp("us", "UTC")]
    for kind in kinds:
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    parse = _number if bound.is_number else _microseconds
    values = []
    for row, text in enumerate(texts.to_pylist(), first_row):
        value = parse(text)
        if value is None:
            want = "a number" if bound.is_number else "an ISO-8601 date or time"
            raise DataError(
                f"{file} row {row}: {column!r} is {text!r}, not {want} to compare with {bound.text}"
            )
        values.append(value)
    if bound.is_number:
        return pa.array(values, pa.float64())
    return pa.array(values, pa.int64()).cast(pa.timestamp("us"))


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _microseconds(text: str) -> int | None:
    """Microseconds since 1970 of an ISO-8601 date or time."""
    text = text.strip()
    try:
        # Python 3.10 does not know the Z.
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in "Zz" else text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return (moment - _EPOCH) // timedelta(microseconds=1)
