"""Your own data into a pin store: a table of pins, or WebDataset shards, and a table of edges."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pinclip import tables
from pinclip.data.edges import read_edges
from pinclip.data.store import Links, Pin, PinStore, write_store
from pinclip.data.webdataset_reader import join_text, read_shards
from pinclip.errors import DataError
from pinclip.io import writing

PIN_SUFFIXES = (".tar", *tables.SUFFIXES)


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; all others are ignored.

    id:    the pin's id in the table of pins.
    image: a path (relative to the table's folder), bytes, or a Hugging Face {bytes, path} struct.
           None: "image" if there is one.
    texts: the text's columns, joined by line breaks; with shards, keys of the json.
           None: "text" if there is one; with shards, the .txt member.
    board, pin: the two columns of the table of edges.
    """

    id: str = "id"
    image: str | None = None
    texts: tuple[str, ...] | None = None
    board: str = "board"
    pin: str = "pin"


def import_pins(
    pins: str | os.PathLike,
    edges: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    columns: Columns | None = None,
    boards: str | os.PathLike | None = None,
    unknown_pins: str = "error",
    max_bad: float = 0.05,
    name: str | None = None,
    synthetic: bool = False,
    progress: bool = True,
) -> PinStore:
    """Import `pins` and `edges` as the store `out`, and return it opened.

    pins:   Parquet, JSONL, CSV, TSV or WebDataset .tar: a file, a folder of such files, or a pattern.
    edges:  a table (board, pin[, time]), see `pinclip.data.edges`; None for a set without boards.
    boards: a table (id, title), optional; without it a board's id is its title.
    unknown_pins: what to do with an edge whose pin is unknown: "error", or "drop" (counted in dataset.json).
    max_bad: bound on the fraction of bad pins (missing or broken image, or no content at all).
    name:   of the data set; by default the name of the pins' file or folder.

    Everything structural raises a one-line `DataError` and leaves `out` as it was; a pin whose image cannot
    be used is a bad pin, listed in bad_pins.jsonl. Columns and edges are checked before any image is read.
    """
    if unknown_pins not in ("error", "drop"):
        raise ValueError(f'unknown_pins must be "error" or "drop", not {unknown_pins!r}')
    columns = columns or Columns()
    files = tables.find_files(pins, PIN_SUFFIXES)
    if files[0].suffix.lower() == ".tar":
        rows = read_shards(files, columns.texts)
    else:
        resolved = [_resolve(file, columns) for file in files]
        rows = (pin for file, names in zip(files, resolved, strict=True) for pin in _read_table(file, names))
    table = None if edges is None else read_edges(edges, columns.board, columns.pin, boards)

    def link(ids: list[str]) -> Links:
        if table is None:
            return Links(np.zeros(0, np.int64), np.zeros(0, np.int64), [], [])
        return table.link(ids, unknown_pins)

    info = {
        "name": name or Path(pins).resolve().stem,
        "source": str(pins),
        "synthetic": synthetic,
    }
    return write_store(out, rows, link, info=info, max_bad=max_bad, progress=progress)


def open_dataset(path: str | os.PathLike, *, progress: bool = True) -> PinStore:
    """Open a pin store; or import a raw folder into the user's cache, once, and open that.

    A raw folder holds *.tar shards or pins.{parquet,jsonl,csv,tsv}, edges.{parquet,jsonl,csv,tsv}, and
    perhaps boards.{...}, with default column names. The cache is $XDG_CACHE_HOME/pinclip (~/.cache/pinclip);
    its key is made of these files' names, sizes and times of change, so that a folder is imported anew after
    a change of them (images that a table points to are not looked at). Several processes may call it at once.
    """
    path = Path(path)
    if (path / "dataset.json").is_file():
        return PinStore.open(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    pins = sorted(path.glob("*.tar")) or _tables(path, "pins")
    edges = _tables(path, "edges")
    boards = _tables(path, "boards")
    if not pins or not edges:
        lacking = "shards (*.tar) or table pins.{parquet,jsonl,csv,tsv}" if not pins else "table edges.{...}"
        raise DataError(f"{path}: neither a pin store (no dataset.json) nor a raw data set (no {lacking})")
    cache = _cache_folder() / _key([*pins, *edges, *boards])
    source = str(path / "*.tar") if pins[0].suffix == ".tar" else pins[0]
    with _locked(cache):
        if (cache / "dataset.json").is_file():
            return PinStore.open(cache)
        return import_pins(
            source,
            edges[0],
            cache,
            boards=boards[0] if boards else None,
            name=path.resolve().name,
            progress=progress,
        )


@dataclass(frozen=True)
class _Resolved:
    id: str
    image: str | None
    texts: tuple[str, ...]


def _resolve(path: Path, columns: Columns) -> _Resolved:
    """Which columns of this table are read; `DataError` for one that is asked for and not there."""
    present = tables.column_names(path)
    identity = tables.require(path, present, columns.id, "--id-column")
    if columns.image is not None:
        image = tables.require(path, present, columns.image, "--image-column")
    else:
        image = "image" if "image" in present else None
    if columns.texts is not None:
        texts = tuple(tables.require(path, present, text, "--text-columns") for text in columns.texts)
    else:
        texts = ("text",) if "text" in present else ()
    if image is None and not texts:
        raise DataError(
            f"{path}: neither a column 'image' nor 'text'; it has {', '.join(map(repr, present))} "
            "(choose with --image-column, --text-columns)"
        )
    return _Resolved(identity, image, texts)


def _read_table(path: Path, names: _Resolved) -> Iterator[Pin]:
    wanted = dict.fromkeys([names.id, *names.texts, *([names.image] if names.image else [])])
    for first, batch in tables.read(path, list(wanted)):
        ids = tables.canonical_ids(batch[names.id], path, first, names.id).to_pylist()
        texts = [tables.strings(batch[text], path, first, text).to_pylist() for text in names.texts]
        images = [None] * len(ids)
        if names.image is not None:
            images = _image_cells(batch[names.image], path, first, names.image)
        for index, pin in enumerate(ids):
            data, bad = _image(images[index], path.parent)
            text = join_text([column[index] for column in texts])
            yield Pin(pin, text, data, f"{path} row {first + index}", bad)


def _image_cells(values: pa.Array, path: Path, first: int, column: str) -> list[bytes | str | None]:
    if pa.types.is_struct(values.type) and {"bytes", "path"} <= {field.name for field in values.type}:
        pairs = zip(values.field("bytes").to_pylist(), values.field("path").to_pylist(), strict=True)
        return [data if data is not None else file for data, file in pairs]
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return values.to_pylist()
    return tables.strings(values, path, first, column).to_pylist()


def _image(cell: bytes | str | None, folder: Path) -> tuple[bytes | None, str | None]:
    """(bytes, reason why the pin is bad); an empty path is no image, a path to nothing is a bad one."""
    if cell is None or cell == "":
        return None, None
    if isinstance(cell, bytes):
        return cell, None
    try:
        return (folder / cell).read_bytes(), None
    except OSError as error:
        return None, f"image {cell!r}: {error.strerror}"
    except ValueError as error:  # a path with a NUL byte
        return None, f"image {cell!r}: {error}"


def _tables(folder: Path, stem: str) -> list[Path]:
    """The one table of that name in the folder, as a list; empty if there is none."""
    found = [file for suffix in tables.SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: both {found[0].name} and {found[1].name}; keep one")
    return found


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pinclip"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One process imports, the others of the same run wait for it."""
    with writing(cache):
        cache.parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{cache}.lock", "w")  # noqa: SIM115 (closed below: errors of the import are not ours)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(files: list[Path]) -> str:
    """A name for these files as they are now: where they are, their sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return f"{files[0].resolve().parent.name}-{digest.hexdigest()[:16]}"
