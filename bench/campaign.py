"""python -m bench campaign: everything that needs a GPU, in one command that installs nothing and asks no
network.

Stages in order: the C++/CUDA extension (where pybind11 is), the GPU tests, every op's benchmarks, the
training step. Every stage is a process of its own with an end time; what it finds stands in
results/<gpu>.json row by row, and in a log beside it, so a cut run loses the row it was at. `--part k/n` runs
the k-th of n parts of about equal length, each within `--minutes`.

Exit code 1 where a test failed or an arm of ours (or a reference) is wrong, 0 otherwise: a rival that is
wrong or missing is a finding, not a fault.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import machine, registry
from bench.registry import Entry
from bench.runner import Budget

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ((3, 10), (2, 11), (3, 6))  # Python, torch, triton


@dataclass(frozen=True)
class Unit:
    """The smallest thing that a part may hold: the tests, or one shape of one entry."""

    kind: str  # "tests" or "bench"
    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def units(device: str, *, quick: bool, tiny: bool) -> list[Unit]:
    """All of it, in order."""
    made = [Unit("tests", "pytest -m gpu", 10 if tiny else 90)]
    for entry in registry.entries().values():
        for shape in registry.select(entry, device, quick=quick, tiny=tiny):
            made.append(Unit("bench", f"{entry.name}={shape.name}", _seconds(entry, device, quick, tiny)))
    return made


def _seconds(entry: Entry, device: str, quick: bool, tiny: bool) -> float:
    """A guess, to share the units out: start and gate of every arm, its compilation, and the measuring."""
    arms = [arm for arm in entry.arms if device in arm.on and (arm.quick or not quick)]
    budget = Budget.of(device, quick=quick, tiny=tiny)
    graphs = 2 if device == "cuda" else 1
    measuring = len(arms) * len(entry.modes) * graphs * min(budget.seconds, 1.5)
    return 6 + measuring + (15 if any(arm.compiled for arm in arms) else 0)


def commands(
    chosen: list[Unit], device: str, out: Path, *, quick: bool, tiny: bool
) -> list[tuple[str, list[str]]]:
    """One command per file of tests; all benchmarks are one run, with one measurement of the ceilings."""
    python = [sys.executable, "-m"]
    flags = [flag for flag, on in (("--quick", quick), ("--tiny", tiny), ("--cpu", device == "cpu")) if on]
    made = []
    if any(unit.kind == "tests" for unit in chosen):
        made += [(f"tests {Path(f).stem}", [*python, "pytest", "-q", "-m", "gpu", f]) for f in gpu_tests()]
    if names := [unit.name for unit in chosen if unit.kind == "bench"]:
        made.append(("bench", [*python, "bench", "run", *names, *flags, "--out", str(out)]))
    return made


def gpu_tests() -> list[str]:
    """Test files with the marker `gpu`; the others may import what a bare GPU machine does not have."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in files if "mark.gpu" in p.read_text(encoding="utf-8")]


def part_of(units: list[Unit], part: int, parts: int) -> list[Unit]:
    """The part-th (from 1) of `parts` runs of neighboring units, of about equal length."""
    total, before, chosen = sum(unit.seconds for unit in units), 0.0, []
    for unit in units:
        middle = before + unit.seconds / 2
        if min(parts, 1 + int(parts * middle / total)) == part:
            chosen.append(unit)
        before += unit.seconds
    return chosen


class Log:
    """Lines to the screen and, at once, to a file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (open as long as we run)

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")


def environment() -> dict[str, str]:
    """Ours, with the repository and its kernels importable without an installation."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def build_extension(log: Log) -> None:
    """Build pinclip_kernels._C in place; without it the walker is not measured, and that is said."""
    if importlib.util.find_spec("pinclip_kernels._C") is not None:
        log("extension: there already")
        return
    if importlib.util.find_spec("pybind11") is None:
        log("extension: not built, pybind11 is not installed")
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        log(f"extension: not built: {done.stderr.strip().splitlines()[-1]}")
        return
    log("extension: built")


def versions_fit() -> str:
    """What is too old here, or ""."""
    import torch
    import triton

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:2])

    have = (sys.version_info[:2], numbers(torch.__version__), numbers(triton.__version__))
    names = ("Python", "torch", "triton")
    old = [f"{n} {h[0]}.{h[1]} < {w[0]}.{w[1]}" for n, h, w in zip(names, have, NEEDED) if h < w]
    return ", ".join(old)


def run_tests(stages: list[tuple[str, list[str]]], deadline: float, log: Log) -> list[str]:
    """Run files of tests side by side: they wait for compilers, not for the GPU. The names of those that
    failed; one that runs out of time has not."""
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        codes = list(pool.map(lambda stage: run_stage(*stage, deadline, log, f"{stage[0]}: "), stages))
    return [name for (name, _), code in zip(stages, codes) if code not in (0, 5, 124)]  # 5: none selected


def run_stage(name: str, command: list[str], deadline: float, log: Log, mark: str = "") -> int:
    """Run a command until `deadline`; its exit code, 124 where it was ended by it. Its lines are marked."""
    if time.monotonic() > deadline - 10:
        log(f"[{name}: not reached]")
        return 124
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=lambda: [log(mark + line.rstrip("\n")) for line in process.stdout])
    reader.start()
    try:
        code = process.wait(max(1.0, deadline - begin))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its arms too
        process.wait()
        code = 124
    reader.join(10)
    ended = ", ended: the time is up" if code == 124 else ""
    log(f"[{name}: exit code {code}, {time.monotonic() - begin:.1f} s{ended}]")
    return code


def add_arguments(commands) -> None:
    parser = commands.add_parser("campaign", help="everything that needs a GPU, in one command")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions: within 9 minutes")
    parser.add_argument("--part", default="1/1", help="k/n: the k-th of n parts")
    parser.add_argument("--minutes", type=float, default=8.8, help="of this part")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes, on the CPU where there is no GPU"
    )
    parser.add_argument("--list", action="store_true", help="print the stages of this part and end")
    parser.add_argument("--only", default="", help="stages whose name begins so")
    parser.add_argument("--out", type=Path, help="results file; default results/<gpu>.json")
    parser.set_defaults(call=main)


def main(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    device = machine.default_device()
    if device == "cpu" and not options.rehearse and not options.list:
        print("no GPU here; `--rehearse` runs every stage at tiny shapes on the CPU", file=sys.stderr)
        return 2
    try:
        part, parts = map(int, options.part.split("/"))
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError:
        print(f"--part {options.part}: expected k/n with 1 <= k <= n", file=sys.stderr)
        return 2
    out = options.out or ROOT / "results" / f"{machine.slug(device)}.json"
    flags = {"quick": options.quick, "tiny": options.rehearse}
    chosen = part_of(units("cuda" if options.list else device, **flags), part, parts)
    chosen = [unit for unit in chosen if str(unit).startswith(options.only)]
    if options.list:
        for unit in chosen:
            print(f"{unit.seconds:6.0f} s  {unit}")
        print(f"{sum(unit.seconds for unit in chosen):6.0f} s in all, roughly")
        return 0
    log = Log(out.with_suffix(".log"))
    log(f"campaign {machine.now()} part {part}/{parts} quick={options.quick} rehearse={options.rehearse}")
    if old := versions_fit():
        log(f"too old: {old}")
        return 2
    build_extension(log)
    deadline, bad = begin + 60 * options.minutes, []
    stages = commands(chosen, device, out, **flags)
    tests = [stage for stage in stages if stage[0] != "bench"]
    if tests and (note := _tests_can_run()):
        log(f"[tests: {note}]")
    elif tests:  # half of the time at most, where there is more to do
        bad += run_tests(tests, deadline if tests == stages else begin + 30 * options.minutes, log)
    for name, command in stages[len(tests) :]:
        # It ends itself, between two shapes.
        command += ["--minutes", f"{(deadline - time.monotonic() - 20) / 60:.2f}"]
        if run_stage(name, command, deadline, log) not in (0, 124):
            bad.append(name)
    verdict = f"wrong: {', '.join(bad)}" if bad else "nothing wrong"
    log(f"campaign: {time.monotonic() - begin:.0f} s; {verdict}")
    return 1 if bad else 0


def _tests_can_run() -> str:
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    return "" if gpu_tests() else "there are none for a GPU"
