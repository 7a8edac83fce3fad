"""Results as aligned plain text that is also Markdown: one evaluation, and an ablation of arms x seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pinclip.retrieval.metrics import METRICS, QueryMetrics, bootstrap_ci, t_interval

TASK_LABELS = {
    "text_to_image": "text → image",
    "image_to_text": "image → text",
    "pin_to_related/fused": "pin → related, fused",
    "pin_to_related/image": "pin → related, image only",
    "pin_to_related/text": "pin → related, text only",
    "pin_to_related/tfidf": "pin → related, TF-IDF of text",
}
ABLATION_TASKS = ("text_to_image", "image_to_text", "pin_to_related/fused", "pin_to_related/image")
NOTHING = "–"


def task_metrics(result: Mapping, task: str) -> dict:
    """The metrics of one task of an evaluation; "a/b" means result["a"]["b"]."""
    for name in task.split("/"):
        result = result[name]
    return dict(result)


def evaluation_table(result: Mapping) -> str:
    """`evaluate`'s result for the terminal: tasks, strata, Matryoshka prefixes, and what was skipped."""
    tables = [_tasks_table(result), _strata_table(result)]
    if "matryoshka" in result:
        tables.append(_matryoshka_table(result["matryoshka"]))
    return "\n\n".join([*tables, skipped_line(result["skipped"])])


def skipped_line(skipped: Mapping) -> str:
    """One sentence on the held-out pins that were not asked about, or could only miss."""
    reasons = {
        "bad_cold_pins": "unreadable",
        "cold_without_image": "without image",
        "cold_without_text": "without text",
        "cold_without_related_pin": "sharing no board with another pin",
    }
    parts = [f"{skipped[key]:,} {reason}" for key, reason in reasons.items() if skipped[key]]
    whole = f"{skipped['cold_pins']:,} held-out pins: {', '.join(parts) or 'every one was asked about'}."
    vectorless = skipped["related_queries_without_vector"]
    misses = [f"{count:,} {kind}" for kind, count in vectorless.items() if count]
    return f"{whole} Counted as misses for want of a vector: {', '.join(misses)}." if misses else whole


def ablation(
    runs: Mapping[str, Mapping[int, Mapping]],
    queries: Mapping[str, Mapping[int, Mapping[str, QueryMetrics]]] | None = None,
    *,
    tasks: Sequence[str] = ABLATION_TASKS,
    metric: str = "recall@10",
) -> dict:
    """Compare the arms of an experiment that was repeated with the same seeds in every arm.

    runs     {arm: {seed: evaluate(...)}}; the first arm is what the others are compared with
    queries  {arm: {seed: evaluate_queries(...)}}, for intervals over queries
    Returns plain numbers for JSON, for every task:
        arms         {arm: {task: {"mean", "ci95", "values"}}}; ci95 is the t-interval over seeds
        differences  {arm: {task: {"mean", "ci95", "values", "ci95_queries"}}}, this arm minus the first;
                     `values` are paired by seed and ci95 is their t-interval; ci95_queries (None without
                     `queries`) averages each query pin's difference over seeds, then resamples the pins
        against, seeds, metric
    ci95 is None with one seed. Raises `ValueError` if the arms have different seeds or queries.
    """
    arms = list(runs)
    seeds = sorted(runs[arms[0]])
    for arm in arms:
        if sorted(runs[arm]) != seeds:
            raise ValueError(f"arm {arm!r} has the seeds {sorted(runs[arm])}, arm {arms[0]!r} has {seeds}")
    values = {
        arm: {task: [task_metrics(runs[arm][seed], task)[metric] for seed in seeds] for task in tasks}
        for arm in arms
    }
    differences = {}
    for arm in arms[1:]:
        differences[arm] = {
            task: {
                **_over_seeds(np.subtract(values[arm][task], values[arms[0]][task])),
                "ci95_queries": None
                if queries is None
                else _over_queries(queries[arm], queries[arms[0]], task, METRICS[metric]),
            }
            for task in tasks
        }
    means = {arm: {task: _over_seeds(by_task[task]) for task in tasks} for arm, by_task in values.items()}
    return {"metric": metric, "seeds": seeds, "against": arms[0], "arms": means, "differences": differences}


def ablation_table(result: Mapping) -> str:
    """`ablation`'s result for the terminal: a row per arm, then a row per difference."""
    tasks = list(result["arms"][result["against"]])
    rows = [
        [arm, *(_with_interval(cell["mean"], cell["ci95"]) for cell in by_task.values())]
        for arm, by_task in result["arms"].items()
    ]
    for arm, by_task in result["differences"].items():
        name = f"{arm} − {result['against']}"
        cells = list(by_task.values())
        rows.append([f"{name}, over seeds", *(_with_interval(c["mean"], c["ci95"], "+") for c in cells)])
        if all(cell["ci95_queries"] for cell in cells):
            over = [_with_interval(cell["mean"], cell["ci95_queries"], "+") for cell in cells]
            rows.append([f"{name}, over queries", *over])
    header = ["arm", *(TASK_LABELS.get(task, task) for task in tasks)]
    count = len(result["seeds"])
    note = (
        f"{result['metric']}, mean of {count} seed{'s' * (count != 1)} {result['seeds']} [95% interval]. "
        "Over seeds: t-interval, differences paired by seed. Over queries: bootstrap of each query's "
        "difference, averaged over seeds."
    )
    return f"{aligned(header, rows)}\n\n{note}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded cells: first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def number(value: float | None, sign: str = "") -> str:
    """Three decimals, or a dash for what could not be measured."""
    return NOTHING if value is None else f"{value:{sign}.3f}"


def _tasks_table(result: Mapping) -> str:
    rows = []
    for task, label in TASK_LABELS.items():
        m = task_metrics(result, task)
        interval = NOTHING if m["ci95"] is None else f"{m['ci95'][0]:.3f} … {m['ci95'][1]:.3f}"
        scores = [number(m[key]) for key in ("recall@1", "recall@10")]
        more = [number(m[key]) for key in ("mrr", "ndcg@10", "chance@10")]
        rows.append([label, *scores, interval, *more, f"{m['queries']:,}", f"{m['corpus']:,}"])
    scores = ["R@1", "R@10", "95% of R@10", "MRR", "nDCG@10", "chance R@10"]
    return aligned(["held-out pins", *scores, "queries", "corpus"], rows)


def _strata_table(result: Mapping) -> str:
    strata = result["strata"]
    rows = [
        [label, *(number(task_metrics(part, task)["recall@10"]) for part in strata.values())]
        for task, label in TASK_LABELS.items()
    ]
    return aligned(["R@10 by number of boards", *(stratum_label(n, p) for n, p in strata.items())], rows)


def stratum_label(name: str, part: Mapping) -> str:
    """Such as "torso, 3–5 boards (171 pins)"."""
    if part["degree"] is None:
        return f"{name} (no pins)"
    low, high = part["degree"]
    degree = f"{low}" if low == high else f"{low}–{high}"
    return f"{name}, {degree} board{'s' * (degree != '1')} ({part['pins']:,} pins)"


def _matryoshka_table(prefixes: Mapping) -> str:
    dims = [int(name.split("@")[1]) for name in prefixes["pin_to_related"]]
    rows = [
        [
            f"first {dim} dimensions",
            number(prefixes[f"text_to_image@{dim}"]["recall@10"]),
            number(prefixes[f"image_to_text@{dim}"]["recall@10"]),
            number(prefixes["pin_to_related"][f"fused@{dim}"]["recall@10"]),
        ]
        for dim in dims
    ]
    tasks = ("text_to_image", "image_to_text", "pin_to_related/fused")
    return aligned(["R@10 of a prefix", *(TASK_LABELS[task] for task in tasks)], rows)


def _over_seeds(values: Sequence[float]) -> dict:
    return {"mean": float(np.mean(values)), "ci95": t_interval(values), "values": [float(v) for v in values]}


def _over_queries(arm: Mapping, base: Mapping, task: str, array: str) -> list[float] | None:
    pins, change = [], []
    for seed in arm:
        ours, theirs = arm[seed][task], base[seed][task]
        if not np.array_equal(ours.pins, theirs.pins):
            raise ValueError(f"the arms asked {task} about different pins with seed {seed}")
        pins.append(ours.pins)
        change.append(getattr(ours, array) - getattr(theirs, array))
    _, which = np.unique(np.concatenate(pins), return_inverse=True)
    total = np.bincount(which, np.concatenate(change))
    return bootstrap_ci(total / np.bincount(which))


def _with_interval(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None or interval is None:
        return number(value, sign)
    return f"{number(value, sign)} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
