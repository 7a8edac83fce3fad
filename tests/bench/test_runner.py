"""Arms in their own processes: what is missing, wrong or dying has no time; what was measured stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import planted
import pytest

from bench import machine, registry, runner, worker
from bench.records import Results, against_ceilings, against_rivals

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All arms of the planted op, run as `python -m bench run` runs them; by (arm, mode)."""
    registry.add(planted)
    path = tmp_path_factory.mktemp("runner") / "results.json"
    bench = runner.Runner(Results(path), "cpu", runner.Budget(2, 4, 5.0), threads=1, log=lambda text: None)
    bench.begin({"quick": True}, tiny=True)
    work = [(planted.OP, [planted.SHAPE]), (planted.JOB, [planted.SHAPE])]
    assert runner.measure(work, bench) == 1  # the job of ours is wrong
    document = json.loads(path.read_text())
    return {(row["op"], row["arm"], row["mode"]): row for row in document["rows"]}


def test_a_correct_arm_is_timed_with_all_that_a_row_must_say(rows):
    row = rows["planted", "eager", "forward+backward"]
    assert row["status"] == "ok"
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert (row["repetitions"], row["rounds"]) == (4, 2)
    assert row["cpu_ms"] > 0 and row["first_call_s"] > 0 and row["peak_extra_mb"] >= 0
    assert row["tflops"] == pytest.approx(3e6 / row["median_ms"] / 1e9)
    assert row["pct_gemm"] > 0 and row["pct_copy"] > 0 and row["pct_floor"] > 0
    assert row["error"] < 1e-5


@pytest.mark.parametrize(
    "arm,status,why",
    [
        ("wrong gradient", "wrong", "dy"),
        ("nan", "wrong", "result"),
        ("missing", "not installed", "a_library_that_nobody_has"),
        ("cannot", "unsupported", "not this shape"),
        ("raises", "failed", "planted"),
        ("dies", "failed", "exit code 3"),
        ("too large", "does not fit", "needs"),
    ],
)
def test_what_is_no_result_has_no_time(rows, arm, status, why):
    for mode in ("forward", "forward+backward"):
        row = rows["planted", arm, mode]
        assert row["status"] == status
        assert why in row["why"]
        assert "median_ms" not in row


def test_a_job_that_fails_its_own_check_is_wrong(rows):
    row = rows["planted job", "ours", "run"]
    assert (row["status"], row["why"]) == ("wrong", "it is planted so")


def test_the_ratio_is_to_the_best_correct_rival(rows):
    ours = rows["planted", "ours", "forward"]
    rivals = {arm: row for (op, arm, mode), row in rows.items() if (op, mode) == ("planted", "forward")}
    timed = {arm: row for arm, row in rivals.items() if row["role"] == "rival" and row["status"] == "ok"}
    best = min(timed, key=lambda arm: timed[arm]["median_ms"])
    assert ours["best_rival"] == best
    assert ours["ratio"] == pytest.approx(timed[best]["median_ms"] / ours["median_ms"])


def test_ceilings_and_ratio_by_hand():
    row = {"median_ms": 2.0, "flops": 6e9, "bytes": 4e6, "items": 10, "dtype": "bfloat16"}
    against_ceilings(row, {"gemm bfloat16": 4.0, "copy": 8.0})
    assert (row["tflops"], row["gbps"], row["rate"]) == (3.0, 2.0, 5000.0)
    assert (row["pct_gemm"], row["pct_copy"]) == (75.0, 25.0)
    # 6e9 operations at 4e12 a second are 1.5 ms; 4e6 bytes at 8e9 are 0.5 ms.
    assert (row["floor_ms"], row["pct_floor"]) == (1.5, 75.0)

    base = {"run": 1, "device": "cpu", "op": "o", "shape": "s", "mode": "m", "status": "ok"}
    ours = {**base, "arm": "ours", "role": "ours", "median_ms": 2.0}
    slow = {**base, "arm": "slow", "role": "rival", "median_ms": 5.0}
    wrong = {**base, "arm": "wrong", "role": "rival", "status": "wrong"}
    other = {**base, "arm": "fast", "role": "rival", "median_ms": 1.0, "run": 2}
    against_rivals([ours, slow, wrong, other])
    assert (ours["best_rival"], ours["ratio"], wrong["ratio"]) == ("slow", 2.5, None)


def test_quantiles_by_hand():
    assert worker.median([3.0, 1.0, 2.0]) == 2.0
    assert worker.quantile([0.0, 10.0], 0.2) == 2.0
    assert worker.quantile([5.0], 0.8) == 5.0


def test_peak_memory_sees_what_a_step_takes():
    import torch

    for _ in range(2):  # also where the C library has kept what the first took
        taken = worker.peak_memory(lambda: torch.ones(2**24).sum(), "cpu")
        assert 60 * 2**20 < taken < 90 * 2**20
    taken = worker.peak_memory(lambda: [torch.ones(2**20) for _ in range(16)], "cpu")
    assert 60 * 2**20 < taken < 90 * 2**20


def test_a_second_run_replaces_rows_and_keeps_the_others(tmp_path):
    path = tmp_path / "r.json"
    row = {
        "device": "cpu",
        "op": "o",
        "shape": "s",
        "arm": "a",
        "mode": "m",
        "role": "ours",
        "status": "ok",
        "dtype": "float32",
        "flops": 0.0,
        "bytes": 0.0,
        "items": 1.0,
    }
    for ms in (1.0, 2.0):
        results = Results(path)
        results.begin({"device": "cpu", "ceilings": {}})
        results.put([{**row, "median_ms": ms}, {**row, "arm": f"only {ms}", "median_ms": ms}])
    document = json.loads(path.read_text())
    assert {r["arm"]: r["median_ms"] for r in document["rows"]} == {
        "a": 2.0,
        "only 1.0": 1.0,
        "only 2.0": 2.0,
    }
    assert [run["id"] for run in document["runs"]] == [1, 2]


def test_a_killed_run_keeps_its_rows_and_leaves_no_process(tmp_path):
    out = tmp_path / "cut.json"
    command = [sys.executable, "-m", "bench", "run", "l2_normalize", "gated_residual_norm", "attention"]
    process = subprocess.Popen(
        [*command, "--tiny", "--cpu", "--threads", "1", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            if out.exists() and any("median_ms" in row for row in json.loads(out.read_text())["rows"]):
                break
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be cut"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = json.loads(out.read_text())["rows"]
    assert any(row["status"] == "ok" and row["op"] == "l2_normalize" for row in kept)
    assert not any(row["op"] == "attention" and "median_ms" in row for row in kept)
    for _ in range(200):  # its arms see the end of their pipes
        left = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True, check=False)
        if not left.stdout.strip():
            break
        time.sleep(0.1)
    assert not left.stdout.strip()


def test_a_process_that_does_not_answer_is_ended():
    registry.add(planted)
    process = worker.ArmProcess("planted", "planted", "8x6", "eager", "cpu", 1)
    process.ready()
    with pytest.raises(worker.Died, match="no answer"):
        process.ask("prepare", timeout=0.0)
    process.stop()


def test_machine_says_what_it_is_and_no_more():
    facts = machine.facts("cpu")
    assert facts["machine"]["cores"] >= 1 and facts["versions"]["torch"]
    assert os.uname().nodename not in json.dumps(facts)
