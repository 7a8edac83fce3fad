"""`pinclip graph mine | neighbors`."""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from pinclip.errors import ConfigError
from pinclip.graph.folder import GraphFolder
from pinclip.graph.mining import METHODS, Mining
from pinclip.graph.pairs import NeighborPairs
from pinclip.io import write_text

_DEFAULT = Mining()


def add_parsers(commands) -> None:
    """Add `mine` and `neighbors` to the sub-commands of `graph`."""
    command = commands.add_parser("mine", help="neighbor pairs of every pin, as a table")
    command.add_argument("folder", metavar="DIR", help="a graph folder (`pinclip graph build`)")
    command.add_argument("--out", required=True, metavar="FILE", help="the Parquet file to write")
    _add_mining(command)
    command.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="only part I of N (from 0): 0/4 ... 3/4"
    )
    command.set_defaults(run=_mine)

    command = commands.add_parser("neighbors", help="look at the neighbors of some pins")
    command.add_argument("folder", metavar="DIR", help="a graph folder (`pinclip graph build`)")
    command.add_argument("pin", nargs="*", metavar="PIN", help="ids of pins")
    command.add_argument("--random", type=_positive, metavar="N", help="N random pins with boards")
    command.add_argument("--pairs", metavar="FILE", help="mined pairs to show; else they are mined now")
    command.add_argument("--pins", metavar="STORE", help="the data set with the pins' images and texts")
    command.add_argument("--html", metavar="FILE", help="write a page, with images if --pins is given")
    _add_mining(command, top_k=10)
    command.set_defaults(run=_neighbors)


def _add_mining(command: argparse.ArgumentParser, top_k: int = _DEFAULT.top_k) -> None:
    def add(flag: str, kind: type, meaning: str, default=None, metavar="N") -> None:
        name = flag[2:].replace("-", "_")
        default = getattr(_DEFAULT, name) if default is None else default
        note = "" if default is None else f" (default: {default})"
        command.add_argument(flag, type=kind, default=default, metavar=metavar, help=meaning + note)

    command.add_argument("--method", choices=METHODS, default=_DEFAULT.method, help="(default: walk)")
    add("--walks", int, "walks from each pin")
    add("--length", int, "hops of a walk, each pin -> board -> pin")
    add("--restart", float, "probability to jump back before a hop", metavar="C")
    add("--top-k", int, "neighbors kept of each pin", top_k)
    add(
        "--damping", float, "a neighbor's count is divided by its number of boards to this power", metavar="B"
    )
    add("--board-damping", float, "a board counts in proportion to size to minus this power", metavar="A")
    add("--board-cap", int, "of a larger board only so many pins take part")
    add("--stop-visits", int, "end a pin's walks once top-k pins were visited so often; 0: never")
    add("--seed", int, "of the walks", metavar="S")
    command.add_argument("--threads", type=_positive, metavar="N", help="(default: the cores)")


def _mining(arguments: argparse.Namespace) -> Mining:
    return Mining(**{name: getattr(arguments, name) for name in vars(_DEFAULT)})


def _mine(arguments: argparse.Namespace) -> None:
    from pinclip.graph.mine import mine_pairs, threads

    mining = _mining(arguments)
    folder = GraphFolder.open(arguments.folder)
    with threads(arguments.threads):
        record = mine_pairs(folder, Path(arguments.out), mining, shard=arguments.shard)
    counts, seconds = record["counts"], record["seconds"]
    print(
        f"{arguments.out}: {counts['pairs']:,} pairs of {counts['pins_with_neighbors']:,} of "
        f"{counts['pins']:,} pins in {seconds:.1f} s"
    )


def _neighbors(arguments: argparse.Namespace) -> None:
    from pinclip.graph.mine import NeighborMiner, threads

    mining = _mining(arguments)
    folder = GraphFolder.open(arguments.folder)
    if bool(arguments.pin) == bool(arguments.random):
        raise ConfigError("name pins, or give --random N")
    if arguments.pin:
        pins = folder.pin_index(arguments.pin)
    else:
        some = np.flatnonzero(folder.graph.pin_degrees > 0)
        count = min(arguments.random, len(some))
        pins = np.sort(np.random.default_rng(mining.seed).choice(some, count, replace=False))
    if arguments.pairs:
        found = _listed(NeighborPairs.load(arguments.pairs, _texts(folder.pin_ids)), pins, mining.top_k)
    else:
        with threads(arguments.threads):
            found = NeighborMiner(folder.graph, mining).mine(pins)
    sheet = _Sheet(folder, arguments.pins)
    for pin, neighbors, weights in zip(pins, *found):
        print(sheet.text(int(pin), neighbors, weights))
    if arguments.html:
        write_text(arguments.html, sheet.html(pins, *found))
        print(f"page: {arguments.html}", file=sys.stderr)


def _listed(pairs: NeighborPairs, pins: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The heaviest listed neighbors of `pins`, as `NeighborMiner.mine` gives them."""
    neighbors = np.full((len(pins), top_k), -1)
    weights = np.zeros((len(pins), top_k), np.float32)
    for row, pin in enumerate(pins):
        mine = slice(pairs.indptr[pin], pairs.indptr[pin + 1])
        order = np.lexsort((pairs.neighbors[mine], -pairs.weights[mine]))[:top_k]
        neighbors[row, : len(order)] = pairs.neighbors[mine][order]
        weights[row, : len(order)] = pairs.weights[mine][order]
    return neighbors, weights


class _Sheet:
    """Pins and their neighbors, as text for the terminal and as a page with pictures."""

    def __init__(self, folder: GraphFolder, store: str | None) -> None:
        self._graph, self._ids = folder.graph, folder.pin_ids
        self._boards = folder.board_ids
        self._store, self._row = None, {}
        if store is not None:
            from pinclip.data.importer import open_dataset

            self._store = open_dataset(store)
            self._row = {id_: row for row, id_ in enumerate(self._store.ids)}

    def text(self, pin: int, neighbors: np.ndarray, weights: np.ndarray) -> str:
        lines = [f"{self._name(pin)}  ({self._graph.pin_degrees[pin]} boards)"]
        for neighbor, weight in zip(neighbors, weights):
            if neighbor >= 0:
                shared = len(self._shared(pin, neighbor))
                lines.append(f"  {weight:10.4g}  {shared:4} shared  {self._name(neighbor)}")
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no neighbors"])

    def html(self, pins: np.ndarray, neighbors: np.ndarray, weights: np.ndarray) -> str:
        rows = []
        for pin, others, theirs in zip(pins.tolist(), neighbors, weights):
            cells = [self._cell(pin, f"{self._graph.pin_degrees[pin]} boards", "query")]
            for other, weight in zip(others.tolist(), theirs):
                if other >= 0:
                    boards = self._boards.take(pa.array(self._shared(pin, other))).to_pylist()
                    note = f"{weight:.3g} · {', '.join(map(str, boards[:3])) or 'no shared board'}"
                    cells.append(self._cell(other, note, "pin"))
            rows.append(f'<div class="row">{"".join(cells)}</div>')
        return _PAGE.replace("ROWS", "\n".join(rows))

    def _cell(self, pin: int, note: str, kind: str) -> str:
        name, picture = html.escape(self._name(pin)), self._picture(pin)
        image = f'<img src="{picture}" alt="">' if picture else '<div class="none">no image</div>'
        return f'<div class="{kind}">{image}<b>{name}</b><i>{html.escape(note)}</i></div>'

    def _shared(self, pin: int, other: int) -> np.ndarray:
        return np.intersect1d(self._graph.boards_of(pin), self._graph.boards_of(int(other)))

    def _name(self, pin: int) -> str:
        id_ = str(self._ids[int(pin)].as_py())
        row = self._row.get(id_)
        text = self._store.texts[row].split("\n")[0] if row is not None else ""
        return f"{id_} {text}" if text else id_

    def _picture(self, pin: int) -> str | None:
        row = self._row.get(str(self._ids[int(pin)].as_py()))
        if row is None or not self._store.has_image[row]:
            return None
        from pinclip.retrieval.sheets import data_uri

        return data_uri(self._store.image(row), 96, 75)


def _texts(ids: pa.Array) -> list[str]:
    return ids.cast(pa.string()).to_pylist()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N")
    return int(part), int(parts)


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>neighbors</title>
<style>
body { font: 12px/1.35 system-ui, sans-serif; margin: 1.5em; color: #222; }
.row { display: flex; gap: 8px; padding: 10px 0; border-bottom: 1px solid #ddd; }
.row > div { width: 104px; overflow-wrap: anywhere; }
.query { background: #f3f0e6; padding: 4px; }
img, .none { width: 96px; height: 96px; object-fit: contain; display: block; background: #fff; }
.none { color: #999; text-align: center; line-height: 96px; }
b, i { display: block; } b { font-weight: 600; } i { color: #777; font-style: normal; font-size: 11px; }
</style>
ROWS
"""
