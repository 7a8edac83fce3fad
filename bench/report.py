"""python -m bench report: docs/performance.md and its plots, from the results files alone.

Nothing is measured here, and nothing that was not measured gets a number: it says "not measured".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from bench.records import Row

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured"
_ORDER = {"ours": 0, "reference": 1, "rival": 2}


class Measured:
    """One results file."""

    def __init__(self, path: Path):
        document = json.loads(path.read_text())
        self.path, self.runs = path, {run["id"]: run for run in document["runs"]}
        self.rows: list[Row] = document["rows"]

    @property
    def device(self) -> str:
        return self.rows[0]["device"] if self.rows else next(iter(self.runs.values()), {}).get("device", "")

    @property
    def machine(self) -> str:
        return next(iter(self.runs.values()), {}).get("machine", {}).get("name", self.path.stem)

    def of(self, op: str) -> list[Row]:
        return [row for row in self.rows if row["op"] == op]


def read(folder: Path) -> list[Measured]:
    """The results files of a folder; rehearsals, whose times mean nothing, are left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if "rows" not in document:  # the compile report has another form
            continue
        if any(run["options"].get("tiny") for run in document["runs"]):
            continue
        found.append(Measured(path))
    return found


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def machine_table(files: list[Measured]) -> list[str]:
    lines = [
        "| results | machine | runs | versions | ceilings of the last run |",
        "|---|---|---|---|---|",
    ]
    for file in files:
        run = list(file.runs.values())[-1]
        dates = sorted({each["date"][:10] for each in file.runs.values()})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} … {dates[-1]}"
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        ceilings = "; ".join(
            f"{name} {number(value)} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
            for name, value in run["ceilings"].items()
        )
        machine = run["machine"]
        hardware = f"{machine['name']}, {machine['memory_gb']:g} GB"
        if file.device == "cpu":
            hardware += f", {machine['threads']} of {machine['cores']} cores, {machine['isa']}"
        loads = [r["state"].get("load_1min", 0) for r in file.rows if r.get("state")]
        if file.device == "cpu" and loads:
            hardware += f"; load {min(loads):g} … {max(loads):g}"
        quick = " (quick)" if all(each["options"].get("quick") for each in file.runs.values()) else ""
        name = file.path.name
        lines.append(
            f"| {name} | {hardware} | {len(file.runs)}{quick}, {when} | {versions} | {ceilings or '–'} |"
        )
    return lines


def summary(rows: list[Row]) -> list[str]:
    """One line per shape and mode: ours, the best correct rival, and the floor."""
    lines = [
        "| shape | mode | ours ms | [p20, p80] | of floor | best correct rival | its ms | ratio | "
        "extra MiB, ours | rival's | error / allowed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["mode"]), []).append(row)
    for (shape, mode), group in groups.items():
        for ours in (row for row in group if row["role"] == "ours"):
            best = ours.get("best_rival"), ours["run"]
            rival = next((r for r in group if (r["arm"], r["run"]) == best), None)
            name = f"{shape}: {ours['arm']}" if ours["arm"] != "pinclip" else shape
            head = f"| {name} | {mode} | "
            if ours["status"] != "ok":
                lines.append(f"{head}{ours['status']} | | | {rival['arm'] if rival else '–'} | | | | | |")
                continue
            floor = f"{ours['pct_floor']:.0f}%" if ours.get("pct_floor") is not None else "–"
            theirs = f"{rival['arm']} | {number(rival['median_ms'])}" if rival else "none | –"
            ratio = f"{ours['ratio']:.2f}×" if ours.get("ratio") else "–"
            memory = f"{number(ours['peak_extra_mb'])} | {number(rival['peak_extra_mb']) if rival else '–'}"
            spread = f"[{number(ours['p20_ms'])}, {number(ours['p80_ms'])}]"
            time = f"{number(ours['median_ms'])} | {spread}"
            lines.append(f"{head}{time} | {floor} | {theirs} | {ratio} | {memory} | {gate(ours)} |")
    return lines


def gate(row: Row) -> str:
    """The error that comes nearest to what is allowed, and the allowed one."""
    if not row["errors"]:
        return "checked"
    worst = max(row["errors"].values(), key=lambda e: float(e["error"]) / (float(e["allowed"]) or 1e-300))
    return f"{worst['error']:.1e} / {worst['allowed']:.1e}"


def details(rows: list[Row]) -> list[str]:
    """Every arm, in a folded table."""
    lines = [
        "<details><summary>every arm</summary>",
        "",
        "| shape | arm | mode | median ms | p20 | p80 | × | graph ms | launch ms | CPU ms | rate | "
        "TFLOP/s | GB/s | of GEMM | of copy | ratio | extra MiB | first call s |",
        "|" + "---|" * 18,
    ]
    for row in sorted(rows, key=lambda r: (r["shape"], r["mode"], _ORDER[r["role"]], r["arm"])):
        arm = row["arm"] + (f" (no gradient of {', '.join(row['lacks'])})" if row["lacks"] else "")
        head = f"| {row['shape']} | {arm} | {row['mode']} | "
        if row["status"] != "ok":
            why = row["why"].replace("|", "/")
            lines.append(f"{head}{row['status']}{': ' + why if why else ''} |" + " |" * 14)
            continue
        rate = f"{number(row['rate'])} {row['unit']}/s" if row["items"] else "–"
        cells = [
            *(number(row[name]) for name in ("median_ms", "p20_ms", "p80_ms")),
            str(row["repetitions"]),
            number(row.get("graph_median_ms")),
            number(row.get("launch_ms")),
            number(row.get("cpu_ms")),
            rate,
            number(row["tflops"]) if row["flops"] else "–",
            number(row["gbps"]) if row["bytes"] else "–",
            _percent(row.get("pct_gemm")),
            _percent(row.get("pct_copy")),
            number(row.get("ratio")),
            number(row["peak_extra_mb"]),
            number(row["first_call_s"]),
        ]
        lines.append(head + " | ".join(cells) + " |")
    return [*lines, "", "</details>"]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}%"


def split_table(rows: list[Row]) -> list[str]:
    """Where the time of a training step goes, by kind of work."""
    rows = [row for row in rows if row["status"] == "ok" and row.get("split_ms")]
    kinds = sorted({kind for row in rows for kind in row["split_ms"]})
    if not rows:
        return []
    lines = [
        "Share of the profiled time by kind of work:",
        "",
        "| shape | arm | images/s | " + " | ".join(kinds) + " |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    for row in rows:
        total = sum(row["split_ms"].values()) or 1.0
        shares = " | ".join(f"{100 * row['split_ms'].get(kind, 0.0) / total:.0f}%" for kind in kinds)
        lines.append(f"| {row['shape']} | {row['arm']} | {number(row['rate'])} | {shares} |")
    return lines


def compile_table(path: Path) -> list[str]:
    """What `python -m bench compile --out` read from the machine code."""
    if not path.exists():
        return [f"{NOT_MEASURED} (`python -m bench compile --out {path.name}`)"]
    lines = [
        "| kernel | sm | registers | spilled bytes | shared KiB | blocks | HGMMA | HMMA | 16-byte loads | "
        "TMA | static estimate |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in json.loads(path.read_text()):
        head = f"| {report['kernel']} | {report['arch']} | "
        if report["failed"]:
            lines.append(f"{head}does not compile |" + " |" * 8)
            continue
        counts, guess = report["counts"], report["estimate"]
        wide = "–" if report["wide_loads"] is None else f"{report['wide_loads']:.0%}"
        text = "–"
        if guess:
            text = f"{guess['serial']:.0f}–{guess['percent']:.0f}% of {guess['of']}, limit: {guess['limit']}"
        lines.append(
            f"{head}{report['registers']} | {report['spill_bytes']} | {report['shared'] / 1024:.0f} | "
            f"{report['blocks']} | {counts['hgmma']} | {counts['hmma']} | {wide} | {counts['tma']} | {text} |"
        )
    return lines


_HOW = """\
Every arm runs in a process of its own and is timed only after its results and all its gradients were held
to fp64: error ≤ 2 × plain torch in the same precision + one rounding. Arms take turns over rounds. On a GPU
the L2 cache is flushed before each of at least 100 repetitions (`--quick`: fewer, as the tables say) and
CUDA events time them; "graph" is the same step replayed as a CUDA graph. On a CPU, wall time and the
processor time of all threads. "ratio" is the time of the best correct rival over ours in the same run:
above 1 we are faster. "floor" is the longer of the useful operations at the rate of the same run's matrix
product and the least bytes at the rate of its copy. "extra" is peak memory less inputs and gradients. A
rival that is not installed, fails its gate ("wrong") or does not fit has no time."""


def render(folder: Path, out: Path, ops: Iterable[str]) -> str:
    """The page; plots are written beside it, into OUT's folder / performance."""
    from bench import plots

    files = read(folder)
    lines = [
        "# Performance",
        "",
        "Generated by `python -m bench report` from the files in `results/`; not edited by hand.",
        "",
        _HOW,
        "",
        "## Machines",
        "",
        *(machine_table(files) if files else [NOT_MEASURED]),
        "",
    ]
    kinds = (("cuda", "GPU"), ("cpu", "CPU"))
    for op in ops:
        lines += [f"## {op}", ""]
        for device, title in kinds:
            measured = [file for file in files if file.device == device and file.of(op)]
            if not measured:
                lines += [f"{title}: {NOT_MEASURED}.", ""]
            for file in measured:
                rows = file.of(op)
                lines += [f"### {op} on {file.machine}", "", *summary(rows), ""]
                for title_, name in plots.draw(op, file, out.parent / "performance"):
                    lines += [f"![{title_}](performance/{name})", ""]
                lines += [*split_table(rows), ""] if any(row.get("split_ms") for row in rows) else []
                lines += [*details(rows), ""]
    lines += ["## Machine code", "", *compile_table(folder / "compile.json"), ""]
    return "\n".join(lines)


def add_arguments(commands) -> None:
    parser = commands.add_parser("report", help="docs/performance.md from the results files")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    parser.set_defaults(call=main)


def main(options: argparse.Namespace) -> int:
    from bench import registry

    page = render(options.results, options.out, registry.entries())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    print(f"{options.out}: {len(page.splitlines())} lines")
    return 0
