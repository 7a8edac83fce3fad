"""The kernels of the L2 normalisation: in the interpreter, compiled, and on a GPU."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_exact, assert_survives, normal, run
from rows_cases import (
    DTYPES,
    assert_captured,
    assert_cases,
    assert_does_not_wait,
    assert_repeats,
    use_row_kernels,
)
from test_l2_normalize import plain, truth
from triton_cases import interpret

from pinclip.ops.l2_normalize import l2_normalize


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    use_row_kernels(monkeypatch, "l2_normalize")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1,), (0, 16), (33, 16), (5, 13, 100), (13, 200), (13, 640), (13, 1152), (13, 1400), (3, 2048)],
    ids=str,
)
def check_error(shape, dtype):
    assert_as_exact_as(l2_normalize, plain, truth, [normal(*shape, dtype=dtype)])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def check_zero_rows_and_rows_below_eps(dtype):
    x = normal(6, 20, dtype=dtype)
    x[1], x[3] = 0, x[3] / 64  # its norm is 0.05
    (y,), (gradient,) = run(lambda t: l2_normalize(t, 0.5), [x])
    assert (y[1] == 0).all() and (gradient[1] == 0).all()
    rest = x[[0, 2, 3, 4, 5]]
    assert_as_exact_as(*(lambda t, f=f: f(t, 0.5) for f in (l2_normalize, plain, truth)), [rest])


@pytest.mark.usefixtures("kernels")
def check_nan_stays_in_its_row():
    x = normal(6, 48, dtype=torch.float32)
    x[2, 7] = float("nan")
    for (result,) in run(l2_normalize, [x]):
        assert result[2].isnan().all() and result[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.usefixtures("kernels")
def check_compile_checkpoint_strides_repeat():
    assert_survives(l2_normalize, [normal(3, 5, 24, dtype=torch.float32)])


@pytest.mark.usefixtures("kernels")
def check_fp64_stays_with_torch():
    assert_exact(l2_normalize, plain, [normal(3, 5)])


# Compiled for a GPU that is not there ---------------------------------------------------------------------


def test_compiles_within_budget():
    from pinclip_kernels.triton import l2_normalize as kernels

    names = [
        f"_normalize_{way}_kernel/bf16/D{width}"
        for way in ("forward", "backward")
        for width in (768, 1024, 1152)
    ]
    cases, walks = kernels.compile_cases(), (kernels._FORWARD, kernels._BACKWARD)
    assert_cases(cases, [(name, arch) for name in names for arch in (80, 90)], walks)


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("width", [16, 100, 512, 768, 1152, 2048, 4096])  # the last one by torch
    @pytest.mark.parametrize("rows", [1, 65, 10001])
    def test_error(self, rows, width, dtype):
        assert_as_exact_as(l2_normalize, plain, truth, [normal(rows, width, dtype=dtype).cuda()])

    def test_survives_and_repeats(self):
        assert_survives(l2_normalize, [normal(65, 512, dtype=torch.float32).cuda()])
        assert_repeats(l2_normalize, [normal(30001, 512, dtype=torch.bfloat16).cuda()], times=20)

    def test_cuda_graph_without_waiting(self):
        tensors = [normal(1000, 768, dtype=torch.bfloat16).cuda()]
        assert_captured(l2_normalize, tensors)
        assert_does_not_wait(l2_normalize, tensors)
