"""Entries for the tests: one op with arms that are right, wrong in several ways, missing, and dying."""

import os

import torch

from bench.registry import BOTH, Arm, Job, Op, Problem, Shape, Unsupported, Work

SHAPE = Shape("8x6", {"n": 8, "d": 6}, dtype="float32", on=("cpu",), tiny=True)
LARGE = Shape("64x6", {"n": 64, "d": 6}, dtype="float32", on=("cpu",))


def inputs(shape, device, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.n, shape.d, generator=generator).requires_grad_()
    y = torch.randn(shape.n, shape.d, generator=generator).requires_grad_()
    return Problem((x, y, torch.tensor(1.5, requires_grad=True)), ("x", "y", "scale"))


def right(x, y, scale):
    return scale * (x * y.exp()).sum()


def plain(shape, problem):
    return right


class _WrongGradient(torch.autograd.Function):
    """The right value; the gradient of y is off by one part in a hundred."""

    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.save_for_backward(x, y, scale)
        return right(x, y, scale)

    @staticmethod
    def backward(ctx, grad):
        x, y, scale = ctx.saved_tensors
        return grad * scale * y.exp(), 1.01 * grad * scale * x * y.exp(), grad * right(x, y, 1.0)


def one_row(x, y, scale):
    """Right but for one row of the gradient of x, which is lost."""
    return right(torch.cat((x[:1].detach(), x[1:])), y, scale)


def off(shape, problem):
    return lambda x, y, scale: 1.001 * right(x, y, scale)


def nan(shape, problem):
    return lambda x, y, scale: right(x, y, scale) + 0 * torch.tensor(torch.inf)


def no_scale(shape, problem):
    return lambda x, y, scale: right(x, y, scale.detach())


def wrong_when_large(shape, problem):
    return (lambda x, y, scale: 1.001 * right(x, y, scale)) if shape.n > 8 else right


def missing(shape, problem):
    import a_library_that_nobody_has  # noqa: F401


def dies(shape, problem):
    os._exit(3)


def raises(shape, problem):
    raise RuntimeError("planted")


def cannot(shape, problem):
    raise Unsupported("not this shape")


ARMS = (
    Arm("ours", plain, "ours"),
    Arm("eager", plain),
    Arm("wrong gradient", lambda shape, problem: _WrongGradient.apply),
    Arm("one row", lambda shape, problem: one_row),
    Arm("off", off),
    Arm("nan", nan),
    Arm("no gradient of scale", no_scale),
    Arm("lacks scale", no_scale, lacks=("scale",)),
    Arm("missing", missing),
    Arm("dies", dies),
    Arm("raises", raises),
    Arm("cannot", cannot),
    Arm("too large", plain, memory=lambda shape, mode: 1e18),
    Arm("wrong when large", wrong_when_large),
)

OP = Op(
    "planted",
    inputs,
    plain,
    ARMS,
    (SHAPE, LARGE),
    lambda shape, mode: Work(1e6 * (3 if mode == BOTH else 1), 1e3, shape.n, "rows"),
    lambda shape: SHAPE,
    check_full=lambda shape: True,
)
JOB = Job(
    "planted job",
    (Arm("ours", lambda shape, problem: lambda: None, "ours"),),
    (SHAPE,),
    lambda shape, mode: Work(items=5.0, unit="things"),
    check=lambda shape, arm, step: "it is planted so",
)
ENTRIES = (OP, JOB)
