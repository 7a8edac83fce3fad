"""The kernels of the gated residual norm: in the interpreter, compiled, and on a GPU."""

import pytest
import torch
from ops_helpers import assert_as_exact_as, assert_survives, run
from rows_cases import (
    DTYPES,
    assert_as_exact_over_draws,
    assert_captured,
    assert_cases,
    assert_does_not_wait,
    assert_repeats,
    use_row_kernels,
)
from test_gated_residual_norm import KINDS, op, plain, problem, truth
from triton_cases import interpret


def draws(kind, *shape, dtype, device="cpu"):
    """Four problems where the gate is a scalar, whose gradient is one number; else one."""
    first = problem(kind, *shape, dtype=dtype)
    rolled = [[t.roll(i, -1) * (1 + i / 7) if t.dim() else t for t in first] for i in range(4)]
    return [[t.to(device) for t in tensors] for tensors in rolled[: 4 if kind == "tanh" else 1]]


def test_in_the_interpreter():
    interpret(__file__)


# In the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    use_row_kernels(monkeypatch, "gated_residual_norm")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (7,), (3, 7, 192), (5, 200), (7, 1152)])
def check_error(shape, kind, dtype):
    """One row, none, no batch; several rows and one row to a program's step; widths with a rest, in one piece
    and in two."""
    assert_as_exact_over_draws(op(kind), plain(kind), truth(kind), draws(kind, *shape, dtype=dtype))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("width", [1, 100, 576, 640, 768, 1400, 2048])
def check_widths(width):
    """One piece, and a second one of 1, 2 and 4 features to a thread, full and not."""
    assert_as_exact_as(
        op("channel"), plain("channel"), truth("channel"), problem("channel", 5, width, dtype=torch.float32)
    )


@pytest.mark.usefixtures("kernels")
def check_row_far_from_zero():
    x, *others = problem("channel", 64, 192, dtype=torch.float32)
    assert_as_exact_as(op("channel"), plain("channel"), truth("channel"), (x + 1000, *others))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [(1,), (0,), (2, 3, 4), (0, 1)], ids=str)
def check_mixed_dtypes(narrow, kind):
    """A branch, a stream, vectors, or both rows in bf16: results in fp32, gradients in their own."""
    tensors = list(problem(kind, 5, 48, dtype=torch.float32))
    for index in narrow:
        tensors[index] = tensors[index].bfloat16()
    results, gradients = run(op(kind), tensors)
    assert [t.dtype for t in results] == [torch.float32] * 2
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors]
    exact = run(truth(kind), [t.double() for t in tensors])
    for ours, true in zip(results, exact[0]):
        torch.testing.assert_close(ours, true.float())
    for ours, true in zip(gradients, exact[1]):
        torch.testing.assert_close(
            ours, true.to(ours.dtype), rtol=1.6e-2 if ours.dtype != torch.float32 else 1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", KINDS)
def check_compile_checkpoint_strides_repeat(kind):
    assert_survives(op(kind), problem(kind, 3, 5, 24, dtype=torch.float32))


@pytest.mark.usefixtures("kernels")
def check_nan_stays_in_its_row():
    x, y, *others = problem("channel", 6, 48, dtype=torch.float32)
    x[2, 7] = float("nan")
    (residual, normed), (grad_x, grad_y, *_) = run(op("channel"), (x, y, *others))
    for result in (normed, grad_x, grad_y):
        assert result[2].isnan().all() and result[[0, 1, 3, 4, 5]].isfinite().all()
    assert residual.isnan().sum() == 1


# Compiled for a GPU that is not there ---------------------------------------------------------------------


def test_compiles_within_budget():
    from pinclip_kernels.triton import gated_residual_norm as kernels

    names = [
        f"_gated_{way}_kernel/{kind}/D{width}"
        for way in ("forward", "backward")
        for kind in ("bf16+bf16", "fp32+bf16")
        for width in (768, 1024, 1152)
    ]
    cases, walks = kernels.compile_cases(), (kernels._FORWARD, kernels._BACKWARD)
    assert_cases(cases, [(name, arch) for name in names for arch in (80, 90)], walks)


# On a GPU -------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = pytest.mark.gpu

    @staticmethod
    def problem(*args, **options):
        return [t.cuda() for t in problem(*args, **options)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "shape", [(1, 192), (1000, 100), (4097, 768), (4096, 1024), (2049, 1152), (300, 2048)]
    )
    def test_error(self, shape, kind, dtype):
        problems = draws(kind, *shape, dtype=dtype, device="cuda")
        assert_as_exact_over_draws(op(kind), plain(kind), truth(kind), problems)

    @pytest.mark.parametrize("kind", KINDS)
    def test_survives(self, kind):
        assert_survives(op(kind), self.problem(kind, 3, 50, 768, dtype=torch.float32))

    @pytest.mark.parametrize("kind", KINDS)
    def test_repeats_bit_for_bit(self, kind):
        assert_repeats(op(kind), self.problem(kind, 20001, 1024, dtype=torch.bfloat16), times=20)

    @pytest.mark.parametrize("kind", KINDS)
    def test_cuda_graph_without_waiting(self, kind):
        tensors = self.problem(kind, 1000, 768, dtype=torch.bfloat16)
        assert_captured(op(kind), tensors)
        assert_does_not_wait(op(kind), tensors)

    @pytest.mark.parametrize("offset", [1, 3])
    def test_rows_that_are_not_aligned(self, offset):
        """A view whose first element is at no multiple of 16 bytes."""
        tensors = self.problem("channel", 65, 768, dtype=torch.bfloat16)

        def move(t):
            moved = torch.cat((t.new_zeros(offset), t.flatten()))[offset:].view_as(t)
            assert moved.data_ptr() % 16
            return moved

        ours = run(lambda x, y, *others: op("channel")(move(x), move(y), *others), tensors)
        for a, b in zip(ours, run(op("channel"), tensors)):
            assert all(torch.equal(left, right) for left, right in zip(a, b))
