"""The report of a run: one HTML file with everything in it, to read, to keep, or to send to a colleague."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from pinclip.graph.board_graph import BoardGraph
from pinclip.io import write_text
from pinclip.retrieval import figures, sheets, tables
from pinclip.retrieval.evaluate import EmbeddingTable
from pinclip.retrieval.metrics import QueryMetrics, paired_ci

_TEMPLATES = Path(__file__).parent / "templates"
_PICTURE_BUDGET = 2_300_000
_ROW_KEYS = {"step", "loss", "lr", "pins_per_second", "data_wait", "memory_gb", "eval"}
_EVAL_LABELS = {
    "text_to_image": "text → image",
    "image_to_text": "image → text",
    "related/fused": "related, fused",
    "related/image": "related, image",
    "related/text": "related, text",
}
_UP_FRONT = {"parameters", "steps", "seconds", "pins_per_second", "device", "peak_memory_bytes"}
_RATES = {
    "lr": "Learning rate",
    "pins_per_second": "Throughput, pins per second",
    "data_wait": "Share of the time spent waiting for data",
}


@dataclass(frozen=True)
class ReportContext:
    """Everything that a report is made of.

    dataset      of dataset.json: name, synthetic, and if there are any, source and license
    summary      `summarize`'s result          queries   `evaluate_queries`' result of the same evaluation
    embeddings, graph (full), cold             what was evaluated
    ids, texts, board_titles                   of all pins, of all pins, of all boards
    picture(pin) the pin's image in RGB, or None where it has none
    bad_pins     (pin id, reason), each
    history      rows of metrics.jsonl in order: {"step", "loss", further loss parts by name, "scale/NAME"...,
                 "lr", "pins_per_second", "data_wait", "memory_gb"} and {"step", "eval": {NAME: recall@10}};
                 every key but step may be missing
    config       the run's configuration, tables in tables
    environment  facts about the run. These are shown up front where they are there: parameters, steps,
                 seconds (of training), pins_per_second, device, peak_memory_bytes; all others, such as
                 versions, at the end. Tables in tables are fine.
    seed         of the random choice of the queries on the sheets
    """

    dataset: Mapping
    summary: Mapping
    queries: Mapping[str, QueryMetrics]
    embeddings: EmbeddingTable
    graph: BoardGraph
    cold: np.ndarray
    ids: Sequence[str]
    texts: Sequence[str]
    board_titles: Sequence[str]
    picture: Callable[[int], Image.Image | None]
    bad_pins: Sequence[tuple[str, str]] = ()
    history: Sequence[Mapping] = ()
    config: Mapping | None = None
    environment: Mapping | None = None
    seed: int = 0


def write_report(path: str | os.PathLike, context: ReportContext) -> None:
    """Write the report of `context` to the file `path`, atomically: HTML without any outside reference.

    At most about 3 MB: pictures shrink until they fit. `DataError` if the file cannot be written.
    """
    write_text(path, render_report(context))


def render_report(context: ReportContext) -> str:
    """The report's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": tables.number, "compact": compact}
    contact, by_text, misses = _sheets(context)
    pictures = sheets.thumbnails(
        [pin for row in (*contact, *by_text, *misses) for pin in row.pins],
        lambda pin: context.picture(pin) if context.embeddings.has_image[pin] else None,
        budget=_PICTURE_BUDGET,
    )
    return environment.get_template("report.html.j2").render(
        name=context.dataset["name"],
        synthetic=bool(context.dataset["synthetic"]),
        contents=_contents(context),
        origin=[str(context.dataset[key]) for key in ("source", "license") if context.dataset.get(key)],
        headline=headline(context.summary, context.queries),
        facts=list(_facts(context)),
        results=_results(context.summary),
        strata=_strata(context.summary),
        prefixes=_prefixes(context.summary),
        skipped=tables.skipped_line(context.summary["skipped"]),
        training=_training_figures(context.history, context.summary),
        data_figures=_data_figures(context.graph),
        contact=contact,
        by_text=by_text,
        misses=misses,
        missed=int((context.queries["pin_to_related/fused"].recall_10 == 0).sum()),
        corpus=context.queries["pin_to_related/fused"].corpus,
        pictures=pictures,
        ids=context.ids,
        texts=context.texts,
        bad_pins=list(context.bad_pins),
        config=list(_flat(context.config or {})),
        environment=[fact for fact in _flat(context.environment or {}) if fact[0] not in _UP_FRONT],
        seed=context.seed,
    )


def headline(summary: Mapping, queries: Mapping[str, QueryMetrics]) -> list[str]:
    """The result in two sentences: text to image beside chance, related pins beside TF-IDF.

    The comparison with TF-IDF is paired by query; where its 95% interval holds zero it says so.
    """
    sentences = []
    image = summary["text_to_image"]
    if image["queries"]:
        sentences.append(
            f"Asked with the text of a pin it has never seen, the model puts the right image among the first "
            f"ten of {image['corpus']:,} in {image['recall@10']:.1%} of cases "
            f"(chance {image['chance@10']:.1%})."
        )
    related = summary["pin_to_related"]
    if related["fused"]["queries"]:
        fused, tfidf = (queries[f"pin_to_related/{kind}"].recall_10 for kind in ("fused", "tfidf"))
        paired = paired_ci(fused, tfidf)
        low, high = (100 * bound for bound in paired["ci95"])
        interval = f"95% interval of the difference {low:+.1f} to {high:+.1f}"
        gap = 100 * paired["difference"]
        if low <= 0 <= high:
            verdict = f"no clear difference ({interval} points)"
        else:
            verdict = f"{abs(gap):.1f} points {'more' if gap > 0 else 'fewer'} ({interval})"
        sentences.append(
            f"Asked for the pins that share a board with it, it finds {fused.mean():.1%} of what ten answers "
            f"can hold, against {tfidf.mean():.1%} for TF-IDF on the texts: {verdict}."
        )
    return sentences or ["No held-out pin could be asked about: this evaluation says nothing."]


def compact(value: float) -> str:
    """A count in three digits: 950, 12.6 k, 6.1 M, 3.2 G."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.3g} {unit}" if scaled < 1000 else f"{scaled:.0f} {unit}"
    return f"{value:,.0f}"


def _sheets(context: ReportContext) -> tuple[list, list, list]:
    corpus = sheets.Corpus(context.embeddings, context.graph, context.board_titles, context.texts)
    related = context.queries["pin_to_related/fused"]
    by_text = context.queries["text_to_image"]
    return (
        sheets.related_rows(corpus, related, sheets.drawn(related, 12, context.seed)),
        sheets.text_rows(corpus, by_text, sheets.drawn(by_text, 8, context.seed)),
        sheets.related_rows(corpus, related, sheets.worst(related, 6), wanted=5),
    )


def _facts(context: ReportContext) -> Iterator[tuple[str, str]]:
    """The strip under the headline: what was trained, on what, where, how long."""
    graph, run = context.graph, context.environment or {}
    yield f"{len(context.ids):,}", "pins"
    yield f"{graph.num_boards:,}", "boards"
    yield f"{len(context.cold):,}", "pins held out"
    if "parameters" in run:
        yield compact(run["parameters"]), "parameters"
    if "steps" in run:
        yield f"{run['steps']:,}", "steps"
    if "seconds" in run:
        yield duration(run["seconds"]), "of training"
    if "pins_per_second" in run:
        yield f"{run['pins_per_second']:,.0f}", "pins per second"
    if "peak_memory_bytes" in run:
        yield f"{run['peak_memory_bytes'] / 1e9:.1f} GB", "peak memory"
    if "device" in run:
        yield str(run["device"]), "device"


def _contents(context: ReportContext) -> str:
    graph = context.graph
    images, texts = (int(context.embeddings.has(kind).sum()) for kind in ("image", "text"))
    return (
        f"{graph.num_pins:,} pins ({images:,} with an image, {texts:,} with a text) on {graph.num_boards:,} "
        f"boards, {graph.num_edges:,} edges."
    )


def duration(seconds: float) -> str:
    """Such as 42 s, 7 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _results(summary: Mapping) -> dict:
    """Rows of the main table, and the end of the scale that their bars are drawn on."""
    rows = [
        {"label": label, "baseline": task.endswith("tfidf"), **tables.task_metrics(summary, task)}
        for task, label in tables.TASK_LABELS.items()
    ]
    reach = [row["ci95"][1] if row["ci95"] else row["recall@10"] or 0 for row in rows]
    return {"rows": rows, "end": min(1.0, max(0.1, np.ceil(10 * max(reach)) / 10))}


def _strata(summary: Mapping) -> dict:
    strata = summary["strata"]
    rows = [
        (label, [tables.task_metrics(part, task)["recall@10"] for part in strata.values()])
        for task, label in tables.TASK_LABELS.items()
    ]
    return {"columns": [tables.stratum_label(name, part) for name, part in strata.items()], "rows": rows}


def _prefixes(summary: Mapping) -> list[tuple[str, list[float | None]]]:
    """recall@10 of text -> image, image -> text and related pins, by Matryoshka prefix, whole vector last."""
    prefixes = summary.get("matryoshka")
    if not prefixes:
        return []
    tasks = ("text_to_image", "image_to_text")
    rows = []
    for name, related in prefixes["pin_to_related"].items():
        dim = name.split("@")[1]
        alignment = [prefixes[f"{task}@{dim}"]["recall@10"] for task in tasks]
        rows.append((f"first {dim}", [*alignment, related["recall@10"]]))
    whole = [summary[task]["recall@10"] for task in tasks]
    return [*rows, ("all", [*whole, summary["pin_to_related"]["fused"]["recall@10"]])]


def _training_figures(history: Sequence[Mapping], summary: Mapping) -> list[tuple[str, str]]:
    """(caption, SVG) of the curves for which there are rows."""
    steps = [row for row in history if "loss" in row]
    found = []
    if steps:
        parts = [key for key in steps[0] if key not in _ROW_KEYS and "/" not in key]
        loss = {
            "total" if key == "loss" else _words(key): _series(steps, key) for key in ("loss", *parts[:5])
        }
        found.append(("Loss, with its running mean", figures.curves("loss", loss, smooth=True)))
    evaluated = [{"step": row["step"], **row["eval"]} for row in history if "eval" in row]
    if len(evaluated) > 1:
        recall = {
            label: _series(evaluated, key) for key, label in _EVAL_LABELS.items() if key in evaluated[0]
        }
        level = summary["pin_to_related"]["tfidf"]["recall@10"]
        levels = {} if level is None else {"related, TF-IDF": level}
        curve = figures.curves("recall", recall, markers=True, levels=levels, from_zero=True)
        found.append(("Recall@10 on the held-out pins", curve))
    scales = sorted({key for row in steps for key in row if key.startswith("scale/")})
    if scales:
        series = {_words(key.removeprefix("scale/")): _series(steps, key) for key in scales[:6]}
        found.append(("Scale (inverse temperature)", figures.curves("scale", series)))
    for key, caption in _RATES.items():
        if any(key in row for row in steps):
            curve = figures.curves(key.replace("_", "-"), {caption: _series(steps, key)}, from_zero=True)
            found.append((caption, curve))
    return found


def _data_figures(graph: BoardGraph) -> list[tuple[str, str]]:
    degrees, sizes = graph.pin_degrees[graph.pin_degrees > 0], graph.board_sizes[graph.board_sizes > 0]
    return [
        ("Boards per pin", figures.histogram("degrees", degrees, "boards", "pins")),
        ("Pins per board", figures.histogram("sizes", sizes, "pins", "boards")),
    ]


def _series(rows: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    there = [row for row in rows if key in row]
    return [row["step"] for row in there], [row[key] for row in there]


def _words(key: str) -> str:
    return key.replace("_", " ")


def _flat(table: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
