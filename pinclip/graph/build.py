"""Edges of any number into a graph folder, in bounded memory: `pinclip graph build`.

In this order:

1. rows whose time is before `since` are dropped;
2. rows of the same pin and board are one edge, as old as the oldest of them;
3. boards of more than `max_board` pins are dropped; then boards of fewer than `min_board` pins and pins on
   fewer than `min_pin` boards, until nothing changes (`pinclip.graph.pruning`);
4. the pins and boards that are left are numbered in the order of their ids: integers by value, text by its
   UTF-8 bytes;
5. edges are withheld: of withheld pins, by their own hash, or by time (`Holdout`). This changes no number.

So the arrays depend on the set of rows alone: not on the order of files or rows, nor on memory or threads.

How it is sorted: `pinclip.graph.ingest`. Shape legend: P pins, B boards, E edges.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pinclip.errors import DataError
from pinclip.graph import splits, statistics
from pinclip.graph.board_graph import BoardGraph, edge_chunks, edge_rows, index_dtype, indptr_of, write_info
from pinclip.graph.edge_source import EdgeArrays, EdgeTables, Moment
from pinclip.graph.external import DiskArray, DiskTexts, ordered_map
from pinclip.graph.folder import SPLIT_FORMAT, SPLIT_KINDS, STATS_FORMAT
from pinclip.graph.ingest import Ingested, Work, ingest
from pinclip.graph.pruning import Pruning, Side, prune
from pinclip.io import atomic_directory, writing

# Edges, and ids, that are written together.
_CHUNK, _ID_CHUNK = 1 << 18, 1 << 18

# (numbers of pins, of boards, late) of some edges -> which of them are withheld.
_Held = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Holdout:
    """Which edges are withheld from training.

    kind:     "none"; "pins": every edge of a pin whose hash of (seed, id) is below `fraction`, as in
              `splits.cold_split`; "edges": an edge whose hash of (seed, pin id, board id) is below it;
              "time": an edge whose time, the earliest of its rows, is not before `since`.

    Raises DataError for a fraction outside [0, 1] and a seed outside [0, 2^63).
    """

    kind: str = "none"
    fraction: float | None = None
    seed: int = 0
    since: Moment | None = None

    def __post_init__(self) -> None:
        if self.kind not in SPLIT_KINDS:
            raise ValueError(f"kind is {self.kind!r}, want one of {', '.join(SPLIT_KINDS)}")
        if self.kind in ("pins", "edges") and not (self.fraction is not None and 0 <= self.fraction <= 1):
            raise DataError(f"the withheld fraction is {self.fraction}, want a value in [0, 1]")
        if self.kind == "time" and self.since is None:
            raise ValueError("kind is 'time' but since is None")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"the split's seed is {self.seed}, want a value in [0, 2^63)")

    def record(self, counts: dict[str, int]) -> dict:
        """What split.json holds."""
        hashed = self.kind in ("pins", "edges")
        return {
            "format": SPLIT_FORMAT,
            "kind": self.kind,
            "fraction": self.fraction if hashed else None,
            "seed": self.seed if hashed else None,
            "since": self.since.text if self.kind == "time" else None,
            "counts": counts,
        }


def build_graph(
    edges: EdgeTables | EdgeArrays,
    out: str | os.PathLike,
    *,
    since: Moment | None = None,
    pruning: Pruning | None = None,
    holdout: Holdout | None = None,
    memory: int = 2_000_000_000,
    threads: int | None = None,
    progress: bool = True,
) -> dict:
    """Write the graph of `edges` as the folder `out` (see `pinclip.graph.folder`); returns its stats.json.

    since:   rows before this are dropped.
    pruning: which boards and pins are left out; None for boards of a single pin.
    holdout: which edges are withheld; None for none.
    memory:  bound on the memory of a process that does nothing else, in bytes. Needed are 44 bytes a pin and
             a board, 200 MB for the interpreter and its libraries, and 2 MB a thread.
    threads: None for as many as there are cores.

    Temporary files, in the folder of `out`: at most 40 bytes a row with integer ids, 8 bytes and the text of
    the ids with text. Raises DataError for edges that cannot be read, a graph or a training graph without an
    edge, too little memory, and an output that cannot be written; then, and when killed, `out` is as it was.
    """
    pruning, holdout = pruning or Pruning(), holdout or Holdout()
    check_output(out)
    with atomic_directory(out) as folder:
        work = Work(folder / "work", memory, threads or len(os.sched_getaffinity(0)), progress)
        work.folder.mkdir()
        found = ingest(edges, since, holdout.since if holdout.kind == "time" else None, work)
        stats = {"format": STATS_FORMAT, "input": found.counts}
        stats["pruned"] = prune(found.pins, found.boards, pruning, _CHUNK)
        held = _write_ids(found, folder, holdout)
        graph, withheld = _write_sides(found, folder, held, work)
        if graph.num_edges == 0:
            everything = withheld is not None and withheld.num_edges
            left = (
                "to train on: all are withheld"
                if everything
                else f"after pruning ({_listed(stats['pruned'])})"
            )
            raise DataError(f"no edge is left {left}")
        del found, held  # they are as long as there are pins and boards
        shutil.rmtree(work.folder)
        stats["withheld"] = _proven(graph, withheld)
        if withheld is not None and withheld.num_edges == 0:
            shutil.rmtree(folder / "withheld")
        del withheld
        stats["training"] = statistics.describe(graph)
        stats["bytes"] = _bytes_on_disk(folder, graph.num_edges)
        statistics.plot(graph, folder / "degrees.png")
        _write_json(folder / "stats.json", stats)
        _write_json(folder / "split.json", holdout.record(stats["withheld"]))
    return stats


def check_output(out: str | os.PathLike) -> None:
    """A graph may be replaced; somebody's folder or file may not: that is a DataError."""
    out = Path(out)
    with writing(out):
        for path in (out, *out.absolute().parents):
            if path.exists() and not path.is_dir():
                raise DataError(f"cannot write {out}: {path} is a file, not a folder")
        if out.is_dir() and any(out.iterdir()) and not (out / "graph.json").is_file():
            raise DataError(f"{out}: the folder exists, is not empty and is no graph; choose another output")


def _proven(graph: BoardGraph, withheld: BoardGraph | None) -> dict[str, int]:
    """Prove that no withheld edge is a training edge; returns what is withheld, counted."""
    if withheld is None:
        return {"edges": 0, "pins": 0, "boards": 0}
    splits.check_no_edge_leak(graph, withheld)
    sides = (("pins", withheld.pin_indptr), ("boards", withheld.board_indptr))
    counts = {name: int(np.count_nonzero(indptr[1:] > indptr[:-1])) for name, indptr in sides}
    return {"edges": withheld.num_edges, **counts}


def _write_ids(found: Ingested, folder: Path, holdout: Holdout) -> _Held | None:
    """Write the tables of ids that are left; returns which edges are withheld, None if none are."""
    seed = holdout.seed if holdout.kind in ("pins", "edges") else None
    sides = (("pin", found.pin_ids, found.pins), ("board", found.board_ids, found.boards))
    hashes = []
    for column, ids, side in sides:
        hashed = None if seed is None or (holdout.kind == "pins" and column == "board") else seed
        hashes.append(_write_table(folder / f"{column}s.parquet", column, ids, side.alive, hashed))
    if holdout.kind == "pins":
        cold = splits.below(hashes[0], holdout.fraction)
        return lambda pins, boards, late: cold[pins]
    if holdout.kind == "edges":
        pin_hashes, board_hashes = hashes
        return lambda pins, boards, late: splits.below(
            splits.edge_hashes(pin_hashes[pins], board_hashes[boards]), holdout.fraction
        )
    return None if holdout.kind == "none" else lambda pins, boards, late: late


def _write_table(
    path: Path, column: str, ids: DiskArray | DiskTexts, alive: np.ndarray, seed: int | None
) -> np.ndarray | None:
    """Write the ids that are alive; returns the hashes of all, 0 where dead, if a seed is given."""
    hashes = None if seed is None else np.zeros(len(ids), np.uint64)
    kind = pa.int64() if isinstance(ids, DiskArray) else pa.large_string()
    schema = pa.schema([(column, kind)])
    # Through Python's file, so that a full disk raises an OSError with its errno.
    with open(path, "wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(ids), _ID_CHUNK):
            kept = alive[start : start + _ID_CHUNK]
            values = pa.array(ids[start : start + _ID_CHUNK]).filter(pa.array(kept))
            writer.write_table(pa.table([values], schema))
            if hashes is not None:
                hashes[start : start + _ID_CHUNK][kept] = splits.id_hashes(values.to_pylist(), seed)
    ids.remove()
    return hashes


def _write_sides(
    found: Ingested, folder: Path, held: _Held | None, work: Work
) -> tuple[BoardGraph, BoardGraph | None]:
    """Write the training and the withheld edges; both graphs are returned with their lists left on disk."""
    folders = [folder]
    if held is not None:
        folders.append(folder / "withheld")
        folders[1].mkdir()
    numbers = [_renumbered(side.alive) for side in (found.pins, found.boards)]
    dtype = index_dtype(*(int(np.count_nonzero(side.alive)) for side in (found.pins, found.boards)))
    arrays: list[dict] = [{} for _ in folders]
    of_board = None if held is None else lambda boards, pins, late: held(pins, boards, late)
    for names, side, others, is_held in (
        (("board_indptr", "board_pins"), found.boards, numbers[0], of_board),
        (("pin_indptr", "pin_boards"), found.pins, numbers[1], held),
    ):
        lists = [DiskArray(where / f"{names[1]}.npy", dtype) for where in folders]
        counts = _write_lists(side, others, is_held, lists, work)
        for graph, where, values in zip(arrays, folders, lists):
            graph[names[0]] = indptr_of(counts.pop(0)[side.alive])
            graph[names[1]] = values.finish()
            file = DiskArray(where / f"{names[0]}.npy", np.int64)
            file.append(graph[names[0]])
            file.finish().close()
        side.lists.remove()
    graphs = [BoardGraph(**graph) for graph in arrays]
    for where, graph in zip(folders, graphs):
        write_info(where, graph.num_pins, graph.num_boards, graph.num_edges)
    return graphs[0], graphs[1] if held is not None else None


def _write_lists(
    side: Side, numbers: np.ndarray, is_held: _Held | None, lists: list[DiskArray], work: Work
) -> list[np.ndarray]:
    """Append the edges of `side` that stay to the training and the withheld lists, in the new numbers.

    Returns how many each of its rows has in either: int64 [R] for each of `lists`.
    """
    counts = [np.zeros(len(side.alive), np.int64) for _ in lists]

    def divide(span: tuple[int, int]) -> tuple:
        rows = edge_rows(side.indptr, *span)
        columns, late = side.columns(*span)
        new = numbers[columns]
        keep = (new >= 0) & side.alive[rows]
        masks = [keep]
        if is_held is not None:
            marked = is_held(rows, columns, late)
            masks = [keep & ~marked, keep & marked]
        first, last = int(rows[0]), int(rows[-1])
        rows -= first
        parts = [(new[mask], np.bincount(rows[mask], minlength=last - first + 1)) for mask in masks]
        return slice(first, last + 1), parts, len(rows)

    with work.bar("write", len(side.lists)) as bar:
        for where, parts, done in ordered_map(divide, edge_chunks(side.indptr, _CHUNK), work.threads):
            for (columns, sums), values, total in zip(parts, lists, counts):
                values.append(columns)
                total[where] += sums
            bar.update(done)
    return counts


def _renumbered(alive: np.ndarray) -> np.ndarray:
    """The new number of each that is alive, -1 of the others."""
    dtype = index_dtype(len(alive), 0)
    numbers = np.cumsum(alive, dtype=dtype)
    numbers -= 1
    numbers[~alive] = -1
    return numbers


def _bytes_on_disk(folder: Path, edges: int) -> dict[str, float]:
    """What the arrays of the training graph, and the tables of ids, take."""
    size = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    graph = sum(count for name, count in size.items() if name.endswith(".npy"))
    ids = size["pins.parquet"] + size["boards.parquet"]
    return {"graph": graph, "ids": ids, "graph_per_edge": round(graph / edges, 3)}


def _write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items())
