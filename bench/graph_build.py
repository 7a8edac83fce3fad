"""Building a graph folder from Parquet: seconds by step, memory, bytes an edge; and what others need.

    python bench/graph_build.py --data DIR [--edges 200000000] [--rival-edges 20000000] [--memory 2e9]

The table has integer ids, a tenth as many pins and a 25th as many boards as rows, both drawn with density
x^-1/2 over their range. It is written once, into DIR, and takes 13 bytes a row. Every arm runs in a process
of its own. The rivals number the ids, drop duplicates and sort both ways, each with its own means; they
neither check what they read nor prune, nor write statistics.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

PART = 10_000_000


def edge_table(folder: Path, rows: int, seed: int = 0) -> list[Path]:
    """The parts of the table, written unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("board", pa.int64()), ("pin", pa.int64())])
    parts = [folder / f"{rows}-{part:03}.parquet" for part in range(-(-rows // PART))]
    for number, part in enumerate(parts):
        if part.exists():
            continue
        rng = np.random.default_rng([seed, rows, number])
        with pq.ParquetWriter(part.with_suffix(".half"), schema) as writer:
            for first in range(number * PART, min((number + 1) * PART, rows), 1_000_000):
                count = min(1_000_000, rows - first)
                # Ids are not their own numbers: pins are 5, 982, 1959, ..., boards 3, 1012, ...
                pins = (rows // 10 * rng.random(count) ** 2).astype(np.int64) * 977 + 5
                boards = (rows // 25 * rng.random(count) ** 2).astype(np.int64) * 1009 + 3
                writer.write_table(pa.table([boards, pins], schema))
        part.with_suffix(".half").rename(part)
    return parts


def pinclip(parts: list[Path], out: Path, memory: int) -> dict:
    from pinclip.graph import ingest
    from pinclip.graph.build import build_graph
    from pinclip.graph.edge_source import EdgeTables

    steps: dict[str, float] = {}

    class Timed(tqdm):
        """The build's own bars, which begin and end with its steps."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.step, self.begin = options["desc"], time.perf_counter()

        def __exit__(self, *error):
            super().__exit__(*error)
            steps[self.step] = steps.get(self.step, 0) + time.perf_counter() - self.begin

    ingest.tqdm = Timed
    stats = build_graph(EdgeTables(parts), out, memory=memory, progress=False)
    return {"edges": stats["training"]["edges"], "bytes": stats["bytes"]["graph_per_edge"], "steps": steps}


def scipy(parts: list[Path], out: Path, memory: int) -> dict:
    from scipy import sparse

    table = pq.read_table(parts)
    boards, pins = (np.unique(table[name].to_numpy(), return_inverse=True) for name in ("board", "pin"))
    ones = np.ones(len(pins[1]), np.int8)
    by_pin = sparse.coo_matrix((ones, (pins[1], boards[1])), (len(pins[0]), len(boards[0]))).tocsr()
    by_board = by_pin.T.tocsr()
    for name, graph in (("pin", by_pin), ("board", by_board)):
        np.save(out.with_suffix(f".{name}_indptr.npy"), graph.indptr)
        np.save(out.with_suffix(f".{name}_lists.npy"), graph.indices)
    return {"edges": by_pin.nnz}


def duckdb(parts: list[Path], out: Path, memory: int) -> dict:
    import duckdb

    out.mkdir()
    base = duckdb.connect(str(out / "base"))
    base.execute(f"SET memory_limit = '{memory // 2**20}MiB'; SET temp_directory = '{out}/temporary'")
    base.execute("SET preserve_insertion_order = false")
    names = ", ".join(f"'{part}'" for part in parts)
    base.execute(f"CREATE TABLE edges AS SELECT DISTINCT pin, board FROM read_parquet([{names}])")
    for kind in ("pin", "board"):
        base.execute(
            f"CREATE TABLE {kind}s AS SELECT {kind}, row_number() OVER (ORDER BY {kind}) - 1 AS number "
            f"FROM (SELECT DISTINCT {kind} FROM edges)"
        )
    base.execute(
        "CREATE TABLE numbered AS SELECT pins.number AS pin, boards.number AS board "
        "FROM edges JOIN pins USING (pin) JOIN boards USING (board)"
    )
    for first, second in (("pin", "board"), ("board", "pin")):
        query = f"SELECT {first}, {second} FROM numbered ORDER BY {first}, {second}"
        base.execute(f"COPY ({query}) TO '{out}/{first}.parquet'")
    return {"edges": base.execute("SELECT count(*) FROM numbered").fetchone()[0]}


def polars(parts: list[Path], out: Path, memory: int) -> dict:
    import polars

    edges = polars.scan_parquet(parts).unique().collect()
    for kind in ("pin", "board"):
        edges = edges.with_columns((polars.col(kind).rank("dense") - 1).cast(polars.Int32))
    for first, second in (("pin", "board"), ("board", "pin")):
        edges.sort(first, second).write_parquet(out.with_suffix(f".{first}.parquet"))
    return {"edges": len(edges)}


ARMS: dict[str, Callable[[list[Path], Path, int], dict]] = {
    "pinclip": pinclip,
    "duckdb": duckdb,
    "scipy": scipy,
    "polars": polars,
}


def run_arm(name: str, parts: list[Path], memory: int) -> None:
    """Run one arm in this process and print what it took as JSON."""
    with tempfile.TemporaryDirectory(dir=parts[0].parent) as scratch:
        begin, processor = time.perf_counter(), time.process_time()
        found = ARMS[name](parts, Path(scratch) / "out", memory)
        found |= {"seconds": time.perf_counter() - begin, "processor": time.process_time() - processor}
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))


def check(folder: Path) -> None:
    """No time is reported unless the build equals the graph sorted in memory."""
    from pinclip.graph.board_graph import BoardGraph
    from pinclip.graph.build import build_graph
    from pinclip.graph.edge_source import EdgeTables
    from pinclip.graph.pruning import Pruning

    parts = edge_table(folder, 300_000)
    table = pq.read_table(parts)
    (_, boards), (_, pins) = (np.unique(table[name], return_inverse=True) for name in ("board", "pin"))
    want = BoardGraph.from_edges(pins, boards, int(pins.max()) + 1, int(boards.max()) + 1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        build_graph(EdgeTables(parts), f"{scratch}/g", pruning=Pruning(min_board=1), progress=False)
        got = BoardGraph.load(f"{scratch}/g")
        names = ("pin_indptr", "pin_boards", "board_indptr", "board_pins")
        if not all(np.array_equal(getattr(got, name), getattr(want, name)) for name in names):
            raise SystemExit("the external build differs from the one in memory")


def measure(name: str, folder: Path, rows: int, memory: int) -> dict | str:
    edge_table(folder, rows)
    command = [sys.executable, __file__, "--arm", name, "--data", folder, "--edges", rows, "--memory", memory]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
    return "not installed" if "ModuleNotFoundError" in last[0] else last[0][:90]


def row(name: str, rows: int, found: dict | str) -> str:
    if isinstance(found, str):
        return f"{name:12}{rows / 1e6:8.0f}  {found}"
    rate = found["edges"] / found["seconds"] / 1e6
    line = f"{name:12}{rows / 1e6:8.0f}{found['seconds']:9.1f}{found['processor']:11.1f}{rate:11.2f}"
    return line + f"{found['peak'] / 1e9:10.2f}" + (f"{found['bytes']:11.2f}" if "bytes" in found else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="where the table is written, once")
    parser.add_argument("--edges", type=int, default=200_000_000)
    parser.add_argument("--rival-edges", type=int, default=20_000_000)
    parser.add_argument("--memory", type=int, default=2_000_000_000)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.arm, edge_table(options.data, options.edges), options.memory)
        return
    check(options.data)
    versions = []
    for module in ("numpy", "pyarrow", "duckdb", "scipy", "polars"):
        try:
            versions.append(f"{module} {__import__(module).__version__}")
        except ImportError:
            versions.append(f"{module} not installed")
    print(f"{platform.processor() or platform.machine()}, {', '.join(versions)}")
    print(f"bound on memory: {options.memory / 1e9:.1f} GB; the rivals know none but duckdb's own")
    heads = ("M rows", "seconds", "processor", "M edges/s", "peak GB", "bytes/edge")
    print(f"{'':12}{heads[0]:>8}{heads[1]:>9}{heads[2]:>11}{heads[3]:>11}{heads[4]:>10}{heads[5]:>11}")
    for name in ARMS:
        print(
            row(name, options.rival_edges, measure(name, options.data, options.rival_edges, options.memory))
        )
    found = measure("pinclip", options.data, options.edges, options.memory)
    print(row("pinclip", options.edges, found))
    if isinstance(found, dict):
        steps = found["steps"]
        steps["the rest: prune, ids, proof, statistics"] = found["seconds"] - sum(steps.values())
        print("seconds by step: " + ", ".join(f"{step} {seconds:.0f}" for step, seconds in steps.items()))


if __name__ == "__main__":
    main()
