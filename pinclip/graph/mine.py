"""Neighbor pairs of a whole graph: mine start by start, write as a table.

Shape legend: P pins, B boards, E edges, S starts, K neighbors per start.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import sparse
from tqdm import tqdm

from pinclip.errors import ConfigError, DataError
from pinclip.graph.board_graph import BoardGraph, indptr_of
from pinclip.graph.folder import GraphFolder
from pinclip.graph.mining import Mining
from pinclip.graph.neighbors import walk_graph
from pinclip.graph.pairs import PAIRS_FORMAT
from pinclip.graph.splits import mixed
from pinclip.io import atomic_file
from pinclip.ops.cooccurrence_neighbors import cooccurrence_neighbors
from pinclip.ops.walk_neighbors import walk_neighbors

# Hops, or edges, between two looks at the clock and two writes: about a second of one core.
_CHUNK = 1 << 25


class NeighborMiner:
    """Mines neighbors in one graph.

    Memory beside the graph: 12 bytes a pin, 8 a board, and with "walk" 8 an edge unless boards are equally
    likely; with `board_cap` the capped graph.
    """

    def __init__(self, graph: BoardGraph, mining: Mining) -> None:
        if mining.board_cap is not None:
            graph = capped(graph, mining.board_cap, mining.seed)
        self.graph, self.mining = graph, mining
        board_weights = np.maximum(graph.board_sizes, 1) ** -float(mining.board_damping)
        pin_scale = np.maximum(graph.pin_degrees, 1) ** -float(mining.damping)
        self._pin_scale = torch.from_numpy(pin_scale.astype(np.float32)) if mining.damping else None
        if mining.method == "walk":
            self._walks, self._board_weights = walk_graph(graph, board_weights), None
        else:
            self._walks = walk_graph(graph, np.ones(graph.num_boards))
            self._board_weights = torch.from_numpy(board_weights) if mining.board_damping else None

    def mine(self, pins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors int64 [S, K] and weights float32 [S, K] of `pins` int64 [S], filled up with -1 and 0.

        They do not depend on the other pins of the call, nor on torch.get_num_threads(), which does the work.
        """
        mining, starts = self.mining, torch.from_numpy(np.ascontiguousarray(pins, np.int64))
        if mining.method == "walk":
            found = walk_neighbors(
                self._walks,
                starts,
                walks=mining.walks,
                length=mining.length,
                restart=mining.restart,
                top_k=mining.top_k,
                pin_scale=self._pin_scale,
                stop_visits=mining.stop_visits,
                seed=mining.seed,
            )
        else:
            found = cooccurrence_neighbors(
                self._walks,
                starts,
                top_k=mining.top_k,
                board_weights=self._board_weights,
                pin_scale=self._pin_scale,
            )
        return found[0].numpy(), found[1].numpy()

    def chunks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cuts pins [first, last) into parts of about equal work."""
        mining = self.mining
        if mining.method == "walk":
            size = max(1, _CHUNK // (mining.walks * mining.length))
            bounds = np.append(np.arange(first, last, size), last)
        else:
            work = np.bincount(
                self.graph.board_pins, np.repeat(self.graph.board_sizes, self.graph.board_sizes)
            )
            total = np.cumsum(work[first:last]) // _CHUNK
            bounds = np.concatenate(([first], first + 1 + np.flatnonzero(np.diff(total)), [last]))
        yield from zip(bounds[:-1].tolist(), bounds[1:].tolist())


def mine_pairs(
    folder: GraphFolder, out: Path, mining: Mining, *, shard: tuple[int, int] = (0, 1), progress: bool = True
) -> dict:
    """Mine the neighbors of every pin, or of part i of n (`shard`), and write them to `out` (Parquet).

    Columns pin, neighbor (ids of the graph's kind) and weight (float32), in the order of the pins' numbers,
    each pin's neighbors heaviest first; the parts one after the other are the whole. The schema's metadata
    has `pinclip`, a JSON record of the mining, the graph and its split, which training reads.

    Returns the record. The file appears whole or not at all. Memory: that of `NeighborMiner`, and a part of
    some seconds' work.

    Raises DataError where no pin has a neighbor, and for what cannot be written.
    """
    part, parts = shard
    if not 0 <= part < parts:
        raise ConfigError(f"shard is {part}/{parts}, want i/n with 0 <= i < n")
    graph = folder.graph
    miner = NeighborMiner(graph, mining)
    first, last = graph.num_pins * part // parts, graph.num_pins * (part + 1) // parts
    counts = {"pins": last - first, "pins_with_neighbors": 0, "pairs": 0}
    record = {
        "format": PAIRS_FORMAT,
        "mining": asdict(mining),
        "graph": {"pins": graph.num_pins, "boards": graph.num_boards, "edges": graph.num_edges},
        "split": folder.split,
        "shard": [part, parts],
    }
    kind = folder.pin_ids.type
    schema = pa.schema(
        [("pin", kind), ("neighbor", kind), ("weight", pa.float32())],
        metadata={"pinclip": json.dumps(record)},
    )
    began = time.perf_counter()
    with atomic_file(out) as temporary:
        with (
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
            tqdm(total=last - first, unit="pins", unit_scale=True, disable=not progress) as bar,
        ):
            for low, high in miner.chunks(first, last):
                neighbors, weights = miner.mine(np.arange(low, high))
                found = neighbors >= 0
                rows = np.repeat(np.arange(low, high), found.sum(axis=1))
                columns = [
                    folder.pin_ids.take(pa.array(rows)),
                    folder.pin_ids.take(pa.array(neighbors[found])),
                    pa.array(weights[found]),
                ]
                writer.write_table(pa.table(columns, schema=schema))
                counts["pairs"] += len(rows)
                counts["pins_with_neighbors"] += int(found.any(axis=1).sum())
                bar.update(high - low)
        if not counts["pairs"] and parts == 1:
            raise DataError(f"{folder.path}: no pin has a neighbor, so there is nothing to write")
    return {**record, "counts": counts, "seconds": time.perf_counter() - began}


def capped(graph: BoardGraph, cap: int, seed: int) -> BoardGraph:
    """`graph` in which a board of more than `cap` pins keeps those of smallest hash of (seed, board, pin).

    Pins and boards keep their numbers. Memory: the new graph and 25 bytes an edge of the boards cut.
    """
    big = np.flatnonzero(graph.board_sizes > cap)
    keep = np.ones(graph.num_edges, bool)
    for board in big:
        begin, end = graph.board_indptr[board], graph.board_indptr[board + 1]
        hashes = _mix(np.uint64(seed), np.uint64(board), graph.board_pins[begin:end].astype(np.uint64))
        keep[begin:end] = False
        keep[begin + np.lexsort((graph.board_pins[begin:end], hashes))[:cap]] = True
    sizes = np.minimum(graph.board_sizes, cap)
    board_indptr = indptr_of(sizes)
    board_pins = graph.board_pins[keep]
    ones = np.ones(len(board_pins), np.int8)
    shape = (graph.num_boards, graph.num_pins)
    by_pin = sparse.csr_matrix((ones, board_pins, board_indptr), shape=shape).tocsc()
    pin_boards = by_pin.indices.astype(graph.pin_boards.dtype)
    return BoardGraph(by_pin.indptr.astype(np.int64), pin_boards, board_indptr, board_pins)


def _mix(*parts: np.ndarray | np.uint64) -> np.ndarray:
    """64 mixed bits of several integers: splitmix64's finaliser after each (Steele et al., OOPSLA 2014)."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = mixed((state ^ part) + np.uint64(0x9E3779B97F4A7C15))
    return state


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run on `count` threads (None: as many as torch would), and then on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
