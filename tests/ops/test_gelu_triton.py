"""The kernels of bias and GELU: in the interpreter, compiled, and on a GPU."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_survives, normal, run
from rows_cases import (
    DTYPES,
    assert_captured,
    assert_cases,
    assert_does_not_wait,
    assert_repeats,
    use_row_kernels,
)
from test_gelu import FORMS, op, plain, problem, truth
from triton_cases import interpret


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    use_row_kernels(monkeypatch, "gelu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1,), (0, 16), (2, 0), (13, 100), (3, 5, 600)])  # one block and two
def check_error(shape, form, dtype):
    assert_as_exact_as(op(form), plain(form), truth(form), problem(*shape, dtype=dtype))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", FORMS)
def check_far_from_zero(form):
    """Where the exponential overflows or vanishes; the value is v or 0, the slope 1 or 0."""
    x = torch.tensor([[-1e4, -300.0, -60.0, 60.0, 300.0, 1e4]])
    (y,), (grad_x, _) = run(op(form), (x, torch.zeros(6)))
    assert torch.equal(y, x.clamp_min(0))
    seed = normal(1, 6, seed=90, dtype=torch.float32)
    assert torch.equal(grad_x, seed * (x > 0))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("narrow", [0, 1])
def check_mixed_dtypes(narrow):
    tensors = list(problem(5, 48, dtype=torch.float32))
    tensors[narrow] = tensors[narrow].bfloat16()
    (y,), gradients = run(op("tanh"), tensors)
    assert y.dtype == torch.float32 and [g.dtype for g in gradients] == [t.dtype for t in tensors]
    (true,), exact = run(truth("tanh"), [t.double() for t in tensors])
    torch.testing.assert_close(y, true.float())
    for ours, other in zip(gradients, exact):
        torch.testing.assert_close(ours, other.to(ours.dtype))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", FORMS)
def check_compile_checkpoint_strides_repeat(form):
    assert_survives(op(form), problem(3, 5, 24, dtype=torch.float32))


# Compiled for a GPU that is not there ---------------------------------------------------------------------


def test_compiles_within_budget():
    from pinclip_kernels.triton.gelu import compile_cases

    names = [f"_gelu_{way}_kernel/tanh/bf16/D4304" for way in ("forward", "backward")]
    assert_cases(compile_cases(), [(name, arch) for name in names for arch in (80, 90)])


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("shape", [(1, 192), (1000, 100), (4097, 3072), (1000, 4304)])
    def test_error(self, shape, form, dtype):
        tensors = [t.cuda() for t in problem(*shape, dtype=dtype)]
        assert_as_exact_as(op(form), plain(form), truth(form), tensors)

    @pytest.mark.parametrize("form", FORMS)
    def test_survives_and_repeats(self, form):
        assert_survives(op(form), [t.cuda() for t in problem(65, 512, dtype=torch.float32)])
        assert_repeats(op(form), [t.cuda() for t in problem(20001, 3072, dtype=torch.bfloat16)], times=20)

    def test_cuda_graph_without_waiting(self):
        tensors = [t.cuda() for t in problem(1000, 3072, dtype=torch.bfloat16)]
        assert_captured(op("tanh"), tensors)
        assert_does_not_wait(op("tanh"), tensors)
