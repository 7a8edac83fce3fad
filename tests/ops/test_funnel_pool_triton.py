"""The kernels of funnel pooling: in the interpreter, compiled, and on a GPU."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_survives, run
from rows_cases import (
    DTYPES,
    assert_captured,
    assert_cases,
    assert_does_not_wait,
    assert_repeats,
    use_row_kernels,
)
from test_funnel_pool import CASES, op, plain, problem, truth
from triton_cases import interpret


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    use_row_kernels(monkeypatch, "funnel_pool")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch,grid,width", [(1, 2, 16), (0, 4, 16), (3, 6, 100), (2, 4, 600)])
def check_error(batch, grid, width, case, dtype):
    tensors = problem(case, batch, grid, width, dtype=dtype)
    assert_as_exact_as(op(grid), plain(grid), truth(grid), tensors)


@pytest.mark.usefixtures("kernels")
def check_mixed_dtypes():
    x, residual = problem("residual", 2, 4, 48, dtype=torch.float32)
    (y,), grads = run(op(4), (x.bfloat16(), residual))
    assert [t.dtype for t in (y, *grads)] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(y, plain(4)(x.bfloat16().float(), residual))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", CASES)
def check_compile_checkpoint_strides_repeat(case):
    assert_survives(op(4), problem(case, 3, 4, 24, dtype=torch.float32))


# Compiled for a GPU that is not there ---------------------------------------------------------------------


def test_compiles_within_budget():
    from pinclip_kernels.triton.funnel_pool import compile_cases

    names = [f"_funnel_{way}_kernel/bf16/D1152" for way in ("forward", "backward")]
    assert_cases(compile_cases(), [(name, arch) for name in names for arch in (80, 90)])


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("batch,grid,width", [(1, 2, 192), (65, 16, 768), (7, 14, 1152), (3, 32, 2048)])
    def test_error(self, batch, grid, width, case, dtype):
        tensors = [t.cuda() for t in problem(case, batch, grid, width, dtype=dtype)]
        assert_as_exact_as(op(grid), plain(grid), truth(grid), tensors)

    @pytest.mark.parametrize("case", CASES)
    def test_survives_repeats_and_is_captured(self, case):
        assert_survives(op(4), [t.cuda() for t in problem(case, 3, 4, 256, dtype=torch.float32)])
        tensors = [t.cuda() for t in problem(case, 64, 16, 768, dtype=torch.bfloat16)]
        assert_repeats(op(16), tensors, times=20)
        assert_captured(op(16), tensors)
        assert_does_not_wait(op(16), tensors)
