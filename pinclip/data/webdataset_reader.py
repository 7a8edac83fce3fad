"""Pins from WebDataset shards as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json in a tar.

Members belong together by folder and basename up to the first dot; what follows the dot, in lower case, is
the extension, and unknown extensions are ignored. The id is the json's "id" if there is one, else the key.
A missing text is an empty text.

The shard's headers are walked to its end before any pin is read. (The `webdataset` library streams, and so
takes a damaged header in the middle, or a file cut between two members, for the end of the shard; and
it groups only members that follow each other.)
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from pinclip.data.store import Pin
from pinclip.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "img")
_KNOWN = {*IMAGE_EXTENSIONS, "txt", "json"}


def read_shards(shards: Sequence[Path], text_keys: Sequence[str] | None = None) -> Iterator[Pin]:
    """Yield the pins of `shards` in order.

    text_keys: the json's keys whose values make up the text, one a line; by default the text is KEY.txt.
    Raises `DataError` naming the shard for a damaged or truncated archive, and shard and member for a json
    that cannot be read. Text that is not UTF-8 makes a bad pin. Memory: one shard's headers and a pin.
    """
    for shard in shards:
        yield from _read_shard(shard, text_keys)


def _read_shard(shard: Path, text_keys: Sequence[str] | None) -> Iterator[Pin]:
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            samples = _group(archive, shard)
            _check_end(archive, file, shard)
            for key, members in samples.items():
                yield _pin(archive, shard, key, members, text_keys)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard}: damaged or truncated tar archive ({error})") from None
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror or error})") from None


def _group(archive: tarfile.TarFile, shard: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in archive:
        if not member.isreg():
            continue
        folder, base = posixpath.split(posixpath.normpath(member.name))
        stem, dot, extension = base.partition(".")
        extension = extension.lower()
        if not stem or not dot or extension not in _KNOWN:
            continue
        sample = samples.setdefault(posixpath.join(folder, stem), {})
        if extension in sample:
            raise DataError(
                f"{shard}: two members {sample[extension].name!r} and {member.name!r}, "
                f"at bytes {sample[extension].offset} and {member.offset}"
            )
        sample[extension] = member
    return samples


def _check_end(archive: tarfile.TarFile, file: BinaryIO, shard: Path) -> None:
    """A whole archive ends in two blocks of zeros after its last member, and nothing follows but zeros.

    tarfile takes a damaged header, or none at all, for the end, without a word.
    """
    end = archive.offset  # where it looked for one more header
    size = os.fstat(file.fileno()).st_size
    file.seek(end)
    mark = file.read(2 * tarfile.BLOCKSIZE)
    if len(mark) >= tarfile.BLOCKSIZE and any(mark[: tarfile.BLOCKSIZE]):
        raise DataError(f"{shard}: damaged tar archive: no member's header at byte {end}")
    if len(mark) < 2 * tarfile.BLOCKSIZE:
        raise DataError(f"{shard}: truncated tar archive: it ends at byte {size} without an end mark")
    if any(mark) or any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b"")):
        raise DataError(f"{shard}: damaged tar archive: more data after its end mark at byte {end}")


def _pin(
    archive: tarfile.TarFile,
    shard: Path,
    key: str,
    members: dict[str, tarfile.TarInfo],
    text_keys: Sequence[str] | None,
) -> Pin:
    def read(extension: str) -> bytes:
        return archive.extractfile(members[extension]).read()

    record = _record(read("json"), shard, members["json"].name) if "json" in members else {}
    image = next((read(extension) for extension in IMAGE_EXTENSIONS if extension in members), None)
    pin = Pin(id=_id(record, key, shard), text="", image=image, place=f"{shard} key {key!r}")
    if text_keys is not None:
        pin.text = join_text([record.get(name) for name in text_keys])
    elif "txt" in members:
        try:
            pin.text = join_text([read("txt").decode("utf-8-sig")])
        except UnicodeDecodeError as error:
            pin.bad = f"its text is not UTF-8 (byte {error.start})"
    return pin


def join_text(parts: Sequence[object]) -> str:
    """The parts that are there, stripped, one a line."""
    texts = ("" if part is None else str(part).strip() for part in parts)
    return "\n".join(text for text in texts if text)


def _record(data: bytes, shard: Path, member: str) -> dict:
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{shard}: {member!r} is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{shard}: {member!r}: a JSON object was expected, not a {type(record).__name__}")
    return record


def _id(record: dict, key: str, shard: Path) -> str:
    value = record.get("id")
    if value is None or value == "":
        return key
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{shard} key {key!r}: the id {value!r} is neither a string nor an integer")
    return str(value)
