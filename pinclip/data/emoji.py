"""The quickstart data: every emoji as a pin, drawn with Google's Noto Color Emoji font.

From three Debian packages: the font, Unicode's emoji-test.txt (which emoji there are, in which subgroups) and
CLDR's English annotations (names and keywords). A pin's text is its CLDR short name; its boards are its
subgroup and its keywords. Keywords are in no text, which would give the boards away.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from pinclip.data import apt
from pinclip.data.store import Pin, PinStore, check_output, links_from_boards, write_store
from pinclip.errors import DataError

PACKAGES = ("fonts-noto-color-emoji", "unicode-data", "unicode-cldr-core")
# The font is one strike of bitmaps, 136 x 128 pixels, which FreeType offers at this size alone.
FONT_SIZE = 109
IMAGE_SIZE = 136
BOARD_PINS = (3, 150)

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_VARIATION = "\ufe0f"
_TEST_LINE = re.compile(r"^([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)$")


@dataclass(frozen=True)
class Emoji:
    """One line of emoji-test.txt: the sequence of characters, its name there, its subgroup."""

    sequence: str
    name: str
    subgroup: str

    @property
    def id(self) -> str:
        """The code points in hexadecimal, as in the file: "1f600", "263a-fe0f"."""
        return "-".join(f"{ord(character):x}" for character in self.sequence)


def build(out: str | os.PathLike, *, progress: bool = True) -> PinStore:
    """Download, draw and write the emoji store `out`.

    Raises `apt.PackagesUnavailable` where the packages cannot be had, `DataError` where `out` cannot be
    written. About 35 MB of downloads, removed afterwards.
    """
    check_output(out)
    packages = list(PACKAGES)
    if not features.check("raqm"):
        # Pillow's wheel has Raqm inside but looks for FriBiDi on the machine; `draw_in_child` shows it ours.
        packages.append("libfribidi0")
    with tempfile.TemporaryDirectory(prefix="pinclip-emoji-") as name:
        root = Path(name)
        versions = apt.fetch(packages, root)
        emoji = parse_emoji_test(_find(root, "emoji-test.txt").read_text(encoding="utf-8"))
        names, keywords = read_annotations(
            _find(root, f"{folder}/en.xml") for folder in ("annotations", "annotationsDerived")
        )
        font = _find(root, "NotoColorEmoji.ttf")
        libraries = {str(path.parent) for path in root.rglob("libfribidi.so*")}
        images = draw_in_child(font, [item.sequence for item in emoji], libraries, progress)
    drawn = [(item, image) for item, image in zip(emoji, images, strict=True) if image is not None]
    boards = make_boards([item for item, _ in drawn], keywords)
    pins = (
        Pin(item.id, names.get(_plain(item.sequence), item.name), image, f"emoji {item.id}")
        for item, image in drawn
    )
    info = {
        "name": "emoji",
        "source": "Debian packages " + ", ".join(f"{key} {value}" for key, value in versions.items()),
        "synthetic": False,
        "license": "images: Noto Color Emoji font, SIL Open Font License 1.1; "
        "names, keywords and groups: Unicode and CLDR data, Unicode License (Unicode-DFS-2016)",
        "not_drawn": len(emoji) - len(drawn),
    }
    return write_store(out, pins, lambda ids: links_from_boards(boards, ids), info=info, progress=progress)


def parse_emoji_test(text: str) -> list[Emoji]:
    """The fully-qualified emoji without skin tones, in the order of emoji-test.txt."""
    emoji, subgroup = [], ""
    for line in text.splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif match := _TEST_LINE.match(line):
            sequence = "".join(chr(int(code, 16)) for code in match[1].split())
            if not _SKIN_TONES & set(sequence):
                emoji.append(Emoji(sequence, match[2], subgroup))
    return emoji


def read_annotations(files: Iterable[Path]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """({sequence: short name}, {sequence: keywords}) of CLDR annotation files, keyed without U+FE0F."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for file in files:
        for node in ElementTree.parse(file).iter("annotation"):
            sequence, text = _plain(node.get("cp", "")), node.text or ""
            if node.get("type") == "tts":
                names[sequence] = text.strip()
            else:
                keywords[sequence] = [word for part in text.split("|") if (word := part.strip().lower())]
    return names, keywords


def make_boards(
    emoji: Sequence[Emoji], keywords: dict[str, list[str]], sizes: tuple[int, int] = BOARD_PINS
) -> dict[str, tuple[str, list[str]]]:
    """{board id: (title, pin ids)} of subgroups and keywords, those with sizes[0] to sizes[1] pins."""
    boards: dict[str, tuple[str, list[str]]] = {}
    for item in emoji:
        titles = {f"subgroup:{item.subgroup}": item.subgroup}
        titles |= {f"keyword:{word}": word for word in keywords.get(_plain(item.sequence), ())}
        for board, title in titles.items():
            boards.setdefault(board, (title, []))[1].append(item.id)
    return {board: entry for board, entry in boards.items() if sizes[0] <= len(entry[1]) <= sizes[1]}


def draw_in_child(
    font: Path, sequences: Sequence[str], libraries: Iterable[str] = (), progress: bool = False
) -> list[bytes | None]:
    """`draw` in a fresh process, which finds shared libraries in the folders `libraries`."""
    path = os.environ.get("LD_LIBRARY_PATH")
    try:
        os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *([path] if path else [])])
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            chunks = [sequences[start : start + 64] for start in range(0, len(sequences), 64)]
            results = pool.map(draw, [font] * len(chunks), chunks)
            bar = tqdm(total=len(sequences), desc="draw", unit="emoji", disable=None if progress else True)
            images = []
            for chunk in results:
                images.extend(chunk)
                bar.update(len(chunk))
            bar.close()
            return images
    finally:
        if path is None:
            del os.environ["LD_LIBRARY_PATH"]
        else:
            os.environ["LD_LIBRARY_PATH"] = path


def draw(font_path: Path, sequences: Sequence[str]) -> list[bytes | None]:
    """Each sequence as lossless WebP, 136 x 136 on white; None where the font has no one glyph for it."""
    if not features.check("raqm"):
        raise apt.PackagesUnavailable("Pillow has no Raqm here, which draws emoji of several characters")
    font = ImageFont.truetype(str(font_path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    return [None if image is None else _webp(image) for image in _glyphs(font, sequences)]


def _glyphs(font: ImageFont.FreeTypeFont, sequences: Sequence[str]) -> Iterator[Image.Image | None]:
    width = font.getlength("\U0001f600")
    for sequence in sequences:
        if font.getlength(sequence) > 1.5 * width:
            yield None  # drawn as several glyphs side by side
            continue
        image = _centred(font, sequence)
        blank = all(low == 255 for low, _ in image.getextrema())
        plain = _plain(sequence)
        # Invisible parts that the font does not know (a flag's tags) leave the first character's picture.
        partial = len(plain) > 1 and image.tobytes() == _centred(font, plain[0]).tobytes()
        yield None if blank or partial else image


def _centred(font: ImageFont.FreeTypeFont, sequence: str) -> Image.Image:
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    left, top, right, bottom = font.getbbox(sequence)
    origin = ((IMAGE_SIZE - left - right) // 2, (IMAGE_SIZE - top - bottom) // 2)
    ImageDraw.Draw(image).text(origin, sequence, font=font, embedded_color=True, fill="black")
    return image


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60)
    return buffer.getvalue()


def _plain(sequence: str) -> str:
    """CLDR writes its sequences without variation selectors."""
    return sequence.replace(_VARIATION, "")


def _find(root: Path, ending: str) -> Path:
    for path in sorted(root.rglob(ending.rsplit("/", 1)[-1])):
        if path.as_posix().endswith("/" + ending):
            return path
    raise DataError(f"the packages {', '.join(PACKAGES)} hold no file {ending}")
