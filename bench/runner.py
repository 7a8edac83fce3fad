"""Times arms: each in a fresh process, interleaved over rounds, gated first; rows are written as they come.

A round times every arm of a shape once, so that a machine that grows slower or warmer meets all of them.
After each round the shape's rows are written with what has been measured so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from bench import machine
from bench.records import Results, Row
from bench.registry import Arm, Entry, Shape, Work, home, modes_of
from bench.worker import ArmProcess, Died, median, quantile

_AT_ONCE = 6  # arms that a GPU machine prepares at a time


@dataclass(frozen=True)
class Budget:
    """How long an arm at one shape and mode is measured: `repeats` in all, but about `seconds` at most."""

    rounds: int
    repeats: int
    seconds: float
    shape: float = 120.0  # until no third round is begun
    prepare: float = 300.0  # until a process that does not answer is ended
    quick: bool = False  # without the arms that are not for a quick run

    @classmethod
    def of(cls, device: str, *, quick: bool = False, tiny: bool = False) -> Budget:
        if tiny:
            return cls(2, 4, 0.2)
        if device == "cuda":
            return cls(2, 30, 0.3, quick=True) if quick else cls(5, 100, 30.0)
        return cls(3, 9, 2.0, quick=True) if quick else cls(3, 15, 5.0, shape=45.0, prepare=600.0)


@dataclass
class Measured:
    """What one arm gave at one shape, over the rounds so far."""

    arm: Arm
    start: Callable[[], ArmProcess]
    process: ArmProcess | None = None
    status: str = "ok"
    why: str = ""
    facts: Row = field(default_factory=dict)
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    graph: dict[str, list[float]] = field(default_factory=dict)
    graph_why: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    state: Row = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return self.process is not None and self.status == "ok"

    def end(self, status: str, why: str) -> None:
        self.status, self.why = status, why
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None


class Runner:
    """Measures entries into `results` until `deadline` (of time.monotonic())."""

    def __init__(
        self,
        results: Results,
        device: str,
        budget: Budget,
        *,
        threads: int | None = None,
        deadline: float = float("inf"),
        log: Callable[[str], None] = lambda text: print(text, flush=True),
    ):
        self.results, self.device, self.budget = results, device, budget
        self.threads, self.deadline, self.log = threads, deadline, log
        self.bad: list[str] = []  # arms of ours, or references, that are wrong or failed

    def begin(self, options: Row, tiny: bool = False) -> None:
        """Note the machine, measure its ceilings, and start a run in the results."""
        run = {**machine.facts(self.device), "options": options, "ceilings": {}}
        if self.threads and self.device == "cpu":
            run["machine"]["threads"] = self.threads
        run["state"] = machine.state(self.device)
        process = ArmProcess("", "", "", "", self.device, self.threads)
        try:
            process.ready()
            run["ceilings"] = process.ask("ceilings", tiny, timeout=120)
        except Died as error:
            self.log(f"ceilings: {error}")
        finally:
            process.stop()
        self.results.begin(run)
        rates = ", ".join(f"{name} {value:.4g}" for name, value in run["ceilings"].items())
        self.log(f"{run['machine']['name']}: {rates} (TFLOP/s, GB/s)")

    def run(self, entry: Entry, shapes: Iterable[Shape], arms: Iterable[str] = ()) -> bool:
        """Measure the shapes; False where the deadline came first."""
        wanted = set(arms)
        for shape in shapes:
            if time.monotonic() >= self.deadline:
                self.log(f"{entry.name} {shape.name}: not reached in time")
                return False
            self._shape(entry, shape, [arm for arm in entry.arms if self._takes(arm, wanted)])
        return True

    def _takes(self, arm: Arm, wanted: set[str]) -> bool:
        if wanted:
            return arm.name in wanted
        return self.device in arm.on and (arm.quick or not self.budget.quick)

    def _shape(self, entry: Entry, shape: Shape, arms: list[Arm]) -> None:
        measured = [self._start(entry, shape, arm) for arm in arms]
        try:
            self._prepare_all([each for each in measured if each.live])
            self._write(entry, shape, measured)
            begin = time.monotonic()
            for number in range(self.budget.rounds):
                now = time.monotonic()
                if number and now >= self.deadline:
                    self.log(f"{entry.name} {shape.name}: {number} of {self.budget.rounds} rounds in time")
                    break
                if number >= 2 and now - begin > self.budget.shape:
                    break  # steps of many seconds: two of each are enough
                if not any(each.live for each in measured):
                    break
                for each in measured:
                    if each.live:
                        self._round(entry, shape, each)
                state = machine.state(self.device)
                for each in measured:
                    each.state = state
                self._write(entry, shape, measured)
        finally:
            for each in measured:
                each.stop()
        self._say(entry, shape, measured)

    def _start(self, entry: Entry, shape: Shape, arm: Arm) -> Measured:
        measured = Measured(
            arm, lambda: ArmProcess(home(entry), entry.name, shape.name, arm.name, self.device, self.threads)
        )
        if arm.memory is not None:
            needed = max(arm.memory(shape, mode) for mode in modes_of(entry, shape))
            total, free = machine.free_bytes(self.device)
            if needed > 0.9 * free:
                why = (
                    f"needs {needed / 2**30:.3g} GiB; {free / 2**30:.3g} of {total / 2**30:.3g} GiB are free"
                )
                return replace(measured, status="does not fit", why=why)
        measured.process = measured.start()
        return measured

    def _prepare_all(self, measured: list[Measured]) -> None:
        """Gate, compile and warm up: on a GPU several arms at a time, for most of it is the host's work.

        One that found no room beside the others is asked again when it is alone.
        """
        if self.device == "cpu":
            for each in measured:
                self._prepare(each)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self._prepare, measured))
        for each in measured:
            if each.status == "does not fit":
                each.status, each.process = "ok", each.start()
                self._prepare(each)

    def _prepare(self, measured: Measured) -> None:
        try:
            measured.process.ready()
            answer = measured.process.ask("prepare", timeout=self.budget.prepare)
        except Died as error:
            measured.end("failed", str(error))
            return
        measured.facts = answer
        if answer["status"] != "ok":
            measured.end(answer["status"], answer["why"])

    def _round(self, entry: Entry, shape: Shape, measured: Measured) -> None:
        repeats = -(-self.budget.repeats // self.budget.rounds)
        seconds = self.budget.seconds / self.budget.rounds
        for mode in modes_of(entry, shape):
            try:
                answer = measured.process.ask("time", mode, repeats, seconds, timeout=self.budget.prepare)
            except Died as error:
                measured.end("failed", str(error))
                return
            if "failed" in answer:
                measured.end("failed", answer["failed"])
                return
            for name, values in answer["times"].items():
                measured.times.setdefault(mode, {}).setdefault(name, []).extend(values)
            measured.graph.setdefault(mode, []).extend(answer["graph"] or [])
            measured.graph_why[mode] = answer["graph_why"]
        measured.rounds += 1

    def _write(self, entry: Entry, shape: Shape, measured: list[Measured]) -> None:
        self.results.put([row for each in measured for row in rows(entry, shape, self.device, each)])

    def _say(self, entry: Entry, shape: Shape, measured: list[Measured]) -> None:
        self.log(f"{entry.name} {shape.name}")
        for each in measured:
            for mode in modes_of(entry, shape):
                row = self.results.rows[(self.device, entry.name, shape.name, each.arm.name, mode)]
                self.log("  " + line(row))
            if each.arm.role != "rival" and each.status in ("wrong", "failed"):
                self.bad.append(f"{entry.name} {shape.name} {each.arm.name}: {each.status}: {each.why}")


def rows(entry: Entry, shape: Shape, device: str, measured: Measured) -> list[Row]:
    """One row per mode of an arm at a shape; without times unless it is correct."""
    arm = measured.arm
    verdict = measured.facts.get("verdict") or {}
    made = []
    for mode in modes_of(entry, shape):
        work: Work = entry.work(shape, mode)
        row = {
            "device": device,
            "op": entry.name,
            "shape": shape.name,
            "arm": arm.name,
            "mode": mode,
            "role": arm.role,
            "status": measured.status,
            "why": measured.why,
            "dtype": shape.dtype,
            "sizes": shape.sizes,
            "bound": entry.bound,
            "flops": work.flops,
            "bytes": work.bytes,
            "items": work.items,
            "unit": work.unit,
            "error": verdict.get("error"),
            "errors": verdict.get("errors", {}),
            "lacks": list(arm.lacks),
            "date": machine.now(),
        }
        times = measured.times.get(mode)
        if measured.status == "ok" and times:
            row.update(_timed(measured, mode, times))
        elif measured.status == "ok":
            row.update(status="not timed", why="gated and warmed up; the run ended before its first round")
        made.append(row)
    return made


def _timed(measured: Measured, mode: str, times: dict[str, list[float]]) -> Row:
    first = measured.facts["modes"][mode]
    timed = {
        **spread("", times["ms"]),
        "repetitions": len(times["ms"]),
        "rounds": measured.rounds,
        "compiled": measured.arm.compiled,
        "first_call_s": first["first_call_s"],
        "peak_extra_mb": first["peak_extra_mb"],
        "state": measured.state,
        **measured.facts["extra"],
    }
    if times["cpu_ms"]:
        timed["cpu_ms"] = median(times["cpu_ms"])
    if times["launch_ms"]:
        timed["launch_ms"] = median(times["launch_ms"])
    if measured.graph.get(mode):
        timed.update(spread("graph_", measured.graph[mode]))
    elif measured.graph_why.get(mode):
        timed["graph_why"] = measured.graph_why[mode]
    return timed


def spread(prefix: str, values: list[float]) -> Row:
    names = {"median_ms": 0.5, "p20_ms": 0.2, "p80_ms": 0.8}
    return {prefix + name: quantile(values, q) for name, q in names.items()}


def line(row: Row) -> str:
    """A row as one line of the log."""
    head = f"{row['arm']:28} {row['mode']:17}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['why']}" if row["why"] else f"{head} {row['status']}"
    text = (
        f"{head} {row['median_ms']:10.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}] x{row['repetitions']}"
    )
    if row.get("pct_floor") is not None:
        text += f"  {row['pct_floor']:.0f}% of floor"
    if row["items"]:
        text += f"  {row['rate']:.4g} {row['unit']}/s"
    if row.get("ratio"):
        text += f"  x{row['ratio']:.2f}"
    return text + f"  +{row['peak_extra_mb']:.4g} MiB"


def measure(work: Iterable[tuple[Entry, list[Shape]]], runner: Runner, arms: Iterable[str] = ()) -> int:
    """Measure in order. Exit code: 1 where an arm of ours or a reference is wrong or failed."""
    arms = list(arms)
    for entry, shapes in work:
        if not runner.run(entry, shapes, arms):
            break
    for bad in runner.bad:
        print(f"WRONG: {bad}", file=sys.stderr)
    return 1 if runner.bad else 0
