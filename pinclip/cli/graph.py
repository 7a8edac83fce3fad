"""`pinclip graph build | stats`; `mine` and `neighbors` are in graph_mine.py."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from pinclip.cli.graph_mine import add_parsers as add_mining_parsers
from pinclip.data.importer import open_dataset
from pinclip.errors import DataError
from pinclip.graph.build import Holdout, build_graph
from pinclip.graph.edge_source import EdgeArrays, EdgeTables, Moment
from pinclip.graph.folder import GraphFolder
from pinclip.graph.pruning import Pruning

_BUILD_HELP = """
EDGES are tables (.parquet, .jsonl, .csv, .tsv) with the columns board and pin and perhaps a time: files,
folders and quoted patterns; or one pin store. Ids are strings or integers, the same in all tables. First
rows before --since are dropped, then boards over --max-board, then boards under --min-board and pins under
--min-pin until nothing changes; then edges are withheld.
"""
_COLUMNS = ("min", "median", "mean", "p90", "p99", "max")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_parser(subparsers) -> None:
    """Add `graph` and its sub-commands; each sets `run`, a function of the parsed arguments."""
    graph = subparsers.add_parser("graph", help="build and look at a Pin-Board graph")
    commands = graph.add_subparsers(dest="graph_command", required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="a graph from tables of edges", description=_BUILD_HELP)
    _add_build_arguments(command)
    command.set_defaults(run=_build)

    command = commands.add_parser("stats", help="what a graph looks like, and the proof of its split")
    command.add_argument("folder", metavar="DIR", help="a graph made by `pinclip graph build`")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_stats)

    add_mining_parsers(commands)


def _add_build_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("edges", nargs="+", metavar="EDGES", help="tables of edges, or a pin store")
    command.add_argument("--out", required=True, metavar="DIR", help="the graph to write")
    for column, meaning in (("board", "board"), ("pin", "pin"), ("time", "time of the save")):
        command.add_argument(
            f"--{column}-column", default=column, metavar="NAME", help=f"column of the {meaning} ({column})"
        )
    command.add_argument("--since", metavar="T", help="drop rows before T: a number, or an ISO-8601 time")
    command.add_argument("--min-board", type=int, default=2, metavar="N", help="least pins of a board (2)")
    command.add_argument("--max-board", type=int, metavar="N", help="most pins of a board (no bound)")
    command.add_argument("--min-pin", type=int, default=0, metavar="N", help="least boards of a pin (0)")
    held = command.add_mutually_exclusive_group()
    held.add_argument("--withhold-pins", type=float, metavar="F", help="withhold all edges of so many pins")
    held.add_argument("--withhold-edges", type=float, metavar="F", help="withhold so many edges")
    held.add_argument("--withhold-since", metavar="T", help="withhold the edges from T on")
    command.add_argument("--split-seed", type=int, default=0, metavar="S", help="of the withheld (0)")
    command.add_argument("--memory", default="2GB", metavar="SIZE", help="bound on memory, as 800MB (2GB)")
    command.add_argument("--threads", type=int, metavar="N", help="default: as many as cores")


def _build(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None and arguments.threads < 1:
        raise DataError(f"--threads is {arguments.threads}, want at least 1")
    stats = build_graph(
        _edges(arguments),
        arguments.out,
        since=None if arguments.since is None else Moment(arguments.since),
        pruning=Pruning(arguments.min_board, arguments.max_board, arguments.min_pin),
        holdout=_holdout(arguments),
        memory=_bytes(arguments.memory),
        threads=arguments.threads,
    )
    print(f"{arguments.out}\n{_table(stats)}")


def _edges(arguments: argparse.Namespace) -> EdgeTables | EdgeArrays:
    stores = [path for path in arguments.edges if (Path(path) / "dataset.json").is_file()]
    if not stores:
        columns = (arguments.board_column, arguments.pin_column, arguments.time_column)
        return EdgeTables(arguments.edges, *columns)
    if len(arguments.edges) > 1:
        raise DataError(f"{stores[0]}: a pin store is built into a graph alone, without other edges")
    store = open_dataset(stores[0])
    graph = store.graph
    pins = np.repeat(np.arange(graph.num_pins), graph.pin_degrees)
    return EdgeArrays(
        stores[0],
        pa.array(store.ids, pa.large_string()).take(pa.array(pins)),
        pa.array(store.board_ids, pa.large_string()).take(pa.array(graph.pin_boards)),
    )


def _holdout(arguments: argparse.Namespace) -> Holdout:
    seed = arguments.split_seed
    if arguments.withhold_pins is not None:
        return Holdout("pins", arguments.withhold_pins, seed)
    if arguments.withhold_edges is not None:
        return Holdout("edges", arguments.withhold_edges, seed)
    if arguments.withhold_since is not None:
        return Holdout("time", since=Moment(arguments.withhold_since))
    return Holdout()


def _bytes(text: str) -> int:
    """ "2GB" is two billion, "2GiB" 2^31, "2000" two thousand."""
    parts = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if parts is None or (parts[3] and not parts[2]):
        raise DataError(f"--memory is {text!r}, want a size such as 800MB or 2GB")
    return int(float(parts[1]) * (_BINARY_UNITS if parts[3] else _UNITS)[parts[2]])


def _stats(arguments: argparse.Namespace) -> None:
    graph = GraphFolder.open(arguments.folder)
    proven = graph.check_split()
    if arguments.json:
        print(json.dumps(graph.stats | {"split": graph.split, "proven": proven}, indent=1))
    else:
        print("\n".join([arguments.folder, _table(graph.stats), *(f"  proven: {fact}" for fact in proven)]))


def _table(stats: dict) -> str:
    graph, disk = stats["training"], stats["bytes"]
    lines = [
        f"  {graph['pins']:,} pins, {graph['isolated_pins']:,} of them isolated",
        f"  {graph['boards']:,} boards, {graph['empty_boards']:,} of them empty",
        f"  {graph['edges']:,} edges, {disk['graph_per_edge']:.2f} bytes each on disk, and "
        f"{disk['ids'] / 1e6:,.1f} MB of ids",
        f"  {'':17}" + "".join(f"{name:>11}" for name in _COLUMNS),
    ]
    for label, counts in (
        ("boards of a pin", graph["pin_degrees"]),
        ("pins of a board", graph["board_sizes"]),
    ):
        lines.append(
            f"  {label:17}" + "".join(f"{counts[name]:>11,.{name == 'mean':d}f}" for name in _COLUMNS)
        )
    found = graph["components"]
    lines.append(
        f"  {found['count']:,} components; the largest has {found['largest_pins']:,} pins and "
        f"{found['largest_boards']:,} boards"
    )
    dropped = {**stats["input"], **stats["pruned"]}
    rows = dropped.pop("rows")
    listed = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items() if count)
    lines.append(f"  of {rows:,} rows, left out: {listed or 'nothing'}")
    held = stats["withheld"]
    if held["edges"]:
        lines.append(
            f"  withheld: {held['edges']:,} edges of {held['pins']:,} pins and {held['boards']:,} boards"
        )
    return "\n".join(lines)
