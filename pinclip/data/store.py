"""The pin store: the folder that training, evaluation and the report read.

    dataset.json    format, name, source, synthetic, counts, licence
    pins.parquet    id string | text string | offset int64 | length int64 | bad string or null
    images.bin      encoded images end to end; pin i is images.bin[offset : offset + length]
    boards.parquet  id string | title string
    graph/          the Pin-Board graph (`BoardGraph`)
    bad_pins.jsonl  {"pin", "reason"} for each pin that training must skip

A store is written aside and renamed into place, and never changed afterwards.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from pinclip.data.images import decode, without_size_warnings
from pinclip.errors import DataError
from pinclip.graph.board_graph import BoardGraph
from pinclip.io import atomic_directory

FORMAT = 1


class PinStore:
    """A read-only, memory-mapped pin store; pins are numbered 0 ... len - 1 in the order of import.

    root: Path            name: str        synthetic: bool     info: dict, the whole of dataset.json
    ids, texts: list[str], "" where a pin has no text
    has_image, has_text, bad: bool [P]; a bad pin has no image, no edge, and takes part in nothing
    graph: BoardGraph     board_ids, board_titles: list[str]

    It can be pickled (a data loader's workers open it anew). Memory: ids, texts and 24 bytes a pin.
    """

    def __init__(self, root: Path, info: dict, pins: pa.Table):
        self.root = root
        self.info = info
        self.name: str = info["name"]
        self.synthetic: bool = info["synthetic"]
        self.ids: list[str] = pins["id"].to_pylist()
        self.texts: list[str] = pins["text"].to_pylist()
        self.bad = pins["bad"].is_valid().to_numpy()
        self._offset = pins["offset"].to_numpy()
        self._length = pins["length"].to_numpy()
        self.has_image = self._length > 0
        self.has_text = np.fromiter((bool(text) for text in self.texts), bool, len(self.texts))
        self._images = _map(root / "images.bin", int(self._length.sum()))

    @classmethod
    def open(cls, path: str | os.PathLike) -> PinStore:
        """Open the store in folder `path`; `DataError` if it is none, or a damaged one."""
        root = Path(path)
        info = read_info(root)
        try:
            pins = pq.read_table(root / "pins.parquet")
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{root / 'pins.parquet'}: cannot be read ({first_line(error)})") from None
        if pins.num_rows != info["pins"]:
            raise DataError(f"{root}: dataset.json says {info['pins']} pins, the table has {pins.num_rows}")
        return cls(root, info, pins)

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self):
        return PinStore.open, (self.root,)

    def __repr__(self) -> str:
        return f"PinStore({str(self.root)!r}, {self.name!r}, {len(self)} pins)"

    def image_bytes(self, index: int) -> bytes:
        """The encoded image of pin `index`, b"" where it has none."""
        start = int(self._offset[index])
        return self._images[start : start + int(self._length[index])]

    def image(self, index: int, at_least: int | None = None) -> Image.Image:
        """The image of pin `index` as RGB, upright, on white; `at_least` as in `images.decode`."""
        try:
            return decode(self.image_bytes(index), at_least)
        except DataError as error:
            raise DataError(f"{self.root}: pin {self.ids[index]!r}: {error}") from None

    @cached_property
    def graph(self) -> BoardGraph:
        return BoardGraph.load(self.root / "graph")

    @cached_property
    def _boards(self) -> pa.Table:
        return pq.read_table(self.root / "boards.parquet")

    @property
    def board_ids(self) -> list[str]:
        return self._boards["id"].to_pylist()

    @cached_property
    def board_titles(self) -> list[str]:
        return self._boards["title"].to_pylist()


@dataclass
class Pin:
    """One pin on its way into a store. `place` says where it came from, for messages."""

    id: str
    text: str
    image: bytes | None
    place: str
    bad: str | None = None


@dataclass(frozen=True)
class Links:
    """The edges, by pin and board number (int64 [E] each), and the boards' names."""

    pins: np.ndarray
    boards: np.ndarray
    board_ids: list[str]
    board_titles: list[str]
    dropped: int = 0


def links_from_boards(boards: dict[str, tuple[str, list[str]]], ids: list[str]) -> Links:
    """Links of {board id: (title, pin ids)}, boards in the order of the dictionary."""
    number = {pin: index for index, pin in enumerate(ids)}
    members = [[number[pin] for pin in pins] for _, pins in boards.values()]
    return Links(
        pins=np.array([pin for board in members for pin in board], np.int64),
        boards=np.repeat(np.arange(len(members), dtype=np.int64), [len(board) for board in members]),
        board_ids=list(boards),
        board_titles=[title for title, _ in boards.values()],
    )


def write_store(
    out: str | os.PathLike,
    pins: Iterable[Pin],
    link: Callable[[list[str]], Links],
    *,
    info: dict,
    max_bad: float = 0.05,
    progress: bool = True,
) -> PinStore:
    """Write `pins`, and the edges that `link(ids)` gives for them, as the store `out`; return it opened.

    Every image is decoded once, on all cores; one that cannot be makes its pin bad, and so do an empty text
    and no image together. Bad pins stay in the table (so that numbers and edges keep their meaning) without
    image and edges, and are listed in bad_pins.jsonl.

    info: name, source and synthetic at least; further keys are kept in dataset.json as they are.
    max_bad: the largest fraction of bad pins that is still a data set.
    Raises `DataError` for a duplicate id, no pins, too many bad pins, an output that cannot be written, or an
    `out` that exists and is neither empty nor a store; then `out` is as it was. Memory: ids and texts.
    """
    check_output(out)
    out = Path(out)
    with atomic_directory(out) as folder, without_size_warnings():
        table = _write_pins(folder, pins, progress)
        bad = table["bad"].is_valid().to_numpy()
        _check_bad(table, bad, max_bad, info["source"])
        ids = table["id"].to_pylist()
        links = link(ids)
        keep = ~bad[links.pins]
        graph = BoardGraph.from_edges(
            links.pins[keep], links.boards[keep], num_pins=len(ids), num_boards=len(links.board_ids)
        )
        try:
            graph.save(folder / "graph")
        except DataError as error:  # name the store, not the temporary folder that is gone by now
            raise DataError(str(error).replace(str(folder), str(out))) from None
        except OSError as error:
            if error.errno is None:  # numpy tells of a short write in words alone
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
        write_parquet(folder / "pins.parquet", table)
        boards = pa.table({"id": links.board_ids, "title": links.board_titles}, schema=_BOARDS)
        write_parquet(folder / "boards.parquet", boards)
        counts = {
            "pins": len(ids),
            "boards": graph.num_boards,
            "edges": graph.num_edges,
            "images": int(np.count_nonzero(table["length"].to_numpy())),
            "texts": sum(map(bool, table["text"].to_pylist())),
            "bad": int(bad.sum()),
            "single_pin_boards": int(np.sum(np.diff(graph.board_indptr) == 1)),
            "edges_of_unknown_pins": links.dropped,
            "edges_of_bad_pins": int(np.sum(~keep)),
        }
        document = json.dumps({"format": FORMAT, **info, **counts}, indent=1, ensure_ascii=False)
        (folder / "dataset.json").write_text(document + "\n", encoding="utf-8")
    return PinStore.open(out)


def check_output(out: str | os.PathLike) -> None:
    """A store may be replaced; somebody's folder or file may not: that is a `DataError`."""
    out = Path(out)
    for path in (out, *out.absolute().parents):
        if path.exists() and not path.is_dir():
            raise DataError(f"cannot write {out}: {path} is a file, not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "dataset.json").is_file():
        raise DataError(f"{out}: the folder exists, is not empty and is no pin store; choose another output")


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write `table`; through Python's file so that a full disk raises an `OSError` with its errno."""
    with open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd")


def read_info(root: Path) -> dict:
    """dataset.json of the store `root`, checked."""
    path = root / "dataset.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{root}: not a pin store (it has no dataset.json)") from None
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else None
        raise DataError(f"{path}: format {found!r} is not the format {FORMAT} that this version reads")
    return info


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


_PINS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("bad", pa.string()),
    ]
)
_BOARDS = pa.schema([("id", pa.string()), ("title", pa.string())])


def _write_pins(folder: Path, pins: Iterable[Pin], progress: bool) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in _PINS.names}
    places: dict[str, str] = {}
    offset = 0
    bar = tqdm(_judged(pins), unit="pin", desc="pins", disable=None if progress else True, mininterval=0.5)
    with open(folder / "images.bin", "wb") as images, open(folder / "bad_pins.jsonl", "wb") as bad_pins:
        for pin in bar:
            if pin.id in places:
                raise DataError(f"duplicate pin id {pin.id!r}: {places[pin.id]} and {pin.place}")
            places[pin.id] = pin.place
            data = pin.image if pin.image is not None and pin.bad is None else b""
            images.write(data)
            for name, value in zip(_PINS.names, (pin.id, pin.text, offset, len(data), pin.bad), strict=True):
                columns[name].append(value)
            offset += len(data)
            if pin.bad is not None:
                line = json.dumps({"pin": pin.id, "reason": pin.bad, "place": pin.place}, ensure_ascii=False)
                bad_pins.write(line.encode("utf-8") + b"\n")
    return pa.table(columns, schema=_PINS)


def _judged(pins: Iterable[Pin]) -> Iterator[Pin]:
    """`pins` in their order, each with `bad` decided; images are decoded on all cores, a few ahead."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for pin in pins:
                waiting.append(pool.submit(_judge, pin))
                if len(waiting) > 8 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _judge(pin: Pin) -> Pin:
    if pin.bad is None and pin.image is not None:
        try:
            decode(pin.image)
        except DataError as error:
            pin.bad = str(error)
    if pin.bad is None and pin.image is None and not pin.text:
        pin.bad = "neither image nor text"
    return pin


def _check_bad(table: pa.Table, bad: np.ndarray, max_bad: float, source: str) -> None:
    if table.num_rows == 0:
        raise DataError(f"{source}: no pins")
    count = int(bad.sum())
    if count > max_bad * table.num_rows or count == table.num_rows:
        first = "; ".join(
            f"{row['id']!r}: {row['bad']}" for row in table.take(np.flatnonzero(bad)[:3]).to_pylist()
        )
        more = "; ..." if count > 3 else ""
        raise DataError(
            f"{source}: {count} of {table.num_rows} pins are bad, more than the bound of {max_bad:.0%} "
            f"({first}{more})"
        )


def _map(path: Path, size: int) -> mmap.mmap | bytes:
    try:
        found = path.stat().st_size
        if found != size:
            raise DataError(f"{path}: {found} bytes where the table of pins says {size}; make the store anew")
        if size == 0:
            return b""
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
