"""Parquet, JSONL, CSV and TSV tables as batches of columns, with errors that name file and row.

Rows are counted from 1 and a header is no row. CSV is RFC 4180 with a header line; TSV has no quoting. Both
are UTF-8 and every value in them is a string (an id `007` stays `007`); an empty cell is an empty string.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pinclip.errors import DataError

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
_BATCH = 16384
# One row must fit into a block of the CSV reader, which reads up to 32 blocks ahead.
_CSV_BLOCK = 16 << 20


def find_files(path: str | os.PathLike, suffixes: Sequence[str]) -> list[Path]:
    """The files that `path` means, sorted: itself, the files of a folder, or the matches of a pattern.

    Of a folder's files those of one of `suffixes` are meant, of which it may hold one kind only; but shards
    count before tables, since img2dataset lays a table of its statistics beside each shard.
    """
    path = Path(path)
    if path.is_dir():
        by_suffix = {suffix: sorted(path.glob(f"*{suffix}")) for suffix in suffixes}
        found = [suffix for suffix in suffixes if by_suffix[suffix]]
        if not found:
            raise DataError(f"{path}: no {', '.join(suffixes)} file in this folder")
        if len(found) > 1 and found[0] != ".tar":
            raise DataError(f"{path}: both {found[0]} and {found[1]} files in this folder; name one of them")
        return by_suffix[found[0]]
    if path.is_file():
        files = [path]
    else:
        files = sorted(Path(match) for match in glob.glob(str(path)))
        if not files:
            raise DataError(f"{path}: no such file")
    for file in files:
        if file.suffix.lower() not in suffixes:
            raise DataError(f"{file}: unknown kind of file; known are {', '.join(suffixes)}")
    return files


def column_names(path: Path) -> list[str]:
    """The names of the table's columns; for JSONL the keys of its first thousand rows."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _open_parquet(path).schema_arrow.names
    if suffix == ".jsonl":
        names: dict[str, None] = {}
        for (row, record), _ in zip(_json_rows(path), range(1000)):
            names.update(dict.fromkeys(_expect_object(record, path, row)))
        if not names:
            raise DataError(f"{path}: the table is empty")
        return list(names)
    line = first_text_line(path)
    return line.split("\t") if suffix == ".tsv" else next(csv.reader([line]))


def first_text_line(path: Path) -> str:
    """The first line of a CSV or TSV file."""
    with _reading(path), open(path, "rb") as file:
        line = file.readline()
    if not line.strip():
        raise DataError(f"{path}: the table is empty")
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line 1 is not UTF-8 (byte {error.start})") from None


def require(path: Path, names: Sequence[str], wanted: str, option: str = "") -> str:
    """`wanted` if it is one of the columns `names`; else a `DataError` that names the nearest."""
    if wanted in names:
        return wanted
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    hint = f" (choose with {option})" if option else ""
    raise DataError(f"{path}: no column {wanted!r}{nearest}; it has {', '.join(map(repr, names))}{hint}")


def read(
    path: Path, columns: Sequence[str], names: Sequence[str] | None = None, csv_block: int | None = None
) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """Yield (number of the first row, {column: values}) for batch after batch of the table.

    names: the columns' names of a CSV or TSV file without a header line.
    csv_block: bytes that are read of one at a time (default 16 MB); no row may be longer.
    Raises `DataError` naming the file, and the row or line where there is one, for a file that cannot be
    read to its end. Memory: a batch; of CSV and TSV 32 blocks.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        batches = _read_parquet(path, columns)
    elif suffix == ".jsonl":
        batches = _read_jsonl(path, columns)
    else:
        batches = _read_csv(path, columns, names, csv_block or _CSV_BLOCK)
    row = 1
    for batch in batches:
        yield row, dict(zip(columns, batch, strict=True))
        row += len(batch[0])


def strings(values: pa.Array, path: Path, first_row: int, column: str) -> pa.Array:
    """A text column as strings, null kept; `DataError` if the column holds something else than text."""
    try:
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_null(values.type) or pa.types.is_integer(values.type):
            values = values.cast(pa.string())
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise DataError(f"{path}: column {column!r} holds {values.type}, not text")
        # Arrow trusts a Parquet file's word that its strings are UTF-8.
        values.validate(full=True)
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        raise DataError(_not_utf8(values, path, first_row, column)) from None


def canonical_ids(values: pa.Array, path: Path, first_row: int, column: str) -> pa.Array:
    """A column of ids in the one canonical form, a string: 7 and "7" are the same id, "007" is another.

    Raises `DataError` for a column that is neither strings nor integers, and naming the row of a missing id.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type) or pa.types.is_boolean(values.type):
        raise DataError(f"{path}: column {column!r} holds {values.type}; an id is a string or an integer")
    ids = strings(values, path, first_row, column)
    missing = pc.index(pc.fill_null(pc.equal(ids, ""), True), True).as_py()
    if missing >= 0:
        raise DataError(f"{path} row {first_row + missing}: no {column!r}")
    return ids


def _not_utf8(values: pa.Array, path: Path, first_row: int, column: str) -> str:
    for index, value in enumerate(values.cast(pa.large_binary())):
        if value.is_valid:
            try:
                value.as_py().decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path} row {first_row + index}: {column!r} is not UTF-8 (byte {error.start})"
    raise AssertionError("Arrow called a valid column invalid")


def _open_parquet(path: Path) -> pq.ParquetFile:
    with _reading(path):
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        # Without these two Arrow holds a row group of the file at a time, whatever the size of a batch.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[list[pa.Array]]:
    file = _open_parquet(path)
    with _reading(path):
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns)):
            yield [_decoded(batch.column(name)) for name in columns]


def _decoded(values: pa.Array) -> pa.Array:
    """Out of a dictionary, here where an index beyond it, from a damaged file, is an error of that file."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[list[pa.Array]]:
    rows: list[dict] = []
    first = 1
    for row, record in _json_rows(path):
        rows.append(_expect_object(record, path, row))
        if len(rows) == _BATCH:
            yield [_json_column(rows, name, path, first) for name in columns]
            rows, first = [], row + 1
    if rows:
        yield [_json_column(rows, name, path, first) for name in columns]


def _json_column(rows: list[dict], name: str, path: Path, first_row: int) -> pa.Array:
    """One key of many rows; text and integers may be mixed, as in a file written by hand."""
    values = [row.get(name) for row in rows]
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str | None):
            place, kind = f"{path} row {first_row + index}", type(value).__name__
            raise DataError(f"{place}: {name!r} is a {kind}, not a string or an integer")
    return pa.array([str(value) if isinstance(value, int) else value for value in values], pa.string())


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    row = 0
    with _reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row += 1
            try:
                yield row, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number} is not UTF-8 (byte {error.start})") from None
            except ValueError as error:
                raise DataError(f"{path}: line {number} is not valid JSON ({error})") from None


def _expect_object(record: object, path: Path, row: int) -> dict:
    if not isinstance(record, dict):
        raise DataError(f"{path} row {row}: a JSON object was expected, not a {type(record).__name__}")
    return record


def _read_csv(
    path: Path, columns: Sequence[str], names: Sequence[str] | None, block: int
) -> Iterator[list[pa.Array]]:
    tabs = path.suffix.lower() == ".tsv"
    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()),
        include_columns=list(columns),
        strings_can_be_null=False,
    )
    options = pyarrow.csv.ReadOptions(
        column_names=list(names) if names else None, block_size=block, use_threads=False
    )
    try:
        with pyarrow.csv.open_csv(path, options, parse, convert) as reader:
            for batch in reader:
                if batch.num_rows:
                    yield [batch.column(name) for name in columns]
    except (pa.ArrowException, OSError) as error:
        _raise_if_not_utf8(path)
        raise DataError(f"{path}: cannot be read ({_line(error)})") from None


def _raise_if_not_utf8(path: Path) -> None:
    """Arrow says that a value is not UTF-8 but not where."""
    with _reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number} is not UTF-8 (byte {error.start})") from None


class _reading:
    """Turn a failed read of `path` into one line that names it."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # Arrow decodes the names of the columns in a damaged file as if they were text.
        if isinstance(error, OSError | pa.ArrowException | UnicodeDecodeError):
            raise DataError(f"{self.path}: cannot be read ({_line(error)})") from None


def _line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip().split("\n", 1)[0]
    return text or type(error).__name__
