"""The page is made from results files alone, and says where nothing was measured."""

import json

import pytest

from bench import plots, report

SIZES = {"m": 0, "n": 0, "d": 16, "scale": 1.0, "variant": "diagonal", "dims": None}


def row(n, arm, role, ms, **more):
    return {
        "run": 1,
        "device": "cpu",
        "op": "contrastive",
        "shape": f"{n}x{n}",
        "arm": arm,
        "mode": "forward+backward",
        "role": role,
        "status": "ok",
        "why": "",
        "dtype": "float32",
        "sizes": {**SIZES, "m": n, "n": n},
        "flops": 8.0 * n * n * 16,
        "bytes": 256.0 * n,
        "items": n,
        "unit": "rows",
        "errors": {"dx": {"error": 1e-7, "plain": 2e-7, "allowed": 4e-7}},
        "lacks": [],
        "median_ms": ms,
        "p20_ms": 0.9 * ms,
        "p80_ms": 1.1 * ms,
        "repetitions": 9,
        "first_call_s": 0.5,
        "peak_extra_mb": n / 8,
        "state": {"load_1min": 0.2},
        "tflops": 8e-9 * n * n * 16 / ms,
        "gbps": 1.0,
        "rate": 1.0,
        "pct_floor": 40.0,
        "best_rival": "open_clip",
        "ratio": 2.5 if role == "ours" else 1.0,
        **more,
    }


@pytest.fixture
def results(tmp_path):
    rows = []
    for n in (1024, 4096, 8192):
        rows.append(row(n, "pinclip", "ours", n / 1000))
        rows.append(row(n, "open_clip", "rival", n / 400))
        gone = {"status": "not installed", "why": "No module named 'memeff'", "errors": {}}
        rows.append({**row(n, "memeff", "rival", 1.0), **gone})
    run = {
        "id": 1,
        "date": "2026-11-22T10:00:00+00:00",
        "device": "cpu",
        "machine": {"name": "A CPU", "memory_gb": 8, "threads": 2, "cores": 2, "isa": "AVX"},
        "versions": {"torch": "2.11"},
        "options": {"quick": True},
        "ceilings": {"gemm float32": 0.1, "copy": 20.0},
    }
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu.json").write_text(json.dumps({"runs": [run], "rows": rows}))
    rehearsal = {"runs": [{**run, "options": {"tiny": True}}], "rows": [row(7, "pinclip", "ours", 1234.5)]}
    (folder / "rehearsal.json").write_text(json.dumps(rehearsal))
    return folder


def test_the_page_has_the_numbers_and_says_what_was_not_measured(results, tmp_path):
    out = tmp_path / "docs" / "performance.md"
    page = report.render(results, out, ["contrastive", "attention"])
    assert "| 8192x8192 | forward+backward | 8.19 | [7.37, 9.01] | 40% | open_clip | 20.5 | 2.50× |" in page
    assert "not installed: No module named 'memeff'" in page
    assert "A CPU" in page and "torch 2.11" in page and "2026-11-22" in page and "(quick)" in page
    section = page.split("## attention")[1].split("## Machine code")[0]
    assert section.count("not measured") == 2  # neither on a GPU nor on a CPU
    assert "GPU: not measured." in page.split("## contrastive")[1].split("## attention")[0]
    assert "1,23" not in page  # a rehearsal's times mean nothing
    assert "not measured" in page.split("## Machine code")[1]


def test_plots_are_drawn_where_there_are_points_and_are_the_same_twice(results, tmp_path):
    out = tmp_path / "docs" / "performance.md"
    page = report.render(results, out, ["contrastive", "attention"])
    drawn = {path.name: path.read_bytes() for path in (out.parent / "performance").iterdir()}
    assert {name.split("-")[1] for name in drawn} == {"roofline", "time", "memory", "ratio"}
    assert all(f"performance/{name}" in page for name in drawn)
    report.render(results, out, ["contrastive", "attention"])
    assert drawn == {path.name: path.read_bytes() for path in (out.parent / "performance").iterdir()}


def test_a_series_differs_in_one_size_alone(results):
    (file,) = report.read(results)
    size, rows = plots.series([r for r in file.rows if r["status"] == "ok"])
    assert size == "n" and len(rows) == 6
    other = [{**r, "sizes": {**r["sizes"], "d": r["sizes"]["n"]}} for r in rows]
    assert plots.series(other) == ("", [])


def test_nothing_at_all_is_a_page_too(tmp_path):
    page = report.render(tmp_path, tmp_path / "performance.md", ["contrastive"])
    assert page.count("not measured") >= 4
