"""The results file: one JSON document, written whole and atomically after every row.

{"runs": [{id, date, device, machine, versions, ceilings, options}], "rows": [{run, op, shape, arm, mode,
...}]}. A row stands for its (device, op, shape, arm, mode): measuring again replaces it. What does not follow
from one arm alone (share of the ceilings, ratio to the best correct rival) is worked out anew at every write.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pinclip.io import atomic_file

KEY = ("device", "op", "shape", "arm", "mode")
Row = dict[str, Any]


class Results:
    """Rows and runs of one file; what the file holds already is kept."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        document = json.loads(self.path.read_text()) if self.path.exists() else {"runs": [], "rows": []}
        self.runs: list[Row] = document["runs"]
        self.rows: dict[tuple, Row] = {key(row): row for row in document["rows"]}
        self.run: Row = {}

    def begin(self, run: Row) -> None:
        """What is put from now on belongs to `run`; runs that no row is left of are dropped."""
        used = {row["run"] for row in self.rows.values()}
        self.runs = [each for each in self.runs if each["id"] in used]
        number = 1 + max((each["id"] for each in self.runs), default=0)
        self.run = {"id": number, **run}
        self.runs.append(self.run)
        self.save()

    def put(self, rows: list[Row]) -> None:
        for row in rows:
            row = {"run": self.run["id"], **row}
            self.rows[key(row)] = row
        self.save()

    def save(self) -> None:
        runs = {run["id"]: run for run in self.runs}
        for row in self.rows.values():
            against_ceilings(row, runs[row["run"]].get("ceilings", {}))
        against_rivals(list(self.rows.values()))
        document = {"runs": self.runs, "rows": list(self.rows.values())}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def against_ceilings(row: Row, ceilings: dict[str, float]) -> None:
    """Rates of a timed row and its shares of the same run's ceilings; `ceilings` in TFLOP/s and GB/s.

    The floor is the longer of the useful operations at the rate of the matrix product of the row's dtype, and
    the least bytes at the rate of a copy.
    """
    if row.get("median_ms") is None:
        return
    seconds = row["median_ms"] / 1e3
    gemm, copy = ceilings.get(f"gemm {row['dtype']}"), ceilings.get("copy")
    row["tflops"], row["gbps"] = row["flops"] / seconds / 1e12, row["bytes"] / seconds / 1e9
    row["rate"] = row["items"] / seconds
    floors = []
    if gemm and row["flops"]:
        row["pct_gemm"] = 100 * row["tflops"] / gemm
        floors.append(row["flops"] / gemm / 1e12)
    if copy and row["bytes"]:
        row["pct_copy"] = 100 * row["gbps"] / copy
        floors.append(row["bytes"] / copy / 1e9)
    if floors:
        row["floor_ms"] = 1e3 * max(floors)
        row["pct_floor"] = 100 * max(floors) / seconds


def against_rivals(rows: list[Row]) -> None:
    """best_rival: the fastest correct rival of the same run, shape and mode; ratio: its time over ours."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["run"], *(row[name] for name in KEY if name != "arm")), []).append(row)
    for group in groups.values():
        rivals = [row for row in group if row["role"] == "rival" and row["status"] == "ok"]
        best = min(rivals, key=lambda row: row["median_ms"], default=None)
        for row in group:
            row["best_rival"] = None if best is None else best["arm"]
            timed = best is not None and row["status"] == "ok"
            row["ratio"] = best["median_ms"] / row["median_ms"] if timed else None


def _plain(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
