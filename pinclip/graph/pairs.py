"""Mined neighbor pairs, as `pinclip graph mine` writes and training reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pinclip import tables
from pinclip.errors import DataError
from pinclip.graph.board_graph import indptr_of

PAIRS_FORMAT = 1


@dataclass(frozen=True, eq=False)
class NeighborPairs:
    """Neighbors of pins with weights, as CSR over some numbering of P pins.

    indptr: int64 [P + 1]. neighbors: int64 [K]. weights: float32 [K], above zero.
    record: what `mine_pairs` wrote of its mining. dropped: pairs left out, of unknown or unusable pins.
    """

    indptr: np.ndarray
    neighbors: np.ndarray
    weights: np.ndarray
    record: dict
    dropped: int

    @property
    def num_pins(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def load(
        cls, path: str | os.PathLike, ids: Sequence[str], usable: np.ndarray | None = None
    ) -> NeighborPairs:
        """Read a file, a folder of shards, or a pattern; pins are numbered by their place in `ids`.

        usable: bool [P] or None (all); a pair with a pin that is not is left out, as one of an unknown pin.

        Raises DataError, naming file and row, for a table that `mine_pairs` did not write, for shards of
        different minings or some missing, for a weight that is not above zero, for a pin paired with itself,
        a pair that is there twice, and where no pair is left. Memory: 60 bytes a pair while reading.
        """
        files = tables.find_files(path, (".parquet",))
        record = _one_record(files)
        known = pa.array(ids, pa.string())
        pins, neighbors, weights = [], [], []
        for file in files:
            names = tables.column_names(file)
            columns = [tables.require(file, names, name) for name in ("pin", "neighbor", "weight")]
            for row, batch in tables.read(file, columns):
                for column, parts in (("pin", pins), ("neighbor", neighbors)):
                    found = pc.index_in(tables.canonical_ids(batch[column], file, row, column), known)
                    parts.append(pc.fill_null(found, -1).to_numpy().astype(np.int64))
                    if usable is not None:
                        parts[-1][(parts[-1] >= 0) & ~usable[parts[-1]]] = -1
                weights.append(_weights(batch["weight"], file, row))
                same = np.flatnonzero((pins[-1] == neighbors[-1]) & (pins[-1] >= 0))
                if len(same):
                    name = ids[pins[-1][same[0]]]
                    raise DataError(f"{file} row {row + same[0]}: pin {name!r} is paired with itself")
        return cls._of_rows(path, ids, *map(_joined, (pins, neighbors, weights)), record)

    @classmethod
    def _of_rows(cls, path, ids, pins, neighbors, weights, record) -> NeighborPairs:
        known = (pins >= 0) & (neighbors >= 0)
        dropped = int(np.sum(~known))
        if dropped == len(known):
            raise DataError(f"{path}: no pair names two pins of the data set")
        pins, neighbors, weights = pins[known], neighbors[known], weights[known]
        order = np.lexsort((neighbors, pins))
        pins, neighbors, weights = pins[order], neighbors[order], weights[order]
        twice = np.flatnonzero((np.diff(pins) == 0) & (np.diff(neighbors) == 0))
        if len(twice):
            first, second = ids[pins[twice[0]]], ids[neighbors[twice[0]]]
            raise DataError(f"{path}: the pair {first!r}, {second!r} is there twice")
        indptr = indptr_of(np.bincount(pins, minlength=len(ids)))
        return cls(indptr, neighbors, weights, record, dropped)

    def check_split(self, path: str, fraction: float, seed: int) -> None:
        """Prove that no pin that `cold_split(ids, fraction, seed)` withholds had a part in the mining.

        Raises DataError where the graph was split otherwise.
        """
        split = self.record["split"]
        if split["kind"] == "pins" and (split["fraction"], split["seed"]) == (fraction, seed):
            return
        how = {
            "none": "withheld nothing",
            "pins": f"withheld pins with fraction {split.get('fraction')} and seed {split.get('seed')}",
            "edges": "withheld edges, not pins",
            "time": "withheld the latest edges, not pins",
        }[split["kind"]]
        raise DataError(
            f"{path}: its graph {how}, the run withholds pins with data.cold_fraction = {fraction} and "
            f"data.split_seed = {seed}; build it with --withhold-pins {fraction} --split-seed {seed}"
        )


def _one_record(files: Sequence[Path]) -> dict:
    """The record that all shards share."""
    records = [_record(file) for file in files]
    shards = sorted(tuple(record.pop("shard")) for record in records)
    for file, record in zip(files, records):
        if record != records[0]:
            raise DataError(f"{file}: mined otherwise than {files[0]}")
    parts = shards[0][1]
    if shards != [(part, parts) for part in range(parts)]:
        have = ", ".join(f"{part}/{of}" for part, of in shards)
        raise DataError(f"{files[0].parent}: has the shards {have}, want each of {parts} once")
    return records[0]


def _record(file: Path) -> dict:
    tables.column_names(file)  # a damaged file is named here
    text = (pq.read_schema(file).metadata or {}).get(b"pinclip")
    try:
        record = json.loads(text)
        whole = record["format"] == PAIRS_FORMAT and {"mining", "graph", "split", "shard"} <= set(record)
    except (TypeError, ValueError, KeyError):
        whole = False
    if not whole:
        raise DataError(
            f"{file}: not a table that `pinclip graph mine` wrote, so nothing says which pins it withholds"
        )
    return record


def _weights(values: pa.Array, file: Path, first_row: int) -> np.ndarray:
    if not pa.types.is_floating(values.type):
        raise DataError(f"{file}: column 'weight' holds {values.type}, want float")
    weights = values.to_numpy(zero_copy_only=False).astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if len(wrong):
        raise DataError(f"{file} row {first_row + wrong[0]}: weight {weights[wrong[0]]} is not above zero")
    return weights


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
