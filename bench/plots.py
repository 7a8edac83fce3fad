"""Plots of one entry's results: roofline, time and memory against size, ratio to rivals. SVG, the same bytes
for the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.records import Row

if TYPE_CHECKING:
    from bench.report import Measured

_SIZES = ("n", "batch", "rows", "corpus", "edges")  # what time is drawn against: the first that varies alone


def draw(op: str, file: Measured, folder: Path) -> Iterator[tuple[str, str]]:
    """Write the plots that the rows allow; (title, file name) of each."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pinclip"
    rows = [row for row in file.of(op) if row["status"] == "ok"]
    mode = max((row["mode"] for row in rows), key=len, default="")
    rows = [row for row in rows if row["mode"] == mode]
    kinds = (("roofline", _roofline), ("time", _time), ("memory", _memory), ("ratio", _ratio))
    for kind, plot in kinds:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        if plot(axes, rows, file):
            axes.set_title(f"{op}, {mode}, {file.machine}", fontsize=10)
            axes.grid(alpha=0.3, which="both")
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{re.sub('[^a-z0-9_]+', '-', op.lower())}-{kind}-{file.path.stem}.svg"
            figure.savefig(folder / name, metadata={"Date": None})
            yield f"{op}: {kind}", name
        pyplot.close(figure)


def _roofline(axes, rows: list[Row], file: Measured) -> bool:
    """Useful operations per second over operations per least byte, under the ceilings of the last run."""
    rows = [row for row in rows if row["flops"] and row["bytes"]]
    ceilings = list(file.runs.values())[-1]["ceilings"]
    gemm = ceilings.get(f"gemm {rows[0]['dtype']}") if rows else None
    if not gemm or "copy" not in ceilings:
        return False
    for arm in _arms(rows):
        mine = [row for row in rows if row["arm"] == arm]
        axes.loglog(
            [r["flops"] / r["bytes"] for r in mine], [r["tflops"] for r in mine], "o", label=arm, ms=4
        )
    x = sorted({1.0, gemm * 1e3 / ceilings["copy"], *(1.5 * r["flops"] / r["bytes"] for r in rows)})
    axes.loglog(x, [min(gemm, each * ceilings["copy"] / 1e3) for each in x], "k-", lw=1, label="ceilings")
    axes.set_xlabel("useful operations per least byte")
    axes.set_ylabel("useful TFLOP/s")
    axes.legend(fontsize=7)
    return True


def series(rows: list[Row]) -> tuple[str, list[Row]]:
    """The longest series of shapes that differ in one size alone; that size, and its rows."""
    best: tuple[int, str, list[Row]] = (2, "", [])
    for size in _SIZES:
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            if size in row["sizes"]:
                rest = {k: v for k, v in row["sizes"].items() if k != size}
                if rest.get("m") == row["sizes"].get("n") and size == "n":
                    rest.pop("m", None)  # a square problem: m goes with n
                key = (row["dtype"], *sorted((k, str(v)) for k, v in rest.items()))
                groups.setdefault(key, []).append(row)
        for group in groups.values():
            count = len({row["sizes"][size] for row in group})
            if count > best[0]:
                best = count, size, group
    return best[1], best[2]


def _against(axes, rows: list[Row], field: str, label: str) -> bool:
    size, rows = series(rows)
    if not rows:
        return False
    for arm in _arms(rows):
        points = sorted((row["sizes"][size], row[field]) for row in rows if row["arm"] == arm)
        axes.loglog(*zip(*points), "o-", label=arm, ms=4, lw=1)
    fixed = {k: v for k, v in rows[0]["sizes"].items() if k not in (size, "m", "variant") and v is not None}
    axes.set_xlabel(f"{size.upper()}   ({', '.join(f'{k} = {v}' for k, v in fixed.items())})")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)
    return True


def _time(axes, rows: list[Row], file: Measured) -> bool:
    return _against(axes, rows, "median_ms", "ms, median")


def _memory(axes, rows: list[Row], file: Measured) -> bool:
    rows = [row for row in rows if row["peak_extra_mb"] > 0]
    return _against(axes, rows, "peak_extra_mb", "peak MiB beyond inputs and gradients")


def _ratio(axes, rows: list[Row], file: Measured) -> bool:
    """Time of the best correct rival over ours, by shape."""
    ours = [row for row in rows if row["role"] == "ours" and row.get("ratio")]
    if not ours:
        return False
    labels = [row["shape"] for row in ours]
    axes.barh(range(len(ours)), [row["ratio"] for row in ours], color="tab:blue")
    axes.set_yticks(range(len(ours)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="k", lw=1)
    axes.set_xlabel("time of the best correct rival / ours")
    return True


def _arms(rows: list[Row]) -> list[str]:
    return sorted({row["arm"] for row in rows}, key=lambda arm: (arm != "pinclip", arm))
