"""What can be measured: entries with arms (ours, reference, rivals), shapes, work formulas and a gate.

A file of this folder that defines `ENTRIES` is found here; nothing else needs to know of it. An `Op` is a
differentiable function; its arms are held to fp64 before they are timed. A `Job` is anything else that has a
rate (pins/s, queries/s) and checks itself.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import gate

FORWARD, BOTH = "forward", "forward+backward"

# Files of this folder that are no entries.
MACHINERY = {
    "__init__",
    "__main__",
    "campaign",
    "ceilings",
    "compile",
    "gate",
    "machine",
    "plots",
    "records",
    "registry",
    "report",
    "runner",
    "sass",
    "scale",
    "stand_ins",
    "worker",
}


class Unsupported(Exception):
    """An arm says that it has no way to compute a shape; it is shown as such, with the reason."""


@dataclass(frozen=True)
class Shape:
    """One row of the tables. `sizes` are plain numbers and words that the entry's functions read.

    `dtype` of the inputs; `on` the devices it is meant for; `quick`: part of a --quick run; `tiny`: small
    enough for the interpreter and for the test suite; `modes`: of the entry's, where not all are measured.
    """

    name: str
    sizes: dict[str, Any]
    dtype: str = "bfloat16"
    on: tuple[str, ...] = ("cuda",)
    quick: bool = False
    tiny: bool = False
    modes: tuple[str, ...] = ()

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["sizes"][key]
        except KeyError:
            raise AttributeError(key) from None


@dataclass(frozen=True)
class Work:
    """Useful work of one step: floating-point operations, least bytes through memory, things of `unit`."""

    flops: float = 0.0
    bytes: float = 0.0
    items: float = 0.0
    unit: str = ""


@dataclass
class Problem:
    """Inputs of one shape: differentiable `leaves` with their names, and what else the arms read."""

    leaves: tuple[Tensor, ...]
    names: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        tensors = [*self.leaves, *(v for v in self.extra.values() if isinstance(v, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Arm:
    """One way to compute an entry.

    make(shape, problem) -> function(*leaves) -> result(s). It imports its library, so that a missing one is
    "not installed"; it raises `Unsupported` for a shape that it cannot do. lacks: names of the leaves whose
    gradient it does not have by design; they are said, not compared. memory(shape, mode) -> bytes it needs
    beyond the inputs, where that may exceed a machine. `compiled`: the first call compiles. `quick`: part of
    a --quick run.
    """

    name: str
    make: Callable[[Shape, Problem], Callable]
    role: str = "rival"  # or "ours", "reference"
    on: tuple[str, ...] = ("cuda", "cpu")
    lacks: tuple[str, ...] = ()
    memory: Callable[[Shape, str], float] | None = None
    compiled: bool = False
    quick: bool = True


@dataclass(frozen=True)
class Prepared:
    """An arm that passed its gate, ready to be timed: steps by mode, and what one step leaves behind."""

    steps: dict[str, Callable[[], Any]]
    verdict: gate.Verdict
    grad_bytes: int
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Op:
    """A differentiable function.

    inputs(shape, device, seed) -> Problem, in `shape.dtype`. plain(shape, problem) -> function(*leaves): the
    same in plain torch, in the dtype of the leaves. In fp64 it is
        the truth, in the shape's own dtype the measure of how exact an arm must be.
    parts(shape, problem) -> functions whose results sum to the plain one (a loss by blocks of rows), for
    shapes
        at which the plain one would not fit; None: the plain one itself.
    gate_shape(shape) -> the shape at which the arms are held to fp64 over several draws. check_full: hold
    every arm to fp64 once more at the full shape, on the inputs that are timed. batched: names of the leaves
    and extras with a leading batch dimension, which every result then has too; where
        given, the check at the full shape takes the first, middle and last sample only.
    work(shape, mode) -> Work.   bound: "compute" or "memory", for the reader.
    """

    name: str
    inputs: Callable[[Shape, str, int], Problem]
    plain: Callable[[Shape, Problem], Callable]
    arms: tuple[Arm, ...]
    shapes: tuple[Shape, ...]
    work: Callable[[Shape, str], Work]
    gate_shape: Callable[[Shape], Shape]
    parts: Callable[[Shape, Problem], Iterable[Callable]] | None = None
    check_full: Callable[[Shape], bool] = lambda shape: False
    batched: tuple[str, ...] = ()
    bound: str = "compute"
    modes: tuple[str, ...] = (FORWARD, BOTH)

    def prepare(self, shape: Shape, arm: Arm, device: str) -> Prepared:
        """Hold the arm to its gate; inputs and steps of the full shape. Raises what the arm raises."""
        verdict = gate.check(self, shape, arm, device)
        if not verdict.passed:
            return Prepared({}, verdict, 0)
        problem = self.inputs(shape, device, 0)
        function = arm.make(shape, problem)
        seeds: list[Tensor] = []

        def forward():
            with torch.no_grad():
                return function(*problem.leaves)

        def both():
            results = gate.as_tuple(function(*problem.leaves))
            if not seeds:  # gradients of the results, not all one; made once, outside of what is timed
                seeds.extend(gate.seeds(results, dtype_of(shape)))
            return torch.autograd.grad(results, problem.leaves, seeds, allow_unused=bool(arm.lacks))

        if self.check_full(shape):
            verdict = gate.check_full(self, shape, arm, problem, function, verdict)
            if not verdict.passed:
                return Prepared({}, verdict, 0)
        wanted = [t for t, name in zip(problem.leaves, problem.names) if name not in arm.lacks]
        return Prepared(
            {mode: {FORWARD: forward, BOTH: both}[mode] for mode in modes_of(self, shape)},
            verdict,
            sum(t.numel() * t.element_size() for t in wanted),
        )


@dataclass(frozen=True)
class Job:
    """Something with a rate: arm.make(shape, problem) -> step(), with the device in `problem.extra`.

    check(shape, arm, step) -> what is wrong with it, or "". A step may have `facts() -> dict`, which its row
    then carries.
    """

    name: str
    arms: tuple[Arm, ...]
    shapes: tuple[Shape, ...]
    work: Callable[[Shape, str], Work]
    check: Callable[[Shape, Arm, Callable], str] = lambda shape, arm, step: ""
    bound: str = "memory"
    modes: tuple[str, ...] = ("run",)

    def prepare(self, shape: Shape, arm: Arm, device: str) -> Prepared:
        step = arm.make(shape, Problem((), (), {"device": device}))
        wrong = self.check(shape, arm, step)
        if wrong:
            return Prepared({}, gate.Verdict(False, why=wrong), 0)
        (mode,) = self.modes
        return Prepared({mode: step}, gate.Verdict(True), 0, getattr(step, "facts", dict))


Entry = Op | Job


def compiled(make: Callable[[Shape, Problem], Callable], **options) -> Callable[[Shape, Problem], Callable]:
    """The same arm under torch.compile, with static shapes."""

    def make_compiled(shape: Shape, problem: Problem) -> Callable:
        torch._dynamo.reset()  # a function compiled for another shape would be compiled again as dynamic
        return torch.compile(make(shape, problem), dynamic=False, **options)

    return make_compiled


_entries: dict[str, Entry] = {}
_homes: dict[str, str] = {}
_broken: dict[str, str] = {}


def add(module: ModuleType) -> None:
    """Take up the entries of a module. ValueError for a name that is taken."""
    for entry in getattr(module, "ENTRIES", ()):
        if _homes.setdefault(entry.name, module.__name__) != module.__name__:
            raise ValueError(f"{module.__name__}: {entry.name!r} is an entry of {_homes[entry.name]}")
        _entries[entry.name] = entry


@functools.cache
def _find_all() -> None:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in MACHINERY or path.stem.startswith("test_"):
            continue
        try:
            add(importlib.import_module(f"bench.{path.stem}"))
        except ImportError as error:
            _broken[path.stem] = str(error)


def entries() -> dict[str, Entry]:
    """Every entry of every file of this folder, by name. A file that cannot be imported is in `broken()`."""
    _find_all()
    return _entries


def broken() -> dict[str, str]:
    """Files of this folder that cannot be imported here, and why (a missing library, say)."""
    _find_all()
    return _broken


def home(entry: Entry) -> str:
    """The module that defines an entry: a process that needs one entry imports no other."""
    return _homes[entry.name]


def entry_of(module: str, name: str) -> Entry:
    """The entry `name` of a module."""
    return next(entry for entry in importlib.import_module(module).ENTRIES if entry.name == name)


def find(name: str) -> Entry:
    """The entry of that name; ValueError naming what there is."""
    if name not in entries():
        raise ValueError(f"no entry {name!r}; there are: {', '.join(sorted(entries()))}")
    return entries()[name]


def select(
    entry: Entry, device: str, *, quick: bool = False, tiny: bool = False, names: Iterable[str] = ()
) -> list[Shape]:
    """The shapes of an entry that a run on `device` takes; `names` (exact, or a prefix) overrule the rest."""
    names = list(names)
    shapes = [shape for shape in entry.shapes if device in shape.on or (tiny and shape.tiny)]
    if names:
        return [shape for shape in shapes if any(shape.name.startswith(name) for name in names)]
    if tiny:
        return [shape for shape in shapes if shape.tiny]
    return [shape for shape in shapes if not shape.tiny and (shape.quick or not quick)]


def modes_of(entry: Entry, shape: Shape) -> tuple[str, ...]:
    return shape.modes or entry.modes


def dtype_of(shape: Shape) -> torch.dtype:
    return getattr(torch, shape.dtype)
