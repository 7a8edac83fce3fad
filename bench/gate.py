"""The gate: no arm is timed before its results and every gradient are as exact as plain torch's.

The truth is the plain function in fp64; the measure is the same function in the arm's own precision. An arm
passes where, for every result and every gradient,

    error <= 2 * plain error + atol

both in the greatest absolute difference and in the Frobenius norm, as root mean squares over draws of the
inputs. atol is one rounding of the greatest true number; of a single number (a loss, the gradient of a scale)
it is a sixteenth of the inputs' precision, at least 8 roundings of fp32. The error of a single number may be
small by luck, plain torch's too: where nothing else is wrong, more draws are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.registry import Arm, Op, Problem, Shape

FACTOR = 2.0
DRAWS = (3, 8, 32)
_GRADIENT = 0.75  # of a single number; exact in every precision


@dataclass(frozen=True)
class Verdict:
    """Whether an arm passed; `errors`: tensor -> {error, plain, allowed}, norms relative to the true one."""

    passed: bool
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    why: str = ""
    lacks: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """The worst relative error of all results and gradients."""
        return max((each["error"] for each in self.errors.values()), default=None)

    def as_dict(self) -> dict:
        return {**asdict(self), "lacks": list(self.lacks), "error": self.error}


def as_tuple(results: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def seeds(results: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """A gradient for every result: random numbers of `dtype`, so that every precision gets the same ones."""
    made = []
    for index, result in enumerate(results):
        if result.numel() == 1:
            made.append(torch.full_like(result, _GRADIENT))
            continue
        generator = torch.Generator(device=result.device).manual_seed(90 + index)
        random = torch.randn(result.shape, generator=generator, device=result.device)
        made.append(random.to(dtype).to(result.dtype))
    return made


class Outcome(NamedTuple):
    """Results of a function, gradients of its leaves, and the gradients of the results that went in."""

    results: list[Tensor]
    gradients: list[Tensor]
    upstream: list[Tensor]


def run(
    function: Callable, leaves: Iterable[Tensor], dtype: torch.dtype, upstream: list[Tensor] | None = None
) -> Outcome:
    """Run forward and backward; a leaf that the function does not use has gradient zero."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = as_tuple(function(*leaves))
    if upstream is None:
        upstream = seeds(results, dtype)
    upstream = [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
    grads = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]
    return Outcome([r.detach() for r in results], grads, upstream)


def run_parts(parts: Iterable[Callable], leaves: list[Tensor], dtype: torch.dtype) -> Outcome:
    """The same of a single number that is a sum of parts: each is run by itself, sums are kept wide."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=leaves[0].device)
    sums = [torch.zeros(leaf.shape, dtype=wide, device=leaf.device) for leaf in leaves]
    for part in parts:
        got = run(part, leaves, dtype)
        total += got.results[0]
        for each, grad in zip(sums, got.gradients):
            each += grad
    return Outcome([total], [s.to(leaf.dtype) for s, leaf in zip(sums, leaves)], [])


def cast(leaves: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Leaves in `dtype`; single numbers (scale, bias) at least in fp32, which is what models keep them in."""
    wide = torch.promote_types(dtype, torch.float32)
    return [leaf.to(dtype if leaf.numel() > 1 else wide) for leaf in leaves]


class _Errors:
    """Errors of an arm and of plain torch, draw by draw.

    typical: relative errors of plain torch in single numbers that count where this draw's are smaller.
    """

    def __init__(self, eps_inputs: float, typical: dict[str, float] | None = None):
        self.eps_inputs, self.typical = eps_inputs, typical or {}
        self.rows: dict[str, list[tuple[float, ...]]] = {}
        self.wrong: list[str] = []  # what is wrong beyond numbers
        self.single: set[str] = set()

    def add(self, got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        if got.keys() != truth.keys():
            self.wrong.append(f"gives {list(got)}, not {list(truth)}")
            return
        for name, true in truth.items():
            if not torch.isfinite(true).all():
                self.wrong.append(f"{name}: the fp64 truth itself is not finite")
            elif got[name].shape != true.shape:
                self.wrong.append(f"{name} has shape {list(got[name].shape)}, not {list(true.shape)}")
            else:
                self.rows.setdefault(name, []).append(self._row(name, got[name], plain[name], true))

    def _row(self, name: str, got: Tensor, plain: Tensor, true: Tensor) -> tuple[float, ...]:
        peak, norm = true.abs().max().item(), true.norm().item()
        eps, least = torch.finfo(got.dtype).eps, 0.0
        if true.numel() == 1:
            self.single.add(name)
            eps, least = max(self.eps_inputs / 16, 2.0**-20), norm * self.typical.get(name, 0.0)
        allowed = (max(least, distance) for distance in _distances(plain, true))
        return *_distances(got, true), *allowed, eps * peak, eps * norm, norm

    def verdict(self, lacks: tuple[str, ...]) -> tuple[Verdict, bool]:
        """The verdict so far, and whether more draws may change it."""
        errors, wrong, unlucky = {}, list(dict.fromkeys(self.wrong)), not self.wrong
        for name, rows in self.rows.items():
            peak, norm, plain_peak, plain_norm, atol_peak, atol_norm, size = (_rms(c) for c in zip(*rows))
            # Written so that NaN does not pass, nor infinity beside another infinity.
            fits = peak <= FACTOR * plain_peak + atol_peak and norm <= FACTOR * plain_norm + atol_norm
            fits = fits and math.isfinite(norm)
            scale = size or 1.0
            allowed = (FACTOR * plain_norm + atol_norm) / scale
            errors[name] = {"error": norm / scale, "plain": plain_norm / scale, "allowed": allowed}
            if not fits:
                off = peak / (FACTOR * plain_peak + atol_peak or 1.0)
                text = f"error {norm / scale:.2g} of {allowed:.2g} allowed, the greatest {off:.2g} times"
                wrong.append(f"{name}: {text}")
                unlucky = unlucky and name in self.single and math.isfinite(norm)
        return Verdict(not wrong, errors, "; ".join(wrong), lacks), bool(wrong) and unlucky


def _distances(got: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = got.double() - truth
    return difference.abs().max().item(), difference.norm().item()


def _rms(values: Iterable[float]) -> float:
    values = list(values)
    return math.sqrt(sum(v * v for v in values) / len(values))


def _plain(op: Op, shape: Shape, problem: Problem, dtype: torch.dtype, upstream=None) -> Outcome:
    leaves = cast(problem.leaves, dtype)
    if op.parts is not None:
        return run_parts(op.parts(shape, problem), leaves, dtype)
    return run(op.plain(shape, problem), leaves, getattr(torch, shape.dtype), upstream)


def _named(
    problem: Problem, outcome: Outcome, arm: Arm, only: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """What is compared, by name: results, and the gradients that the arm has (of the leaves `only`)."""
    several = len(outcome.results) > 1
    named = {f"result {i}" if several else "result": r for i, r in enumerate(outcome.results)}
    for name, grad in zip(problem.names, outcome.gradients):
        if name not in arm.lacks and (only is None or name in only):
            named[f"d{name}"] = grad
    return named


def check(op: Op, shape: Shape, arm: Arm, device: str) -> Verdict:
    """Hold an arm to fp64 at the entry's gate shape, over several draws of the inputs."""
    small = op.gate_shape(shape)
    dtype = getattr(torch, small.dtype)
    errors, draw = _Errors(torch.finfo(dtype).eps), 0
    for draws in DRAWS:
        while draw < draws:
            draw += 1
            problem = op.inputs(small, device, draw)
            outcomes = (
                run(arm.make(small, problem), problem.leaves, dtype),
                _plain(op, small, problem, dtype),
                _plain(op, small, problem, torch.float64),
            )
            errors.add(*(_named(problem, each, arm) for each in outcomes))
        verdict, unlucky = errors.verdict(arm.lacks)
        if not unlucky:
            break
    return verdict


def check_full(
    op: Op, shape: Shape, arm: Arm, problem: Problem, function: Callable, before: Verdict
) -> Verdict:
    """Hold an arm to fp64 at the full shape: whole, or the first, middle and last sample of a batch."""
    dtype = getattr(torch, shape.dtype)
    got = run(function, problem.leaves, dtype)
    typical = {name: each["plain"] for name, each in before.errors.items()}
    errors = _Errors(torch.finfo(dtype).eps, typical)
    if op.batched:
        sample, rows = _sample(op, problem)
        upstream = [u[rows] for u in got.upstream]
        plain, truth = (_plain(op, shape, sample, d, upstream) for d in (dtype, torch.float64))
        mine = {name: value[rows] for name, value in _named(problem, got, arm, op.batched).items()}
        errors.add(mine, *(_named(sample, each, arm, op.batched) for each in (plain, truth)))
    else:
        plain, truth = (_plain(op, shape, problem, d) for d in (dtype, torch.float64))
        errors.add(*(_named(problem, each, arm) for each in (got, plain, truth)))
    after, _ = errors.verdict(arm.lacks)
    both = {**before.errors, **{f"{name}, full shape": e for name, e in after.errors.items()}}
    why = f"at the full shape: {after.why}" if after.why else ""
    return Verdict(after.passed, both, why, arm.lacks)


def _sample(op: Op, problem: Problem) -> tuple[Problem, Tensor]:
    """The first, middle and last sample of a batch, and their numbers."""
    batch = next(t.shape[0] for t, name in zip(problem.leaves, problem.names) if name in op.batched)
    rows = torch.tensor(sorted({0, batch // 2, batch - 1}), device=problem.leaves[0].device)
    leaves = tuple(t[rows] if name in op.batched else t for t, name in zip(problem.leaves, problem.names))
    extra = {name: v[rows] if name in op.batched else v for name, v in problem.extra.items()}
    return replace(problem, leaves=leaves, extra=extra), rows
