"""The campaign: its parts are the whole, it ends in time, and it runs without a GPU as a rehearsal."""

import json
import subprocess
import sys
import time
from pathlib import Path

from bench import campaign

ROOT = Path(__file__).resolve().parents[2]


def test_the_parts_are_the_whole_in_order():
    units = campaign.units("cuda", quick=False, tiny=False)
    assert units[0].kind == "tests" and len(units) > 50
    for parts in (1, 3, 10):
        split = [campaign.part_of(units, k, parts) for k in range(1, parts + 1)]
        assert [unit for part in split for unit in part] == units
        longest = max(sum(unit.seconds for unit in part) for part in split)
        assert longest < sum(unit.seconds for unit in units) / parts + max(unit.seconds for unit in units)


def test_the_quick_campaign_is_planned_to_nine_minutes():
    units = campaign.units("cuda", quick=True, tiny=False)
    assert sum(unit.seconds for unit in units) < 9 * 60
    assert any("train_step" in unit.name for unit in units)


def test_a_rehearsal_runs_on_a_cpu(tmp_path):
    out = tmp_path / "results" / "cpu.json"
    command = [
        sys.executable,
        "-m",
        "bench",
        "campaign",
        "--rehearse",
        "--only",
        "bench: l2",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["op"] for row in rows} == {"l2_normalize"}
    log = out.with_suffix(".log").read_text()
    assert "nothing wrong" in log and "l2_normalize 13x16" in log


def test_a_stage_is_ended_at_its_time_and_its_output_kept(tmp_path):
    log = campaign.Log(tmp_path / "log")
    begin = time.monotonic()
    command = [sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"]
    code = campaign.run_stage("sleeper", command, begin + 12, log)
    assert code == 124 and time.monotonic() - begin < 30
    assert "begun" in (tmp_path / "log").read_text()


def test_files_of_tests_run_side_by_side(tmp_path):
    log, python = campaign.Log(tmp_path / "log"), sys.executable
    codes = {"fine": 0, "none": 5, "failed": 1}
    stages = [(name, [python, "-c", f"print('ran'); raise SystemExit({c})"]) for name, c in codes.items()]
    assert campaign.run_tests(stages, time.monotonic() + 60, log) == ["failed"]
    text = (tmp_path / "log").read_text()
    assert all(f"{name}: ran" in text for name in codes)
    assert campaign.run_tests(stages[2:], time.monotonic() + 5, log) == []  # out of time: not reached
    assert "[failed: not reached]" in (tmp_path / "log").read_text()


def test_a_wrong_arm_is_a_bad_exit(tmp_path):
    log = campaign.Log(tmp_path / "log")
    assert (
        campaign.run_stage("bad", [sys.executable, "-c", "raise SystemExit(1)"], time.monotonic() + 30, log)
        == 1
    )


def test_without_a_gpu_it_says_so(capsys):
    import torch

    from bench.__main__ import main

    if not torch.cuda.is_available():
        assert main(["campaign"]) == 2
        assert "--rehearse" in capsys.readouterr().err
    assert main(["campaign", "--part", "3/2", "--rehearse"]) == 2


def test_the_train_step_needs_torch_alone():
    """Where pydantic and safetensors are missing, stand-ins take their place: ours builds and runs."""
    code = """
import sys
sys.modules["pydantic"] = sys.modules["safetensors"] = sys.modules["safetensors.torch"] = None
from bench import registry
from bench.train_step import ENTRIES
job = ENTRIES[0]
shape = next(s for s in job.shapes if s.tiny)
for name in ("pinclip", "pinclip, torch's attention and loss"):
    arm = next(a for a in job.arms if a.name == name)
    prepared = job.prepare(shape, arm, "cpu")
    assert prepared.verdict.passed, prepared.verdict.why
    assert float(prepared.steps["train step"]()) > 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
