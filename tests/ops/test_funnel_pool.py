"""Funnel pooling: torch's numbers, and as a torch op."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_exact, assert_survives, normal, run
from torch.autograd import gradcheck
from torch.library import opcheck

from pinclip.ops.funnel_pool import _funnel_pool, funnel_pool
from pinclip.reference.funnel_pool import funnel_pool as reference

CASES = ["pool", "residual"]


def op(grid):
    return lambda x, *residual: funnel_pool(x, grid, *residual)


def truth(grid):
    return lambda x, *residual: reference(x, *(residual or (None,)), grid)


def plain(grid):
    def step(x, *residual):
        image = x.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).mT
        return residual[0] + pooled if residual else pooled

    return step


def problem(case, batch, grid, width, dtype=torch.float64):
    x = normal(batch, grid * grid, width, dtype=dtype)
    residual = (normal(batch, grid * grid // 4, width, seed=1, dtype=dtype),) if case == "residual" else ()
    return x, *residual


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    leaves = [t.requires_grad_() for t in problem(case, 2, 4, 3)]
    assert gradcheck(truth(4), leaves)
    assert gradcheck(op(4), leaves)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch,grid,width", [(1, 2, 1), (0, 4, 3), (3, 6, 5), (2, 16, 8)])
def test_is_torch(batch, grid, width, case):
    assert_exact(truth(grid), plain(grid), problem(case, batch, grid, width))
    assert_exact(op(grid), plain(grid), problem(case, batch, grid, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_error_against_fp64(case, dtype):
    assert_as_exact_as(op(16), plain(16), truth(16), problem(case, 4, 16, 100, dtype=dtype))


def test_mixed_dtypes_promote():
    x, residual = problem("residual", 2, 4, 8, dtype=torch.float32)
    (y,), grads = run(op(4), (x.bfloat16(), residual))
    assert [t.dtype for t in (y, *grads)] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(y, plain(4)(x.bfloat16().float(), residual))


@pytest.mark.parametrize("case", CASES)
def test_compile_checkpoint_strides_repeat(case):
    assert_survives(op(4), problem(case, 3, 4, 5))


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    x, *residual = (t.requires_grad_() for t in problem(case, 2, 4, 3))
    opcheck(_funnel_pool, (x, *(residual or (None,)), 4))


@pytest.mark.parametrize(
    "x,grid,residual,words",
    [
        (torch.ones(2, 9, 3), 3, None, ("grid", "3")),
        (torch.ones(2, 9, 3), 4, None, ("x", "[2, 9, 3]")),
        (torch.ones(2, 16, 3).long(), 4, None, ("x", "torch.int64")),
        (torch.ones(2, 16, 3), 4, torch.ones(2, 16, 3), ("residual", "[2, 16, 3]")),
        (torch.ones(2, 16, 3), 4, torch.ones(2, 4, 3, device="meta"), ("residual", "meta")),
    ],
)
def test_errors_name_argument_and_value(x, grid, residual, words):
    with pytest.raises(ValueError) as error:
        funnel_pool(x, grid, residual)
    assert all(word in str(error.value) for word in words), str(error.value)
