import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image
from worlds import make_world

from pinclip.errors import DataError
from pinclip.retrieval import figures, sheets
from pinclip.retrieval.evaluate import EmbeddingTable, evaluate_queries, summarize
from pinclip.retrieval.report import (
    ReportContext,
    compact,
    duration,
    headline,
    render_report,
    write_report,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def noise(pin, size=256):
    return Image.fromarray(np.random.default_rng(pin).integers(0, 256, (size, size, 3), dtype=np.uint8))


def plain(pin):
    return Image.new("RGB", (40, 30), (pin % 256, 90, 20))


def history(steps=40):
    for step in range(10, 10 * steps + 1, 10):
        yield {
            "step": step,
            "loss": 5 / step,
            "image_text": 3 / step,
            "scale/image_text": 14 + step / 10,
            "lr": 1e-3,
            "pins_per_second": 240.0,
            "data_wait": 0.01,
        }
        if step % 100 == 0:
            yield {"step": step, "eval": {"text_to_image": 0.1, "related/fused": 0.2, "related/tfidf": 0.3}}


def context(seed=0, picture=plain, **changes) -> ReportContext:
    world = make_world(seed)
    queries = evaluate_queries(world.table, world.graph, world.cold, world.texts, dims=(4,))
    values = {
        "dataset": {"name": "toys & <b>games</b>", "synthetic": True, "source": "nowhere"},
        "summary": summarize(queries, world.table, world.graph, world.cold, bootstrap=50),
        "queries": queries,
        "embeddings": world.table,
        "graph": world.graph,
        "cold": world.cold,
        "ids": [f"id-{pin}" for pin in range(len(world.texts))],
        "texts": world.texts,
        "board_titles": [f"board {board}" for board in range(world.graph.num_boards)],
        "picture": picture,
        "bad_pins": [(f"bad-{index}", "image file is truncated") for index in range(25)],
        "history": list(history()),
        "config": {"seed": 7, "model": {"image": {"width": 192}}},
        "environment": {"parameters": 6_134_000, "steps": 400, "seconds": 125, "versions": {"torch": "2.15"}},
    }
    return ReportContext(**(values | changes))


class Structure(HTMLParser):
    """Checks that elements nest, and gathers what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.ids, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._note(attributes)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def _note(self, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)


@pytest.fixture(scope="module")
def page():
    return render_report(context())


def test_is_one_well_formed_file_without_outside_references(page):
    structure = Structure(page)
    assert structure.references
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in structure.references)
    assert not re.search(r"@import|<script|<link|https?://(?!www\.w3\.org/)", page)
    assert len(structure.ids) == len(set(structure.ids)), "the figures' ids are unique in the page"
    local = {value[1:] for value in structure.references if value.startswith("#")}
    assert local <= set(structure.ids)


def test_says_what_was_trained_and_what_came_out(page):
    for expected in (
        "synthetic data",
        "6.13 M",
        "2 min 5 s",
        "model.image.width",
        "versions.torch",
        "bad-19",
    ):
        assert expected in page
    assert "bad-20" not in page and "and 5 more" in page
    summary = context().summary
    low, high = summary["pin_to_related"]["fused"]["ci95"]
    assert f"[{low:.3f}, {high:.3f}]" in page
    for sentence in headline(summary, context().queries):
        assert sentence in page
    for caption in ("Loss, with", "Recall@10 on", "Scale", "Learning rate", "Throughput", "Pins per board"):
        assert caption in page


def test_a_real_data_set_is_not_called_synthetic():
    page = render_report(context(dataset={"name": "emoji", "synthetic": False}))
    assert "synthetic" not in page
    assert "generated" not in page


def test_text_of_the_user_stays_text():
    world = make_world(0)
    texts = [HOSTILE if text else "" for text in world.texts]
    page = render_report(
        context(
            texts=texts,
            ids=[HOSTILE] * 60,
            board_titles=[HOSTILE] * 12,
            bad_pins=[(HOSTILE, HOSTILE)],
            config={HOSTILE: HOSTILE},
            history=[{"step": step, "loss": 1.0, "<b>&$x$": 0.5} for step in range(12)],
        )
    )
    structure = Structure(page)
    assert "script" not in structure.tags and "b" in structure.tags
    assert "&lt;script&gt;" in page


def test_nothing_but_the_evaluation_is_needed():
    bare = context(history=(), config=None, environment=None, bad_pins=(), picture=lambda pin: None)
    page = render_report(bare)
    structure = Structure(page)
    assert "Training</h2>" not in page
    assert "no image" in page and "img" not in structure.tags


def test_no_held_out_pins():
    world, nobody = make_world(0), np.empty(0, np.int64)
    queries = evaluate_queries(world.table, world.graph, nobody, world.texts)
    summary = summarize(queries, world.table, world.graph, nobody)
    page = render_report(context(cold=nobody, queries=queries, summary=summary))
    Structure(page)
    assert "this evaluation says nothing" in page


def test_pictures_that_do_not_compress_still_fit(tmp_path):
    world = make_world(5, pins=400, boards=20, edges=900)
    queries = evaluate_queries(world.table, world.graph, world.cold, world.texts)
    summary = summarize(queries, world.table, world.graph, world.cold, bootstrap=20)
    big = context(
        picture=noise,
        embeddings=world.table,
        graph=world.graph,
        cold=world.cold,
        texts=world.texts,
        queries=queries,
        summary=summary,
        ids=[str(pin) for pin in range(400)],
        board_titles=[str(board) for board in range(20)],
    )
    write_report(tmp_path / "report.html", big)
    size = (tmp_path / "report.html").stat().st_size
    assert 500_000 < size < 3_000_000


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*report\.html"):
        write_report(tmp_path / "file" / "folder" / "report.html", context())


def test_headline_claims_no_more_than_the_interval():
    plain_context = context()
    queries, summary = dict(plain_context.queries), plain_context.summary
    tfidf = queries["pin_to_related/tfidf"]
    count = len(tfidf)

    def verdict(recall):
        queries["pin_to_related/fused"] = replace(tfidf, recall_10=recall)
        return headline(summary, queries)[1]

    tied = tfidf.recall_10 + np.where(np.arange(count) % 2, 0.01, -0.01)
    assert "no clear difference" in verdict(tied)
    assert "20.0 points more" in verdict(tfidf.recall_10 + 0.2)
    assert "20.0 points fewer" in verdict(tfidf.recall_10 - 0.2)


def test_contact_sheet_is_the_evaluation():
    world = context()
    corpus = sheets.Corpus(world.embeddings, world.graph, world.board_titles, world.texts)
    rng = np.random.default_rng(0)  # no ties, so that the sheet's order and the metrics' order are one
    free = [rng.standard_normal((60, 8)).astype(np.float32) for _ in range(3)]
    table = EmbeddingTable(*free, world.embeddings.has_image, world.embeddings.has_text, world.embeddings.bad)
    queries = evaluate_queries(table, world.graph, world.cold, world.texts)
    corpus = replace(corpus, embeddings=table)
    related = queries["pin_to_related/fused"]
    rows = sheets.related_rows(corpus, related, np.arange(len(related)), wanted=3)
    for row, pin, recall, count in zip(rows, related.pins, related.recall_10, related.relevant):
        assert row.query == pin and row.relevant == count
        assert row.hits / min(10, count) == pytest.approx(recall)
        first = next((place for place, tile in enumerate(row.answers, 1) if tile.hit), None)
        assert row.first_rank == first or (first is None and row.first_rank > 10)
        assert all(bool(tile.boards) == tile.hit for tile in row.answers)
        assert len(row.wanted) == min(3, count - row.hits)
        assert not {tile.pin for tile in row.wanted} & {tile.pin for tile in row.answers}
        assert pin not in row.pins[1:]
    texts = sheets.text_rows(corpus, queries["text_to_image"], np.arange(3))
    for row in texts:
        assert all(tile.hit == (world.texts[tile.pin] == world.texts[row.query]) for tile in row.answers)


def test_sample_is_random_and_the_worst_are_the_worst():
    related = context().queries["pin_to_related/fused"]
    assert list(sheets.drawn(related, 5, 0)) == list(sheets.drawn(related, 5, 0))
    assert list(sheets.drawn(related, 5, 0)) != list(sheets.drawn(related, 5, 1))
    assert list(sheets.drawn(related, 999, 0)) == list(range(len(related)))
    recall = np.where(np.arange(len(related)) % 2, 0.0, 0.5)
    worst = sheets.worst(replace(related, recall_10=recall), 3)
    assert (worst % 2 == 1).all()
    assert related.relevant[worst[0]] == related.relevant[1::2].max()
    assert len(sheets.worst(replace(related, recall_10=recall + 0.1), 3)) == 0


def test_thumbnails_keep_shape_and_budget():
    asked = []

    def picture(pin):
        asked.append(pin)
        return None if pin == 9 else noise(pin, 200).resize((200, 100))

    wide = sheets.thumbnails([1, 2, 2, 9], picture, budget=10**9)
    assert asked == [1, 2, 9] and sorted(wide) == [1, 2]
    image = Image.open(io.BytesIO(base64.b64decode(wide[1].split(",")[1])))
    assert image.size == (128, 64) and image.format == "WEBP"
    budget = 2 * len(wide[2]) + len(wide[1]) - 1
    small = sheets.thumbnails([1, 2, 2], picture, budget=budget)
    assert 2 * len(small[2]) + len(small[1]) <= budget


def test_curves_follow_the_page_and_leave_matplotlib_alone():
    with matplotlib.rc_context({"font.size": 33, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        svg = figures.curves("loss", {"total": (range(500), np.sin(np.arange(500)))}, smooth=True)
        assert dict(matplotlib.rcParams) == before
    assert "var(--series-1)" in svg and "var(--muted)" in svg
    assert "#0a0a" not in svg and "font-family" not in svg and "<text" in svg
    assert len(svg) < 20_000


def test_smoothing_and_thinning_keep_the_level():
    values = np.full(1001, 3.0)
    np.testing.assert_allclose(figures.running_mean(values), 3.0)
    ramp = np.arange(100.0)
    np.testing.assert_allclose(figures.running_mean(ramp)[10:-10], ramp[10:-10])
    x, y = figures.thin(np.arange(1001.0), np.arange(1001.0) * 2, points=100)
    assert len(x) == 100
    np.testing.assert_allclose(y, 2 * x)


@pytest.mark.parametrize("largest", [1, 2, 14, 15, 150, 10**6])
def test_histogram_bins_hold_every_count_once(largest):
    edges = figures.count_bins(largest)
    assert edges[0] == 1 and edges[-1] == largest + 1
    assert (np.diff(edges) >= 1).all() and len(edges) <= 15


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (12_600, "12.6 k"), (6_134_000, "6.13 M"), (3.2e9, "3.2 G")]
)
def test_compact(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42 s"), (425, "7 min 5 s"), (12_000, "3 h 20 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text
