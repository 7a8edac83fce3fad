"""One arm in a process of its own: prepared once (imports, gate, compilation, memory), then timed on demand.

The runner's side is `ArmProcess`; both sides speak over one pipe, question and answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# A fork server imports torch and our ops once; each arm is then a fork that has run nothing yet.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "bench.registry", "bench.worker", "pinclip.ops"])


@dataclass
class Times:
    """Milliseconds of each repetition; cpu: processor time of all threads; launch: host time to start one."""

    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    launch_ms: list[float] = field(default_factory=list)


def median(values: list[float]) -> float:
    return quantile(values, 0.5)


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest of the sorted values."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def time_steps(
    step: Callable[[], Any], device: str, repeats: int, seconds: float, warm: bool = True
) -> Times:
    """Time up to `repeats` steps within about `seconds`, at least one."""
    if warm:
        step()
    return (_time_cuda if device == "cuda" else _time_cpu)(step, repeats, seconds)


def _time_cpu(step: Callable[[], Any], repeats: int, seconds: float) -> Times:
    times, begin = Times(), time.perf_counter()
    gc.collect()
    gc.disable()  # as timeit does: a collection would fall on some steps and not on others
    try:
        while len(times.ms) < repeats and (not times.ms or time.perf_counter() - begin < seconds):
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            times.ms.append(1e3 * (time.perf_counter() - wall))
            times.cpu_ms.append(1e3 * (time.process_time() - cpu))
    finally:
        gc.enable()
    return times


def _time_cuda(step: Callable[[], Any], repeats: int, seconds: float) -> Times:
    """Events around each step; before it, the L2 is filled with something else."""
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(2 * max(properties.L2_cache_size, 2**25), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    repeats = max(1, min(repeats, int(seconds / max(once, 1e-6))))
    times, marks = Times(), []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        marks.append((start, stop))
    torch.cuda.synchronize()
    times.ms = [start.elapsed_time(stop) for start, stop in marks]
    for _ in range(min(repeats, 10)):
        begin = time.perf_counter()
        step()
        times.launch_ms.append(1e3 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
    return times


def capture(step: Callable[[], Any]) -> Callable[[], None]:
    """The step as a CUDA graph: its replay has no launches but one. Raises where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_memory(step: Callable[[], Any], device: str) -> float:
    """Bytes that one step adds at its height to what stood before it (the inputs among it)."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    _give_back()
    before, greatest, done = anonymous_bytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal greatest
        while not done.wait(0.002):
            greatest = max(greatest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = step()
    greatest = max(greatest, anonymous_bytes())  # a step of a millisecond may fall between two looks
    del kept
    done.set()
    watcher.join()
    return greatest - before


def _give_back() -> None:
    """Have the C library return freed memory that it keeps: a step that reused it would seem to need none."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def anonymous_bytes() -> float:
    """Resident memory without mapped files: the kernel drops and reloads pages of libraries as it likes."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.split("RssAnon:")[1].split()[0])


class _Served:
    """The worker's side: answers the runner's questions about one arm at one shape."""

    def __init__(self, home: str, entry: str, shape: str, arm: str, device: str, threads: int | None):
        if threads:
            torch.set_num_threads(threads)
        from bench.registry import entry_of

        self.device = device
        if not entry:  # for the ceilings alone
            return
        self.entry = entry_of(home, entry)
        self.shape = next(each for each in self.entry.shapes if each.name == shape)
        self.arm = next(each for each in self.entry.arms if each.name == arm)
        self.prepared = None

    def prepare(self) -> dict:
        """Gate, compile, warm up, measure memory. {"status", "why", "verdict", "modes": {mode: facts}}."""
        from bench.registry import Unsupported

        try:
            begin = time.perf_counter()
            self.prepared = self.entry.prepare(self.shape, self.arm, self.device)
            gate_seconds = time.perf_counter() - begin
            verdict = self.prepared.verdict
            if not verdict.passed:
                return {"status": "wrong", "why": verdict.why, "verdict": verdict.as_dict()}
            modes = {mode: self._first(mode, step) for mode, step in self.prepared.steps.items()}
            extra = self.prepared.facts()
        except (ImportError, Unsupported, MemoryError, torch.OutOfMemoryError) as error:
            return {"status": _status(error), "why": _why(error)}
        except Exception as error:  # a rival may fail in any way; what matters is that it is said
            traceback.print_exc()
            return {"status": "failed", "why": _why(error)}
        facts = {"gate_s": gate_seconds, "modes": modes, "extra": extra}
        return {"status": "ok", "why": "", "verdict": verdict.as_dict(), **facts}

    def _first(self, mode: str, step: Callable) -> dict:
        """Time of the first call, and peak memory.

        The memory is of the second call on a GPU, where the first compiles and loads; of the same one on a
        CPU, where the gate has run the code before and a call may take a minute.
        """
        self._synchronize()
        begin = time.perf_counter()
        if self.device == "cuda":
            step()
            self._synchronize()
            first, extra = time.perf_counter() - begin, peak_memory(step, self.device)
        else:
            extra = peak_memory(step, self.device)
            first = time.perf_counter() - begin
        grads = self.prepared.grad_bytes if mode == "forward+backward" else 0
        extra -= grads
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {"first_call_s": first, "peak_extra_mb": max(0.0, extra) / 2**20}

    def time(self, mode: str, repeats: int, seconds: float) -> dict:
        """Times of one round; on a GPU of graph replays too, or why there are none."""
        step = self.prepared.steps[mode]
        try:
            times = time_steps(step, self.device, repeats, seconds, warm=self.device == "cuda")
            answer = {"times": vars(times), "graph": None, "graph_why": ""}
            if self.device == "cuda":
                answer.update(self._graph(step, repeats, seconds))
            return answer
        except Exception as error:
            traceback.print_exc()
            return {"failed": _why(error)}
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _graph(self, step: Callable, repeats: int, seconds: float) -> dict:
        try:
            replay = capture(step)
        except Exception as error:  # a step that waits for the device cannot be captured
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            return {"graph_why": _why(error)}
        return {"graph": time_steps(replay, "cuda", repeats, seconds).ms}

    def ceilings(self, tiny: bool) -> dict:
        from bench import ceilings

        return ceilings.measure(self.device, tiny=tiny)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _status(error: BaseException) -> str:
    if isinstance(error, ImportError):
        ours = (error.name or "").split(".")[0] in ("pinclip", "pinclip_kernels", "bench")
        return "failed" if ours else "not installed"
    return "does not fit" if isinstance(error, MemoryError | torch.OutOfMemoryError) else "unsupported"


def _why(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]


def _serve(pipe, *args) -> None:
    try:
        served = _Served(*args)
        pipe.send({})
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"error": _why(error)})
        return
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:  # the runner is gone
            return
        pipe.send(getattr(served, name)(*arguments))


class Died(Exception):
    """The process of an arm ended, or did not answer in time."""


class ArmProcess:
    """The runner's side. `ask` raises `Died`; a process that has died or been silent is not asked again."""

    def __init__(self, *args):
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs, *args))  # may have children
        self.process.start()
        theirs.close()

    def ready(self, timeout: float = 120.0) -> None:
        answer = self._receive(timeout)
        if "error" in answer:
            raise Died(answer["error"])

    def ask(self, name: str, *arguments, timeout: float) -> dict:
        try:
            self.pipe.send((name, arguments))
        except OSError:
            raise Died(self._end()) from None
        return self._receive(timeout)

    def _receive(self, timeout: float) -> dict:
        try:
            if self.pipe.poll(timeout):
                return self.pipe.recv()
        except (EOFError, OSError):
            raise Died(self._end()) from None
        self.process.kill()
        raise Died(f"no answer within {timeout:.0f} s")

    def _end(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code == -9:
            return "the process was killed (out of memory, most likely)"
        return f"the process ended with exit code {code}"

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
