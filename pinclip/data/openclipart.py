"""The larger real example: the Open Clip Art Library's public-domain drawings, boards made by people.

From the Debian packages openclipart-png (pictures) and openclipart-svg (whose files carry RDF metadata:
title, description, tags, author, licence). Only files whose every embedded licence is the public domain. A
pin's text is its title and description; its boards are the directories it is filed in, its author's drawings
in one top directory, the theme it was uploaded in, and its tags. Tags are in no text.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageOps
from tqdm import tqdm

from pinclip.data import apt
from pinclip.data.images import decode, without_size_warnings
from pinclip.data.store import Pin, PinStore, check_output, links_from_boards, write_store
from pinclip.errors import DataError

PACKAGES = ("openclipart-png", "openclipart-svg")
IMAGE_SIZE = 128
BOARD_PINS = (3, 150)
# A title on more pictures than this names a theme ("Lemon SVG theme") and says nothing of one picture.
SHARED_TITLE = 3
# Series such as 1,400 regular stars and a deck of cards in four styles would be most of the set.
PINS_PER_TEXT = 3
PINS_PER_THEME = 120

_CC = "{http://web.resource.org/cc/}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_PUBLIC_DOMAIN = re.compile(r"public\s*domain", re.IGNORECASE)
# Uploads of a theme at different seconds carry the time in their titles.
_TIME = re.compile(r"\s*\([^)]*\d\d:\d\d[^)]*\)\s*$")
_BYLINE = re.compile(r"^clipart by [^-]+ - ", re.IGNORECASE)
# What a Perl script once wrote in place of a list of tags, and other tags that are no subject.
_NO_TAGS = {"", "hash", "cv-clip"}


@dataclass
class Drawing:
    """One picture: where it is filed (several directories, if it has copies) and what its metadata says."""

    path: str
    title: str
    description: str
    author: str
    tags: list[str]
    directories: list[str] = field(default_factory=list)
    text: str = ""
    theme: str | None = None

    @property
    def id(self) -> str:
        return self.path.replace("/", "__")


def build(out: str | os.PathLike, *, progress: bool = True) -> PinStore:
    """Download, select, shrink and write the openclipart store `out`.

    Blank pictures and posters in print resolution (`images.MOST_PIXELS`) are left out and counted. Raises
    `apt.PackagesUnavailable` where the packages cannot be had, `DataError` where `out` cannot be written.
    About 155 MB of downloads, 330 MB unpacked in the folder for temporary files, removed afterwards.
    """
    check_output(out)
    with tempfile.TemporaryDirectory(prefix="pinclip-openclipart-") as name:
        root = Path(name)
        versions = apt.fetch(PACKAGES, root)
        source = "Debian packages " + ", ".join(f"{key} {value}" for key, value in versions.items())
        return build_from(root / "usr/share/openclipart", out, source, progress=progress)


def build_from(root: Path, out: str | os.PathLike, source: str, *, progress: bool = True) -> PinStore:
    """Write the store `out` from the unpacked folders `root`/svg and `root`/png."""
    drawings = read_drawings(root, progress)
    if not drawings:
        raise DataError(f"{root}: no svg with public-domain metadata and a png beside it")
    name_drawings(drawings)
    drawings = thin(drawings)
    images = _shrink_all(root, drawings, progress)
    boards = make_boards([drawing for drawing in drawings if drawing.id in images])
    on_board = {pin for _, pins in boards.values() for pin in pins}
    pins = (
        Pin(drawing.id, drawing.text, images[drawing.id], f"{drawing.path}.png")
        for drawing in drawings
        if drawing.id in on_board
    )
    info = {
        "name": "openclipart",
        "source": source,
        "synthetic": False,
        "license": "public domain (each file's own metadata dedicates it)",
        "unusable_pictures": len(drawings) - len(images),
    }
    return write_store(out, pins, lambda ids: links_from_boards(boards, ids), info=info, progress=progress)


def read_drawings(root: Path, progress: bool = False) -> list[Drawing]:
    """The public-domain drawings that have a picture, by path; equal pictures are one drawing."""
    drawings: dict[bytes, Drawing] = {}
    files = sorted((root / "svg").rglob("*.svg"))
    for file in tqdm(files, desc="metadata", unit="svg", disable=None if progress else True):
        path = file.relative_to(root / "svg").with_suffix("").as_posix()
        picture = root / "png" / f"{path}.png"
        if not picture.is_file():
            continue
        drawing = read_metadata(file.read_bytes(), path)
        if drawing is None:
            continue
        key = hashlib.sha256(picture.read_bytes()).digest()
        first = drawings.setdefault(key, drawing)
        first.directories.append(path.rpartition("/")[0])
        first.tags = list(dict.fromkeys(first.tags + drawing.tags))
    return list(drawings.values())


def read_metadata(svg: bytes, path: str) -> Drawing | None:
    """The drawing that an SVG's RDF describes; None unless it is dedicated to the public domain."""
    try:
        tree = ElementTree.fromstring(svg)
    except ElementTree.ParseError:
        return None
    licenses = [node.get(f"{_RDF}resource", "") for node in tree.iter(f"{_CC}license")]
    work = tree.find(f".//{_CC}Work")
    if work is None or not licenses or not all(map(_PUBLIC_DOMAIN.search, licenses)):
        return None
    title = _BYLINE.sub("", _TIME.sub("", _text(work, f"{_DC}title"))).replace("_", " ").strip()
    description = _text(work, f"{_DC}description")
    if "inkscape.org" in description or description == title:
        description = ""
    tags = (" ".join((node.text or "").lower().split()) for node in work.findall(f"{_DC}subject//{_RDF}li"))
    return Drawing(
        path=path,
        title=title,
        description=description,
        author=_text(work, f"{_DC}creator/{_CC}Agent/{_DC}title"),
        tags=[tag for tag in dict.fromkeys(tags) if tag not in _NO_TAGS],
    )


def name_drawings(drawings: Sequence[Drawing]) -> None:
    """Set each drawing's text, and its theme where its title is that of many."""
    titles = Counter(drawing.title for drawing in drawings)
    descriptions = Counter(drawing.description for drawing in drawings)
    for drawing in drawings:
        if drawing.title and titles[drawing.title] > SHARED_TITLE:
            drawing.theme = drawing.title
        own = drawing.title if drawing.theme is None else ""
        description = drawing.description if descriptions[drawing.description] <= SHARED_TITLE else ""
        parts = [own or file_words(drawing.path, drawing.author), description]
        drawing.text = ". ".join(part.rstrip(". ") for part in parts if part)


def file_words(path: str, author: str) -> str:
    """The words of a file's name without numbers and without the author's (possibly cut) name at its end."""
    words = [word for word in re.split(r"[^a-z]+", path.rpartition("/")[2].lower()) if word]
    name = "".join(re.split(r"[^a-z]+", author.lower()))
    for start in range(1, len(words)):
        if name.startswith("".join(words[start:])):
            words = words[:start]
            break
    return " ".join(words)


def thin(drawings: Sequence[Drawing]) -> list[Drawing]:
    """At most PINS_PER_TEXT drawings of one text and PINS_PER_THEME of one theme, the first by path."""
    texts: Counter = Counter()
    themes: Counter = Counter()
    kept = []
    for drawing in drawings:
        text = drawing.text.lower()
        if texts[text] == PINS_PER_TEXT or (drawing.theme and themes[drawing.theme] == PINS_PER_THEME):
            continue
        texts[text] += 1
        themes[drawing.theme] += 1
        kept.append(drawing)
    return kept


def make_boards(
    drawings: Sequence[Drawing], sizes: tuple[int, int] = BOARD_PINS
) -> dict[str, tuple[str, list[str]]]:
    """{board id: (title, pin ids)}, boards with sizes[0] to sizes[1] pins, sorted by id."""
    boards: dict[str, tuple[str, list[str]]] = {}
    for drawing in drawings:
        titles = {f"dir:{path}": path.replace("/", " ") for path in drawing.directories}
        titles |= {f"kw:{tag}": tag for tag in drawing.tags}
        if drawing.author:
            top = drawing.path.partition("/")[0]
            titles[f"by:{drawing.author}|{top}"] = f"{drawing.author} {top}"
        if drawing.theme:
            titles[f"set:{drawing.theme.lower()}"] = drawing.theme
        for board, title in titles.items():
            boards.setdefault(board, (title, []))[1].append(drawing.id)
    return {board: boards[board] for board in sorted(boards) if sizes[0] <= len(boards[board][1]) <= sizes[1]}


def _shrink_all(root: Path, drawings: Sequence[Drawing], progress: bool) -> dict[str, bytes]:
    """{pin id: image} of the drawings that have a picture to show."""
    images = {}
    for drawing in tqdm(drawings, desc="shrink", unit="png", disable=None if progress else True):
        with suppress(DataError), without_size_warnings():
            images[drawing.id] = _shrink(root / "png" / f"{drawing.path}.png")
    return images


def _shrink(file: Path) -> bytes:
    """The drawing without its white margin, fitted into a white square, as JPEG."""
    image = decode(file.read_bytes())
    box = ImageOps.invert(image).getbbox()
    if box is None:
        raise DataError("a blank picture")
    square = ImageOps.pad(image.crop(box), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, "white")
    buffer = io.BytesIO()
    square.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _text(work: ElementTree.Element, path: str) -> str:
    node = work.find(path)
    return " ".join((node.text or "").split()) if node is not None else ""
