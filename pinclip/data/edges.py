"""The table of edges, (board, pin): read whole, matched with the pins' ids by hashing.

Parquet, JSONL and CSV name their columns. A TSV may do without a header: if its first line has neither the
board's nor the pin's column name among its cells, the columns are board, pin and, if there is a third, a
time. A time column is allowed and not used. Pin ids are compared in canonical form
(`tables.canonical_ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pinclip import tables
from pinclip.data.store import Links
from pinclip.errors import DataError
from pinclip.graph.edge_source import headerless_names


@dataclass(frozen=True)
class EdgeTable:
    """All edges as strings, in the order of the files, and where each file begins."""

    pins: pa.ChunkedArray
    boards: pa.ChunkedArray
    titles: dict[str, str]
    files: Sequence[Path]
    file_starts: np.ndarray
    headerless: bool

    def link(self, ids: list[str], unknown_pins: str = "error") -> Links:
        """Number pins by their place in `ids`, boards in order of appearance.

        unknown_pins: "error" raises `DataError` with file, row and id of the first edge whose pin is not in
        `ids`; "drop" leaves such edges out and counts them. Memory: 16 bytes an edge.
        """
        found = pc.index_in(self.pins, value_set=pa.array(ids, pa.string()))
        known = pc.is_valid(found).to_numpy()
        if not known.all() and unknown_pins == "error":
            self._raise_unknown(int(np.argmin(known)), int(np.sum(~known)))
        if not known.any():
            raise DataError(f"{self.files[0]}: no edge names a pin of the table of pins")
        boards = self.boards.filter(pa.array(known)).combine_chunks().dictionary_encode()
        board_ids = boards.dictionary.to_pylist()
        return Links(
            pins=pc.drop_null(found).to_numpy().astype(np.int64),
            boards=boards.indices.to_numpy().astype(np.int64),
            board_ids=board_ids,
            board_titles=[self.titles.get(board) or board for board in board_ids],
            dropped=int(np.sum(~known)),
        )

    def _raise_unknown(self, edge: int, count: int) -> None:
        file = int(np.searchsorted(self.file_starts, edge, side="right")) - 1
        row = edge - int(self.file_starts[file]) + 1
        pin = self.pins[edge].as_py()
        hint = " or, if this row is a header, name its columns" if self.headerless and row == 1 else ""
        raise DataError(
            f"{self.files[file]} row {row}: unknown pin {pin!r} ({count} such edges; "
            f"--unknown-pins drop leaves them out{hint})"
        )


def read_edges(
    path: str | Path, board_column: str, pin_column: str, boards: str | Path | None = None
) -> EdgeTable:
    """Read the edges of a file, folder or pattern, and optionally a table of boards (id, title).

    Raises `DataError` for unreadable files, missing columns, a missing id, and no edges at all.
    """
    files = tables.find_files(path, tables.SUFFIXES)
    pins: list[pa.Array] = []
    board_ids: list[pa.Array] = []
    starts, edges, headerless = [], 0, False
    for file in files:
        starts.append(edges)
        names = headerless_names(file, board_column, pin_column)
        headerless = names is not None
        if headerless:
            columns = ("board", "pin")
        else:
            present = tables.column_names(file)
            columns = (
                tables.require(file, present, board_column, "--board-column"),
                tables.require(file, present, pin_column, "--pin-column"),
            )
        for row, batch in tables.read(file, columns, names):
            board_ids.append(tables.canonical_ids(batch[columns[0]], file, row, columns[0]))
            pins.append(tables.canonical_ids(batch[columns[1]], file, row, columns[1]))
            edges += len(pins[-1])
    if edges == 0:
        raise DataError(f"{path}: no edges")
    return EdgeTable(
        pins=pa.chunked_array(pins, pa.string()),
        boards=pa.chunked_array(board_ids, pa.string()),
        titles=_read_titles(boards) if boards is not None else {},
        files=files,
        file_starts=np.array(starts),
        headerless=headerless,
    )


def _read_titles(path: str | Path) -> dict[str, str]:
    titles: dict[str, str] = {}
    for file in tables.find_files(path, tables.SUFFIXES):
        present = tables.column_names(file)
        columns = [tables.require(file, present, name) for name in ("id", "title")]
        for row, batch in tables.read(file, columns):
            ids = tables.canonical_ids(batch["id"], file, row, "id").to_pylist()
            texts = tables.strings(batch["title"], file, row, "title").to_pylist()
            for index, (board, title) in enumerate(zip(ids, texts, strict=True)):
                if board in titles:
                    raise DataError(f"{file} row {row + index}: duplicate board id {board!r}")
                titles[board] = title or ""
    return titles
