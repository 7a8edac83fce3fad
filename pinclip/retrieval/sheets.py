"""The report's pictures: which pins stand on each contact sheet, and their thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pinclip.graph.board_graph import BoardGraph
from pinclip.retrieval.evaluate import EmbeddingTable
from pinclip.retrieval.metrics import QueryMetrics
from pinclip.retrieval.spaces import nearest

_SIZES = ((128, 80), (112, 72), (96, 64), (80, 55), (64, 45), (48, 35))
"""Edge in pixels and WebP quality, tried in turn until the pictures fit their share of the file."""


@dataclass(frozen=True)
class Tile:
    """One picture: a pin, whether it is a right answer, and the boards that it shares with the query."""

    pin: int
    hit: bool
    boards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One query and its answers, best first.

    first_rank: place of the first right answer in the whole ranking, from 1; None: the query has no vector.
    wanted: right answers that are not among `answers`, a few.
    """

    query: int
    boards: tuple[str, ...]
    answers: tuple[Tile, ...]
    relevant: int
    recall_10: float
    first_rank: int | None
    wanted: tuple[Tile, ...] = ()

    @property
    def hits(self) -> int:
        return sum(tile.hit for tile in self.answers)

    @property
    def pins(self) -> list[int]:
        return [self.query, *(tile.pin for tile in (*self.answers, *self.wanted))]


@dataclass(frozen=True)
class Corpus:
    """What a sheet is drawn from: `EmbeddingTable`, full graph, board titles, texts of all pins."""

    embeddings: EmbeddingTable
    graph: BoardGraph
    board_titles: Sequence[str]
    texts: Sequence[str]


def related_rows(corpus: Corpus, queries: QueryMetrics, chosen: np.ndarray, *, wanted: int = 0) -> list[Row]:
    """Rows of pin -> related pin by the fused vector: the ten nearest of all other pins.

    queries: the task pin_to_related/fused. chosen: int64, which of its queries.
    wanted: show up to this many related pins that are not among the ten, spread evenly over their numbers.
    """
    graph, usable = corpus.graph, ~corpus.embeddings.bad
    pins = queries.pins[chosen]
    space = corpus.embeddings.space("fused", "fused")
    found = nearest(space, pins, np.flatnonzero(usable), 10, without_self=True)

    def tile(query: int, pin: int) -> Tile:
        shared = np.intersect1d(graph.boards_of(query), graph.boards_of(pin))
        return Tile(int(pin), len(shared) > 0, tuple(corpus.board_titles[board] for board in shared))

    rows = []
    for index, query, answers in zip(chosen, pins, found):
        related = graph.co_board_pins(int(query))
        missed = np.setdiff1d(related[usable[related]], answers)
        missed = missed[np.linspace(0, len(missed) - 1, min(wanted, len(missed))).astype(int)]
        rows.append(
            Row(
                query=int(query),
                boards=tuple(corpus.board_titles[board] for board in graph.boards_of(int(query))),
                answers=tuple(tile(query, pin) for pin in answers if pin >= 0),
                relevant=int(queries.relevant[index]),
                recall_10=float(queries.recall_10[index]),
                first_rank=_first_rank(queries, index),
                wanted=tuple(tile(query, pin) for pin in missed),
            )
        )
    return rows


def text_rows(corpus: Corpus, queries: QueryMetrics, chosen: np.ndarray) -> list[Row]:
    """Rows of text -> image over the held-out pins: the eight best images; right = a pin of that text.

    queries: the task text_to_image, whose query pins are its corpus. chosen: int64, which of its queries.
    """
    pins = queries.pins[chosen]
    space = corpus.embeddings.space("text", "image")
    found = nearest(space, pins, queries.pins, 8, without_self=False)
    return [
        Row(
            query=int(query),
            boards=(),
            answers=tuple(Tile(int(p), corpus.texts[p] == corpus.texts[query]) for p in answers if p >= 0),
            relevant=int(queries.relevant[index]),
            recall_10=float(queries.recall_10[index]),
            first_rank=_first_rank(queries, index),
        )
        for index, query, answers in zip(chosen, pins, found)
    ]


def drawn(queries: QueryMetrics, count: int, seed: int) -> np.ndarray:
    """`count` queries drawn at random (all, if there are fewer), ascending: a sample, not a selection."""
    count = min(count, len(queries))
    return np.sort(np.random.default_rng(seed).choice(len(queries), count, replace=False))


def worst(queries: QueryMetrics, count: int) -> np.ndarray:
    """The queries without a hit among their ten nearest, those with the most relevant pins first."""
    order = np.lexsort((queries.pins, -queries.relevant))
    return order[queries.recall_10[order] == 0][:count]


def thumbnails(
    pins: Iterable[int], picture: Callable[[int], Image.Image | None], *, budget: int
) -> dict[int, str]:
    """Data URIs (WebP on white) of the pins that have a picture, small enough for `budget` characters.

    pins: as often as each is shown, since every showing costs its length again. picture: called once a pin;
    None where there is no picture. Sizes fall from 128 to 48 pixels until all fit; the smallest is used even
    if they do not. Memory: a 128-pixel picture of each pin.
    """
    times: dict[int, int] = {}
    for pin in pins:
        times[pin] = times.get(pin, 0) + 1
    small = {pin: _fit(image, _SIZES[0][0]) for pin in times if (image := picture(pin)) is not None}
    uris: dict[int, str] = {}
    for size, quality in _SIZES:
        uris = {pin: data_uri(image, size, quality) for pin, image in small.items()}
        if sum(len(uri) * times[pin] for pin, uri in uris.items()) <= budget:
            break
    return uris


def _first_rank(queries: QueryMetrics, index: int) -> int | None:
    return None if queries.missing[index] else round(1 / queries.mrr[index])


def _fit(image: Image.Image, size: int) -> Image.Image:
    image = image.convert("RGB")
    if max(image.size) <= size:
        return image
    return ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)


def data_uri(image: Image.Image, size: int, quality: int) -> str:
    """The image, at most `size` pixels wide and high, as a data URI (WebP)."""
    buffer = io.BytesIO()
    _fit(image, size).save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
