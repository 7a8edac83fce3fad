"""A made-up data set of the emoji's shape: coloured shapes, texts and boards composed of their attributes.

For machines without apt or network, and for tests. Whatever is learned from it says nothing of real pins, so
the store is marked synthetic, and everything that prints results says so.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from pinclip.data.store import Pin, PinStore, links_from_boards, write_store
from pinclip.errors import DataError

NAME = "synthetic emoji-shaped"
IMAGE_SIZE = 96
EMOJI_PINS = 1870
BOARD_PINS = (3, 150)
# How often a pin that fits a board is on it: people's boards are never complete.
SAVED = 0.75

COLORS = {
    "red": "#d62728",
    "orange": "#ff8c1a",
    "yellow": "#f2d024",
    "green": "#2ca02c",
    "teal": "#159a9c",
    "blue": "#1f5fd0",
    "purple": "#8a3ffc",
    "pink": "#f47fb6",
    "brown": "#8c564b",
    "grey": "#8a8a8a",
    "black": "#1a1a1a",
    "lime": "#9ad62f",
}
BACKGROUNDS = {
    "white": "#ffffff",
    "cream": "#fdf1cf",
    "sky": "#cfe8fd",
    "mint": "#d3f5df",
    "rose": "#fddde6",
    "silver": "#dcdce4",
}
# Corners on a circle: (number, inner radius as a share of the outer, turn in degrees); 0 is the circle.
SHAPES = {
    "circle": (0, 1.0, 0),
    "triangle": (3, 0.5, 0),
    "square": (4, math.sqrt(0.5), 45),
    "diamond": (4, math.sqrt(0.5), 0),
    "pentagon": (5, math.cos(math.pi / 5), 0),
    "hexagon": (6, math.cos(math.pi / 6), 0),
    "octagon": (8, math.cos(math.pi / 8), 22.5),
    "trefoil": (3, 0.25, 0),
    "sparkle": (4, 0.4, 0),
    "cross": (4, 0.42, 45),
    "star": (5, 0.45, 0),
    "snowflake": (6, 0.45, 0),
    "sun": (12, 0.7, 0),
    "gear": (9, 0.8, 0),
}
PATTERNS = ("plain", "dotted", "striped", "ringed", "outlined", "hollow", "barred", "crossed")
COUNTS = ("one", "two", "three")

_SIZES = (len(SHAPES), len(COLORS), len(PATTERNS), len(BACKGROUNDS), len(COUNTS))
MOST_PINS = math.prod(_SIZES)


def build(
    out: str | os.PathLike, *, pins: int = EMOJI_PINS, seed: int = 0, progress: bool = True
) -> PinStore:
    """Write a synthetic store of `pins` pins, a function of `pins` and `seed` alone.

    Raises `DataError` if there are not that many different pins, or `out` cannot be written.
    """
    if not 3 <= pins <= MOST_PINS:
        raise DataError(f"a synthetic set has 3 to {MOST_PINS} pins, not {pins}")
    random = np.random.default_rng(seed)
    codes = np.sort(random.choice(MOST_PINS, pins, replace=False))
    attributes = [_attributes(int(code)) for code in codes]
    ids = [f"s{code:05d}" for code in codes]
    boards = _boards(ids, attributes, random)
    info = {
        "name": NAME,
        "source": f"generated: {pins} pins, seed {seed}",
        "synthetic": True,
        "license": "generated; no rights",
    }
    rows = _pins(ids, attributes, random, progress)
    return write_store(
        out, rows, lambda order: links_from_boards(boards, order), info=info, progress=progress
    )


def _attributes(code: int) -> tuple[str, str, str, str, str]:
    places = np.unravel_index(code, _SIZES)
    names = (list(SHAPES), list(COLORS), PATTERNS, list(BACKGROUNDS), COUNTS)
    return tuple(values[place] for values, place in zip(names, places, strict=True))


def _boards(
    ids: list[str], attributes: list[tuple[str, ...]], random: np.random.Generator
) -> dict[str, tuple[str, list[str]]]:
    boards: dict[str, tuple[str, list[str]]] = {}
    for pin, (shape, color, pattern, background, _) in zip(ids, attributes, strict=True):
        titles = (shape, f"{color} {shape}", f"{pattern} {shape}", f"{color} on {background}")
        for title in titles:
            if random.random() < SAVED:
                boards.setdefault(title, (title, []))[1].append(pin)
    low, high = BOARD_PINS
    return {f"board:{key}": boards[key] for key in sorted(boards) if low <= len(boards[key][1]) <= high}


def _pins(
    ids: list[str], attributes: list[tuple[str, ...]], random: np.random.Generator, progress: bool
) -> Iterator[Pin]:
    rows = zip(ids, attributes, strict=True)
    for pin, values in tqdm(rows, total=len(ids), desc="draw", disable=None if progress else True):
        shape, color, pattern, background, count = values
        text = f"{count} {pattern} {color} {shape}{'s' * (count != 'one')} on {background}"
        yield Pin(pin, text, _draw(*values, random), f"synthetic {pin}")


def _draw(
    shape: str, color: str, pattern: str, background: str, count: str, random: np.random.Generator
) -> bytes:
    number = COUNTS.index(count) + 1
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[background])
    drawing = ImageDraw.Draw(image)
    radius = IMAGE_SIZE * (0.40, 0.24, 0.21)[number - 1] * random.uniform(0.85, 1.1)
    turn = random.uniform(0, 2 * math.pi)
    for index in range(number):
        angle = turn + 2 * math.pi * index / number
        distance = 0 if number == 1 else 0.25 * IMAGE_SIZE
        jitter = random.uniform(-0.03, 0.03, 2) * IMAGE_SIZE
        x = IMAGE_SIZE / 2 + distance * math.cos(angle) + jitter[0]
        y = IMAGE_SIZE / 2 + distance * math.sin(angle) + jitter[1]
        _draw_shape(drawing, x, y, radius, shape, pattern, COLORS[color], BACKGROUNDS[background])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw_shape(drawing, x, y, radius, shape, pattern, color, background) -> None:
    """One shape, then its pattern cut into it in the background's colour."""

    def disc(dx: float, dy: float, r: float, **paint) -> None:
        drawing.ellipse((x + dx - r, y + dy - r, x + dx + r, y + dy + r), **paint)

    def bar(left: float, top: float, right: float, bottom: float) -> None:
        drawing.rectangle(
            (x + left * radius, y + top * radius, x + right * radius, y + bottom * radius), fill=background
        )

    drawing.polygon(_outline(x, y, radius, *SHAPES[shape]), fill=color)
    if pattern == "dotted":
        for dx, dy in ((-0.3, -0.25), (0.3, -0.25), (0, 0.3)):
            disc(dx * radius, dy * radius, 0.14 * radius, fill=background)
    elif pattern == "striped":
        for middle in (-0.4, 0.0, 0.4):
            bar(-1, middle - 0.07, 1, middle + 0.07)
    elif pattern == "ringed":
        disc(0, 0, 0.45 * radius, outline=background, width=max(2, round(0.12 * radius)))
    elif pattern == "outlined":
        drawing.polygon(_outline(x, y, 0.75 * radius, *SHAPES[shape]), outline=background, width=2)
    elif pattern == "hollow":
        drawing.polygon(_outline(x, y, 0.6 * radius, *SHAPES[shape]), fill=background)
    elif pattern in ("barred", "crossed"):
        bar(-0.1, -1, 0.1, 1)
        if pattern == "crossed":
            bar(-1, -0.1, 1, 0.1)


def _outline(x: float, y: float, radius: float, corners: int, inner: float, turn: float) -> list[tuple]:
    steps = 2 * corners if corners else 48
    points = []
    for step in range(steps):
        length = radius * (inner if corners and step % 2 else 1.0)
        angle = 2 * math.pi * step / steps - math.pi / 2 + math.radians(turn)
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return points
